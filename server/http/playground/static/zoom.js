// Zoom and pan of the pixels in a box, with pointer, touch, keyboard and buttons.

const MAX_ZOOM = 8;
const PIXELS_VISIBLE = 4; // zoom from which single pixels are shown, not smoothed
const KEYS = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

/** The view of a box: a zoom factor and an offset, which the style sheet applies to its layers. */
export class Zoom {
    #box;
    #onChange;
    #zoom = 1;
    #x = 0; // of the left edge, in widths of the box
    #y = 0;

    /**
     * @param {HTMLElement} box gets the properties --zoom, --x and --y
     * @param {(zoom: number) => void} onChange called with each new zoom factor
     */
    constructor(box, onChange) {
        this.#box = box;
        this.#onChange = onChange;
        box.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
        box.addEventListener("dblclick", (event) => {
            this.at(event, this.#zoom < MAX_ZOOM ? this.#zoom * 2 : 1);
        });
        box.addEventListener("keydown", (event) => this.#key(event));
    }

    /** The zoom factor, from 1 to 8. */
    get factor() {
        return this.#zoom;
    }

    /** Set the zoom factor; the pixel under the pointer of `event` stays where it is, or the one in the centre. */
    at(event, factor) {
        const box = this.#box.getBoundingClientRect();
        const x = event ? (event.clientX - box.left) / box.width : 0.5;
        const y = event ? (event.clientY - box.top) / box.height : 0.5;
        const zoom = Math.min(Math.max(factor, 1), MAX_ZOOM);
        const change = zoom / this.#zoom;
        this.#set(zoom, x - (x - this.#x) * change, y - (y - this.#y) * change);
    }

    /** Move the view by widths and heights of the box. */
    pan(x, y) {
        this.#set(this.#zoom, this.#x + x, this.#y + y);
    }

    #set(zoom, x, y) {
        const clamp = (offset) => Math.min(Math.max(offset, 1 - zoom), 0);
        [this.#zoom, this.#x, this.#y] = [zoom, clamp(x), clamp(y)];
        this.#box.style.setProperty("--zoom", zoom);
        this.#box.style.setProperty("--x", `${100 * this.#x}%`);
        this.#box.style.setProperty("--y", `${100 * this.#y}%`);
        this.#box.classList.toggle("pixelated", zoom >= PIXELS_VISIBLE);
        this.#box.classList.toggle("zoomed", zoom > 1);
        this.#onChange(zoom);
    }

    /** Zoom with the wheel while Ctrl is pressed, which browsers also report for a pinch on a touchpad. */
    #wheel(event) {
        if (event.ctrlKey || event.metaKey) {
            event.preventDefault();
            this.at(event, this.#zoom * Math.exp(-event.deltaY / 200));
        }
    }

    #key(event) {
        if (event.ctrlKey || event.metaKey || event.altKey) {
            return; // a shortcut of the browser
        }
        const factor = { "+": this.#zoom * 2, "=": this.#zoom * 2, "-": this.#zoom / 2, 0: 1 }[event.key];
        if (factor !== undefined) {
            this.at(null, factor);
        } else if (this.#zoom > 1 && event.key in KEYS) {
            const [x, y] = KEYS[event.key];
            this.pan(x / 10, y / 10);
        } else {
            return;
        }
        event.preventDefault();
    }
}
