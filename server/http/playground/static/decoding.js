// The section that decodes: input and settings, the request, and its result.

import { decode, hasKey, ServerError } from "./client.js";
import { Compare } from "./compare.js";
import { Controls } from "./controls.js";
import { decoderOptions } from "./decoders.js";
import { enlarge, toImageData } from "./enlarge.js";
import { writeNpy } from "./files.js";
import { Input } from "./input.js";
import { addNoise, showChannels } from "./latents.js";
import { nearestSize } from "./photos.js";
import { Result } from "./result.js";
import { milliseconds } from "./timing.js";

const LARGEST_VIEW = 1024; // pixels along one side of the view of a latent

/** Connects the parts of the section. */
export class Decoding {
    #info;
    #decoder;
    #dct;
    #form;
    #section;
    #input;
    #controls;
    #compare;
    #result;
    #progress;
    #running = null; // controller that cancels the current request
    #unavailable = "Connecting to the server"; // reason, or empty

    /**
     * @param {HTMLElement} section
     * @param {object} info the document /info
     */
    constructor(section, info) {
        this.#info = info;
        this.#form = section.querySelector("#controls");
        this.#input = new Input(section.querySelector("#source"), () => this.#inputChanged());
        this.#controls = new Controls(this.#form, info, () => this.#latentChanged());
        this.#section = section.querySelector("#result");
        this.#compare = new Compare(this.#section);
        this.#result = new Result(
            this.#section,
            (address, name) => this.#compare.showAfter(address, name),
            () => this.#form.requestSubmit(),
        );
        this.#progress = section.querySelector("#progress");
        this.#form.addEventListener("submit", (event) => {
            event.preventDefault();
            this.#run();
        });
        section.querySelector("#cancel").addEventListener("click", () => this.#running?.abort());
    }

    /**
     * Decode with another decoder.
     *
     * @param {object} decoder member of `decoders` in /info
     * @param {Dct|null} dct transform for photos; null if the decoder has another latent space
     */
    use(decoder, dct) {
        [this.#decoder, this.#dct] = [decoder, dct];
        this.#controls.use(decoder);
        this.#input.use(decoder, dct);
    }

    /** Allow or forbid decodes; `reason` explains why they are forbidden. */
    setReady(isReady, reason) {
        this.#unavailable = isReady ? "" : reason;
        this.#showButtons();
    }

    #inputChanged() {
        const { chosen } = this.#input;
        const { sizes } = this.#decoder;
        if (this.#input.isOwnLatent) {
            this.#controls.chooseSize(sizes.find(({ latent }) => latent.join() === chosen.shape.slice(1).join()), true);
        } else {
            this.#controls.chooseSize(chosen === null ? this.#controls.read().size : nearestSize(chosen, sizes), false);
        }
        this.#latentChanged();
    }

    /** Show the latent that the next request sends. */
    #latentChanged() {
        this.#running?.abort();
        this.#running = null;
        const settings = this.#controls.read();
        const latent = this.#latent(settings);
        this.#result.clear();
        this.#progress.textContent = `${latent.shape.join(" × ")} values`;
        const small = this.#dct === null ? showChannels(latent) : this.#dct.decode(latent);
        const side = Math.max(...settings.size.output);
        const factor = Math.max(1, Math.floor(Math.min(side, LARGEST_VIEW) / Math.max(small.height, small.width)));
        const name = this.#dct === null ? "Latent, three channels" : "Bicubic";
        this.#compare.showBefore(toImageData(enlarge(small, factor)), name, settings.size.output);
        this.#showButtons();
    }

    #latent({ size, seed, sigma, noisy }) {
        const clean = this.#input.latent(size, seed + 1); // another seed than that of the noise
        const isNoisy = this.#input.isOwnLatent && noisy;
        return isNoisy ? clean : addNoise(clean, sigma, seed, this.#decoder.latent_space.sigma_frame);
    }

    async #run() {
        const controller = new AbortController();
        this.#running = controller;
        this.#showButtons();
        try {
            await this.#decode(controller.signal);
        } catch (error) {
            if (this.#running !== controller) {
                return; // the view has changed
            }
            this.#compare.hideAfter();
            if (error instanceof ServerError) {
                this.#progress.textContent = "";
                this.#result.fail(error);
                this.#scrollToResult();
            } else if (error.name === "AbortError") {
                this.#result.clear();
                this.#progress.textContent = "Cancelled";
            } else {
                throw error;
            }
        } finally {
            if (this.#running === controller) {
                this.#running = null;
                this.#showButtons();
            }
        }
    }

    async #decode(signal) {
        const settings = this.#controls.read();
        const { sigma, steps, seed, format } = settings;
        const contentType = "application/x-npy";
        const body = new Blob([writeNpy(this.#latent(settings))], { type: contentType });
        const query = { ...decoderOptions(this.#info, this.#decoder), sigma, steps, seed, format };
        this.#compare.hideAfter();
        this.#result.begin(body, query, hasKey());
        this.#progress.textContent = "Decoding";
        this.#scrollToResult();
        const began = performance.now();
        const onPreview = (preview) => {
            signal.throwIfAborted(); // the preview may have arrived before
            this.#progress.textContent = `Step ${preview.step} of ${preview.steps}`;
            this.#result.preview(preview, performance.now() - began);
        };
        const image = await decode({ body, contentType, query: { ...query, preview: "steps" }, signal, onPreview });
        signal.throwIfAborted();
        const total = performance.now() - began;
        this.#result.finish(image, total, format);
        this.#progress.textContent = `Decoded in ${milliseconds(total)}`;
    }

    /** Scroll to the result if it is below or above the window, as on a phone. */
    #scrollToResult() {
        const { top } = this.#section.getBoundingClientRect();
        if (top < 0 || top > innerHeight / 2) {
            this.#section.scrollIntoView();
        }
    }

    #showButtons() {
        const isRunning = this.#running !== null;
        const [run, cancel] = ["#run", "#cancel"].map((id) => this.#form.querySelector(id));
        const hadFocus = [run, cancel].includes(document.activeElement);
        run.disabled = isRunning || this.#unavailable !== "";
        cancel.hidden = !isRunning;
        this.#form.querySelector("#run-reason").textContent = this.#unavailable;
        if (hadFocus) {
            const next = isRunning ? cancel : run; // a button that is disabled or hidden loses the focus
            next.focus({ preventScroll: true });
        }
    }
}
