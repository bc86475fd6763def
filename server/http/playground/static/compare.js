// Two images on top of each other, with a divider between them that people can move.

import { Zoom } from "./zoom.js";

const GRIP = 28; // pixels next to the divider from which it can be dragged when the images are zoomed
const CLICK = 4; // pixels that a pointer may move during a click

/** The comparison of the latent, enlarged, with the decoded image. */
export class Compare {
    #section;
    #stage;
    #before;
    #after;
    #split;
    #zoom;
    #pointers = new Map(); // positions of the pressed pointers, by id
    #pressed; // where the last press was
    #drag = "click"; // until the pointer has moved, then "split" or "pan"

    /** Find the images, the divider and the buttons in `section`. */
    constructor(section) {
        this.#section = section;
        this.#stage = section.querySelector(".stage");
        this.#before = section.querySelector("#before");
        this.#after = section.querySelector("#after");
        this.#split = section.querySelector("#split");
        const level = section.querySelector("#zoom-level");
        this.#zoom = new Zoom(this.#stage, (zoom) => {
            level.textContent = `${Math.round(100 * zoom)} %`;
        });
        section.querySelector("#zoom-in").addEventListener("click", () => this.#zoom.at(null, this.#zoom.factor * 2));
        section.querySelector("#zoom-out").addEventListener("click", () => this.#zoom.at(null, this.#zoom.factor / 2));
        section.querySelector("#zoom-reset").addEventListener("click", () => this.#zoom.at(null, 1));
        this.#split.addEventListener("input", () => this.#followSplit());
        this.#stage.addEventListener("pointerdown", (event) => this.#press(event));
        this.#stage.addEventListener("pointermove", (event) => this.#move(event));
        for (const end of ["pointerup", "pointercancel"]) {
            this.#stage.addEventListener(end, (event) => this.#release(event));
        }
    }

    /**
     * Show a latent, without a decoded image.
     *
     * @param {ImageData} pixels
     * @param {string} name of this view
     * @param {number[]} size [height, width] of the decoded image
     */
    showBefore(pixels, name, [height, width]) {
        this.#before.width = pixels.width;
        this.#before.height = pixels.height;
        this.#before.getContext("2d").putImageData(pixels, 0, 0);
        this.#before.setAttribute("aria-label", name);
        this.#stage.querySelector("#before-name").textContent = name;
        this.#section.style.setProperty("--ratio", width / height);
        this.hideAfter();
    }

    /** Show only the latent. */
    hideAfter() {
        this.#after.removeAttribute("src");
        this.#setDecoded(false);
    }

    /** Show a decoded image or a preview over the latent. The first one is revealed with a moving divider. */
    async showAfter(address, name) {
        this.#after.src = address;
        this.#after.alt = name;
        this.#stage.querySelector("#after-name").textContent = name;
        await this.#after.decode().catch(() => {}); // fails if another image has replaced it, or none
        if (this.#after.hidden && this.#after.getAttribute("src") === address) {
            this.#setDecoded(true);
            this.#reveal();
        }
    }

    #setDecoded(isDecoded) {
        for (const element of [this.#after, this.#split, ...this.#stage.querySelectorAll(".decoded")]) {
            element.hidden = !isDecoded;
        }
    }

    #reveal() {
        this.#split.value = 100;
        this.#showSplit();
        this.#stage.getBoundingClientRect(); // starts the transition from here
        this.#stage.classList.add("revealing");
        this.#split.value = 50;
        this.#showSplit();
    }

    /** Show the divider where the person has moved it, without a transition. */
    #followSplit() {
        this.#stage.classList.remove("revealing");
        this.#showSplit();
    }

    #showSplit() {
        this.#stage.style.setProperty("--split", `${this.#split.value}%`);
    }

    #press(event) {
        if (event.button !== 0) {
            return;
        }
        this.#stage.setPointerCapture(event.pointerId);
        this.#pointers.set(event.pointerId, event);
        this.#pressed = event;
        this.#drag = "click";
    }

    #release(event) {
        this.#pointers.delete(event.pointerId);
        [this.#pressed] = this.#pointers.values(); // after a pinch, the other finger
        this.#drag = "click";
    }

    /** Return what a drag from the last press moves. */
    #dragged() {
        const box = this.#stage.getBoundingClientRect();
        const distance = Math.abs(this.#pressed.clientX - box.left - (box.width * this.#split.value) / 100);
        return this.#zoom.factor > 1 && (this.#split.hidden || distance > GRIP) ? "pan" : "split";
    }

    #move(event) {
        const last = this.#pointers.get(event.pointerId);
        if (last === undefined || (this.#drag === "click" && distance(event, this.#pressed) < CLICK)) {
            return;
        }
        if (this.#drag === "click") {
            this.#drag = this.#dragged();
        }
        const box = this.#stage.getBoundingClientRect();
        if (this.#pointers.size === 2) {
            this.#pinch(event, last);
        } else if (this.#drag === "pan") {
            this.#zoom.pan((event.clientX - last.clientX) / box.width, (event.clientY - last.clientY) / box.height);
        } else if (!this.#split.hidden && !isScroll(event, last)) {
            this.#split.value = (100 * (event.clientX - box.left)) / box.width;
            this.#followSplit();
        }
        this.#pointers.set(event.pointerId, event);
    }

    #pinch(event, last) {
        const other = [...this.#pointers.values()].find(({ pointerId }) => pointerId !== event.pointerId);
        const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
        this.#zoom.at(middle, (this.#zoom.factor * distance(event, other)) / Math.max(distance(last, other), 1));
    }
}

function distance(a, b) {
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
}

/** Return whether a finger moves up or down: until the browser scrolls, the page gets its moves. */
function isScroll(event, last) {
    const [x, y] = [event.clientX - last.clientX, event.clientY - last.clientY].map(Math.abs);
    return event.pointerType === "touch" && y >= x;
}
