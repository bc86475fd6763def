// The settings of a decode.

const DISPLAYED = ["png", "webp", "jpeg", "avif"]; // formats that browsers show

/** The form fields for size, noise, steps, seed and format. */
export class Controls {
    #form;
    #sizes;

    /**
     * @param {HTMLFormElement} form
     * @param {object} info the document /info
     * @param {() => void} onChange called when a setting changes that changes the latent
     */
    constructor(form, info, onChange) {
        this.#form = form;
        const { size, format, sigma, seed, noisy } = form.elements;
        const formats = info.image_formats.filter((name) => DISPLAYED.includes(name));
        format.replaceChildren(...formats.map((name) => new Option(name.toUpperCase(), name)));
        const showSigma = () => {
            form.querySelector("#sigma-value").textContent = Number(sigma.value).toFixed(2);
        };
        sigma.addEventListener("input", () => {
            showSigma();
            onChange();
        });
        for (const field of [size, seed, noisy]) {
            field.addEventListener("change", onChange);
        }
        form.querySelector("#random-seed").addEventListener("click", () => {
            seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
            onChange();
        });
        showSigma(); // a browser may restore the value of a reloaded page
    }

    /** Offer the sizes of a decoder. */
    use({ sizes }) {
        this.#sizes = sizes;
        const options = sizes.map(({ output }, index) => new Option(`${output[1]} × ${output[0]}`, index));
        this.#form.elements.size.replaceChildren(...options);
    }

    /** Return { size, sigma, steps, seed, format, noisy }; `size` has the members `output` and `latent`. */
    read() {
        const { size, sigma, steps, seed, format, noisy } = this.#form.elements;
        return {
            size: this.#sizes[size.value],
            sigma: Number(sigma.value),
            steps: Number(steps.value),
            seed: seed.valueAsNumber,
            format: format.value,
            noisy: noisy.checked,
        };
    }

    /** Select a size; a latent from a file has only one. */
    chooseSize(size, isFixed) {
        const field = this.#form.elements.size;
        field.value = this.#sizes.indexOf(size);
        field.disabled = isFixed;
        this.#form.querySelector("#noisy-field").hidden = !isFixed;
    }
}
