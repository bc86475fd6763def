// The state of the server, asked for again and again while the page is visible.

import { getReadiness, ServerError } from "./client.js";

const UNTIL_READY = 1000; // milliseconds between two requests
const WHILE_READY = 5000;
const TEXTS = {
    ready: "Ready",
    starting: "The server is starting",
    stalled: "A device of the server is stalled",
    draining: "The server is shutting down",
    failed: "The server has failed and will restart",
    unreachable: "The server cannot be reached",
};

/** The state of the server, shown in `element`. */
export class Status {
    #element;
    #state = "";
    #listeners = [];

    constructor(element) {
        this.#element = element;
        this.#watch();
    }

    /** Call `listener` with (isReady, text) once the state is known, and whenever it changes. */
    onChange(listener) {
        this.#listeners.push(listener);
        if (this.#state !== "") {
            listener(this.#state === "ready", TEXTS[this.#state]);
        }
    }

    /** Return when the server is ready. */
    ready() {
        return new Promise((resolve) => this.onChange((isReady) => isReady && resolve()));
    }

    async #watch() {
        for (;;) {
            const state = await currentState();
            if (state !== this.#state) {
                this.#change(state);
            }
            await new Promise((resolve) => setTimeout(resolve, state === "ready" ? WHILE_READY : UNTIL_READY));
            await visible();
        }
    }

    #change(state) {
        this.#state = state;
        this.#element.dataset.state = state;
        this.#element.querySelector(".text").textContent = TEXTS[state];
        this.#listeners.forEach((listener) => listener(state === "ready", TEXTS[state]));
    }
}

async function currentState() {
    try {
        const { state } = await getReadiness();
        return state in TEXTS ? state : "unreachable"; // a proxy may respond instead of the server
    } catch (error) {
        if (error instanceof ServerError) {
            return "unreachable";
        }
        throw error;
    }
}

function visible() {
    if (document.visibilityState === "visible") {
        return undefined;
    }
    return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}
