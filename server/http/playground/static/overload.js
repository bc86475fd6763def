// Sends more requests than the server can serve, and shows what it does with them.

import { capacity, decodeSeconds, encodeSeconds } from "./capacity.js";
import { Chart } from "./chart.js";
import { decode, getJson, ServerError } from "./client.js";
import { decoderOptions } from "./decoders.js";
import { element } from "./dom.js";
import { randomLatent, toFloat16 } from "./latents.js";
import { OpenLoop } from "./load.js";
import { formatNumber, formatRate, formatSeconds, NBSP } from "./units.js";

const SECONDS = 20;
const FORMAT = "jpeg"; // small and quick to encode, so that neither the browser nor the encoder is the bottleneck
const QUALITY = 50;
const CONNECTIONS = 4; // of the 6 that browsers open to one server; the others are for the rest of the page
const SLACK = 3; // decode times that the deadline leaves for waiting, so that few accepted requests are open at once
const CALIBRATION = 2; // seconds of decodes before a run
const UPDATE = 500; // milliseconds
const FIRST = 1; // seconds until there are enough requests for a rate
const WINDOW = 3; // seconds over which the rates in the chart are averaged

const KINDS = ["offered", "onTime", "rejected"]; // in the chart

/** Let the person overload the server that the document `info` describes; return a function that chooses a decoder. */
export function mount(section, info) {
    const byId = (id) => section.querySelector(`#overload-${id}`);
    const [size, load, button] = [byId("size"), byId("load"), byId("start")];
    const view = new View(section, byId);
    let decoder = null;
    let target = null;
    let run = null;

    const showTarget = () => view.showTarget(target, Number(load.value));
    const update = async () => {
        const { costs } = await getJson("info");
        target = new Target({ ...info, costs }, decoder, size.value.split(",").map(Number));
        showTarget();
    };
    const calibrate = async () => {
        view.showStatus("Measuring the capacity.");
        await new Sender(target).calibrate();
        await update();
    };
    const overload = async () => {
        size.disabled = load.disabled = button.disabled = true;
        if ((await view.report(update)) && (await view.report(calibrate))) {
            const sender = new Sender(target);
            const rate = Number(load.value) * target.capacity;
            run = new OpenLoop({ rate, seconds: SECONDS, connections: CONNECTIONS, send: () => sender.send() });
            button.textContent = "Stop";
            button.disabled = false;
            await view.follow(run, sender, target);
            run = null;
            button.textContent = "Start";
        }
        size.disabled = load.disabled = button.disabled = false;
    };
    size.addEventListener("change", () => view.report(update));
    load.addEventListener("input", () => target !== null && showTarget());
    byId("form").addEventListener("submit", (event) => {
        event.preventDefault();
        if (run === null) {
            overload();
        } else {
            run.stop();
        }
    });
    return (chosen) => {
        decoder = chosen;
        size.replaceChildren(...decoder.sizes.map(sizeOption));
        run?.stop();
        view.report(update);
    };
}

/** Chart, totals and messages of the section. */
class View {
    #byId;
    #chart;
    #totals;

    constructor(section, byId) {
        this.#byId = byId;
        this.#chart = new Chart(byId("chart"), ["offered", "goodput", "rejected", "capacity"], formatNumber);
        this.#totals = section.querySelectorAll("[data-total]");
    }

    showStatus(text) {
        this.#byId("status").textContent = text;
    }

    /** Run `action`; if the server cannot be used, show the reason and return false. */
    async report(action) {
        try {
            await action();
            this.showStatus("");
            return true;
        } catch (error) {
            if (!(error instanceof ServerError)) {
                throw error;
            }
            this.showStatus(error.detail);
            return false;
        }
    }

    showTarget({ options, capacity: images, devices, deadline }, factor) {
        const rate = `${factor} × the capacity: ${formatRate(factor * images)}`;
        this.#byId("rate").textContent = rate;
        this.#byId("load").setAttribute("aria-valuetext", rate);
        const by = options.decoder ? ` with the decoder ${options.decoder}` : "";
        this.#byId("facts").textContent =
            `Capacity: ${formatNumber(images)}${NBSP}images/s on ${devices} ${devices === 1 ? "device" : "devices"}` +
            `${by}, predicted from measured costs. Each request has a deadline of ${formatSeconds(deadline)}.`;
    }

    /** Start the run and show its progress until it has ended. */
    async follow(run, sender, target) {
        const lines = KINDS.map(() => []);
        const show = () => {
            const time = run.elapsed;
            if (time >= FIRST && time <= SECONDS) {
                KINDS.forEach((kind, index) => lines[index].push([time, run.rateAt(kind, time, WINDOW)]));
            }
            this.#draw(lines, target.capacity);
            this.#showTotals(run, sender, target);
        };
        this.#byId("results").hidden = false;
        this.showStatus("Sending requests.");
        const timer = setInterval(show, UPDATE);
        await run.run();
        clearInterval(timer);
        show();
        this.showStatus(summary(run, sender, target));
    }

    #draw(lines, capacity) {
        const level = [[0, capacity], [SECONDS, capacity]];
        this.#chart.draw([...lines, level], { from: 0, to: SECONDS, names: ["0 s", `${SECONDS} s`] }, capacity);
    }

    #showTotals(run, sender, target) {
        const counts = Object.entries(run.times).map(([kind, times]) => [kind, times.length]);
        const values = {
            ...Object.fromEntries(counts),
            sent: run.sent,
            retryAfter: formatSeconds(sender.retryAfter),
            goodput: `${formatNumber(run.goodput)}${NBSP}images/s`,
            share: percentage(run.goodput / target.capacity),
        };
        for (const cell of this.#totals) {
            cell.textContent = values[cell.dataset.total];
        }
    }
}

/** What the page knows about the server, and what that means for a run with images of `size` of a decoder. */
class Target {
    constructor(info, decoder, size) {
        const { latent } = decoder.sizes.find(({ output }) => output.join() === size.join());
        const output = { decoder: decoder.name, size };
        this.options = decoderOptions(info, decoder);
        this.devices = info.devices;
        this.shape = [decoder.latent_space.channels, ...latent];
        this.capacity = capacity(info, output); // images per second
        this.deadline = encodeSeconds(info, output, FORMAT) + (1 + SLACK) * decodeSeconds(info, output); // seconds
    }
}

/** Requests for random latents to one target. */
class Sender {
    retryAfter = NaN; // seconds, of the last rejection
    error = ""; // of the last request that failed

    constructor({ options, shape, deadline }) {
        this.deadline = deadline;
        this.body = toFloat16(randomLatent(shape, 0).data);
        this.query = {
            ...options,
            shape: shape.join(),
            dtype: "float16",
            format: FORMAT,
            quality: QUALITY,
            priority: "batch",
            deadline_ms: Math.round(1000 * deadline),
        };
    }

    /** Decode one image after the other for a while, so that the server's estimates of its costs are current. */
    async calibrate() {
        const end = performance.now() + 1000 * CALIBRATION;
        do {
            await this.send();
        } while (performance.now() < end);
    }

    /** Send one request and return its outcome. */
    async send() {
        const began = performance.now();
        try {
            await decode({ body: this.body, contentType: "application/octet-stream", query: this.query });
            return performance.now() - began <= 1000 * this.deadline ? "onTime" : "late";
        } catch (error) {
            if (!(error instanceof ServerError)) {
                throw error;
            }
            if (error.status === 429) {
                this.retryAfter = error.retryAfter;
                return "rejected";
            }
            if (error.status === 504) {
                return "late";
            }
            this.error = error.detail;
            return "failed";
        }
    }
}

function summary(run, sender, target) {
    const { offered, rejected, failed } = run.times;
    const sent = `Sent ${run.sent} of ${offered.length} requests.`;
    const share = percentage(run.goodput / target.capacity);
    const goodput = `Goodput: ${formatNumber(run.goodput)}${NBSP}images/s, ${share} of the capacity.`;
    const failures = failed.length === 0 ? "" : ` ${failed.length} failed: ${sender.error}`;
    return `${sent} ${goodput} ${rejected.length} were rejected.${failures}`;
}

function percentage(share) {
    return `${Math.round(100 * share)}${NBSP}%`;
}

function sizeOption({ output: [height, width] }) {
    return element("option", { value: `${height},${width}` }, `${width} × ${height}`);
}
