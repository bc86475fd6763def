// The input of a decode: a bundled photo, a random latent, or a file.

import { getImage, ServerError } from "./client.js";
import { readLatent, FileError } from "./files.js";
import { randomLatent } from "./latents.js";
import { lowResolution } from "./photos.js";

/** The radio buttons for the input, and the drop zone for files. */
export class Input {
    #fieldset;
    #decoder;
    #dct;
    #onChange;
    #message;
    #note;
    #choice = 0; // number of the last choice, as photos and files take time to load
    #radio; // of the input in use
    #chosen;
    #own = null; // what the file contains that was used last
    #photos = new Map(); // bundled photos, by address
    #encoded; // the latent of the photo that was encoded last

    /**
     * @param {HTMLFieldSetElement} fieldset
     * @param {() => void} onChange called when another input or decoder is in use
     */
    constructor(fieldset, onChange) {
        this.#fieldset = fieldset;
        this.#onChange = onChange;
        this.#message = fieldset.querySelector("#file-message");
        this.#note = fieldset.querySelector("#file-note");
        fieldset.addEventListener("change", ({ target }) => target.name === "source" && this.#select(target));
        const file = fieldset.querySelector("#file");
        file.addEventListener("change", () => this.#useFile(file.files[0]).finally(() => (file.value = "")));
        this.#acceptDrops();
    }

    /** The photo { width, height } or the latent { shape, data, others } in use, or null for a random latent. */
    get chosen() {
        return this.#chosen;
    }

    /** Whether the input is a latent from a file, which may contain noise already. */
    get isOwnLatent() {
        return Boolean(this.#chosen?.shape);
    }

    /**
     * Offer the inputs that a decoder supports, and keep the chosen one if it is among them.
     *
     * @param {object} decoder member of `decoders` in /info
     * @param {Dct|null} dct transform for photos; null if the decoder has another latent space
     */
    use(decoder, dct) {
        [this.#decoder, this.#dct] = [decoder, dct];
        this.#encoded = { key: "" };
        for (const tile of this.#fieldset.querySelectorAll(".tile.photo")) {
            tile.hidden = dct === null;
        }
        this.#fieldset.querySelector("#file-hint").textContent = `${dct ? "Photo, " : ""}.npy or .safetensors`;
        const offered = ".tile:not([hidden]) [name=source]";
        const radio = this.#fieldset.querySelector(`${offered}:checked`) ?? this.#fieldset.querySelector(offered);
        radio.checked = true;
        this.#note.textContent = "";
        [this.#radio, this.#chosen] = [this.#fieldset.querySelector("[value=random]"), null]; // until it is loaded
        this.#select(radio).then((isUsed) => isUsed || this.#onChange());
    }

    /** Return the latent of the input without added noise; `seed` is that of a random latent. */
    latent(size, seed) {
        if (this.#chosen === null) {
            return randomLatent([this.#decoder.latent_space.channels, ...size.latent], seed);
        }
        return this.isOwnLatent ? this.#chosen : this.#encode(this.#chosen, size);
    }

    /** Use the input of a radio button; return whether that was possible. */
    #select(radio) {
        const inputs = { file: () => this.#checked(this.#own), random: () => null };
        const bundled = () => this.#bundledPhoto(radio.parentElement.querySelector("img").src);
        return this.#use(radio, inputs[radio.value] ?? bundled);
    }

    async #useFile(file) {
        const tile = this.#fieldset.querySelector(".tile.own");
        if (await this.#use(tile.querySelector("input"), () => this.#read(file))) {
            this.#own = this.#chosen;
            tile.hidden = false;
            tile.querySelector("span").textContent = file.name;
        }
    }

    /** Use what `load` returns, unless another input is chosen in the meantime; show why that is not possible. */
    async #use(radio, load) {
        const choice = ++this.#choice;
        this.#message.textContent = "";
        try {
            const chosen = await load();
            if (choice !== this.#choice) {
                return false;
            }
            [this.#radio, this.#chosen] = [radio, chosen];
        } catch (error) {
            if (!(error instanceof FileError || error instanceof ServerError)) {
                throw error;
            }
            if (choice === this.#choice) {
                this.#message.textContent = error.message;
                this.#radio.checked = true;
            }
            return false;
        }
        radio.checked = true;
        const others = this.#chosen?.others ?? "";
        this.#note.textContent = others && `Only the latent is sent. The file also has: ${others}.`;
        this.#onChange();
        return true;
    }

    async #bundledPhoto(address) {
        if (!this.#photos.has(address)) {
            this.#photos.set(address, await getImage(address));
        }
        return this.#photos.get(address);
    }

    #encode(photo, size) {
        const key = size.output.join();
        if (this.#encoded.photo !== photo || this.#encoded.key !== key) {
            const low = lowResolution(photo, ...size.output, this.#decoder.upscale);
            this.#encoded = { photo, key, latent: this.#dct.encode(low) };
        }
        return this.#encoded.latent;
    }

    #acceptDrops() {
        const zone = this.#fieldset.querySelector(".drop");
        // The whole page accepts files: a browser would leave the page to show a file that misses the zone.
        addEventListener("dragover", (event) => {
            event.preventDefault();
            zone.classList.add("active");
        });
        addEventListener("dragleave", () => zone.classList.remove("active"));
        addEventListener("drop", (event) => {
            event.preventDefault();
            zone.classList.remove("active");
            if (event.dataTransfer.files.length > 0) {
                this.#useFile(event.dataTransfer.files[0]);
            }
        });
    }

    /** Return the photo or the latent in a file. */
    async #read(file) {
        const latent = await readLatent(file);
        if (latent !== null) {
            return this.#checked(latent);
        }
        const photo = await createImageBitmap(file).catch(() => null);
        if (photo === null) {
            throw new FileError("This is neither a photo that the browser can read nor an .npy or .safetensors file.");
        }
        return this.#checked(photo);
    }

    /** Return a photo or a latent if the decoder supports it, a latent as [channels, height, width]. */
    #checked(input) {
        if (input.shape) {
            return this.#checkedLatent(input);
        }
        if (this.#dct === null) {
            throw new FileError("This decoder needs a latent. The page can compute only those of the bundled decoder.");
        }
        return input;
    }

    #checkedLatent({ shape, data, others }) {
        const own = shape.length === 4 && shape[0] === 1 ? shape.slice(1) : shape;
        const { latent_space: space, sizes } = this.#decoder;
        const supported = sizes.map(({ latent }) => [space.channels, ...latent].join(" × "));
        if (!supported.includes(own.join(" × "))) {
            const needed = supported.join(", ");
            throw new FileError(`The latent has the shape ${shape.join(" × ")}. This decoder supports ${needed}.`);
        }
        return { shape: own, data, others };
    }
}
