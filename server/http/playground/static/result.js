// What a decode shows apart from the image: its steps, its duration, code for the same request, or an error.

import { describeProblem } from "./problems.js";
import { imageName, snippets } from "./snippets.js";
import { milliseconds, showTiming } from "./timing.js";

/** The results of the current decode. */
export class Result {
    #section;
    #show;
    #retry;
    #steps;
    #urls = []; // of blobs, until the next decode
    #countdown = 0;

    /**
     * @param {HTMLElement} section
     * @param {(address: string, name: string) => void} show shows an image large
     * @param {() => void} retry called when the person retries after an error
     */
    constructor(section, show, retry) {
        this.#section = section;
        this.#show = show;
        this.#retry = retry;
        this.#steps = section.querySelector("#steps");
        this.#retryButton.addEventListener("click", () => this.#retry());
        this.#code.addEventListener("click", (event) => this.#copy(event));
    }

    get #problem() {
        return this.#section.querySelector("#problem");
    }

    get #code() {
        return this.#section.querySelector("#code");
    }

    get #retryButton() {
        return this.#section.querySelector("#retry");
    }

    /** Remove the results of the last decode. */
    clear() {
        clearInterval(this.#countdown);
        this.#urls.forEach((url) => URL.revokeObjectURL(url));
        this.#urls = [];
        this.#steps.replaceChildren();
        const done = this.#section.querySelectorAll(".done");
        for (const element of [this.#steps, this.#problem, this.#code, ...done]) {
            element.hidden = true;
        }
    }

    /**
     * Make room for the images of a decode, and show code for it.
     *
     * @param {Blob} latent body of the request
     * @param {Object<string, string|number>} query options of the request
     * @param {boolean} needsKey the server requires an API key
     */
    begin(latent, query, needsKey) {
        this.clear();
        const names = Array.from({ length: query.steps }, (_, index) => `Step ${index + 1}`);
        this.#steps.replaceChildren(...[...names, "Image"].map(thumbnail));
        this.#steps.hidden = false;
        const url = new URL(".", document.baseURI).href.replace(/\/$/, "");
        for (const [name, text] of Object.entries(snippets(url, query, needsKey))) {
            this.#code.querySelector(`#${name}`).textContent = text;
        }
        this.#code.querySelector("#latent-link").href = this.#address(latent);
        this.#code.hidden = false;
    }

    /** Show the preview of a step, which arrived after `latencyMs`. */
    preview({ step, steps, blob }, latencyMs) {
        this.#fill(this.#steps.children[step - 1], blob, latencyMs, `Step ${step} of ${steps}`);
    }

    /** Show the image of a decode that took `totalMs` until it was in the browser. */
    finish({ blob, serverTiming }, totalMs, format) {
        const address = this.#fill(this.#steps.lastElementChild, blob, totalMs, "Decoded");
        const skipped = this.#steps.querySelectorAll("li:has(:disabled)"); // previews that the server did not send
        skipped.forEach((item) => item.remove());
        const link = this.#section.querySelector("#image-link");
        [link.href, link.download] = [address, imageName(format)];
        showTiming(this.#section.querySelector("#timing"), serverTiming, totalMs);
        for (const element of this.#section.querySelectorAll(".done")) {
            element.hidden = false;
        }
    }

    /** Show an error that the server reported. */
    fail(error) {
        const { title, detail, requestId, retryAfter } = describeProblem(error);
        this.#problem.querySelector("h3").textContent = title;
        this.#problem.querySelector(".detail").textContent = detail;
        this.#problem.querySelector(".request").hidden = !requestId;
        this.#problem.querySelector("code").textContent = requestId;
        this.#problem.hidden = false;
        this.#steps.hidden = true;
        this.#countDown(retryAfter ?? 0);
    }

    #countDown(seconds) {
        clearInterval(this.#countdown);
        const end = performance.now() + 1000 * seconds;
        const show = () => {
            const left = Math.ceil((end - performance.now()) / 1000);
            this.#retryButton.disabled = left > 0;
            this.#retryButton.textContent = left > 0 ? `Retry in ${left} s` : "Retry";
            if (left <= 0) {
                clearInterval(this.#countdown);
            }
        };
        this.#countdown = setInterval(show, 250);
        show();
    }

    #address(blob) {
        const address = URL.createObjectURL(blob);
        this.#urls.push(address);
        return address;
    }

    /** Put an image into its place among the steps, and show it large; return its address. */
    #fill(item, blob, latencyMs, name) {
        const address = this.#address(blob);
        const button = item.querySelector("button");
        const image = new Image();
        image.alt = "";
        image.src = address;
        button.querySelector(".thumbnail").replaceChildren(image);
        button.querySelector(".latency").textContent = milliseconds(latencyMs);
        button.disabled = false;
        button.addEventListener("click", () => this.#select(button, address, name));
        this.#select(button, address, name);
        return address;
    }

    #select(button, address, name) {
        for (const other of this.#steps.querySelectorAll("button")) {
            other.setAttribute("aria-pressed", other === button);
        }
        this.#show(address, name);
    }

    #copy(event) {
        const button = event.target.closest("[data-copy]");
        if (button === null || button.textContent === "Copied") {
            return;
        }
        getSelection().selectAllChildren(this.#section.querySelector(`#${button.dataset.copy}`));
        if (!document.execCommand("copy")) { // navigator.clipboard exists only with HTTPS or on this machine
            return; // the text is selected, so that the person can copy it
        }
        const { ariaLabel } = button;
        button.textContent = button.ariaLabel = "Copied";
        setTimeout(() => {
            button.textContent = "Copy";
            button.ariaLabel = ariaLabel;
        }, 2000);
    }
}

function thumbnail(name) {
    const item = document.getElementById("step-template").content.cloneNode(true).firstElementChild;
    item.querySelector(".name").textContent = name;
    return item;
}
