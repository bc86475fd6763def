// Live figures of the server, from /metrics once per second while the page is visible.

import { Chart } from "./chart.js";
import { getMetrics, ServerError } from "./client.js";
import { element } from "./dom.js";
import { quantile, rate } from "./prometheus.js";
import { formatBytes, formatNumber, formatRate, formatSeconds } from "./units.js";

const INTERVAL = 1; // seconds between scrapes
const LONGEST_PAUSE = 30; // seconds between attempts while scrapes fail
const SHOWN = 120; // seconds in the charts
const GAP = 5; // seconds between scrapes that interrupt the lines, such as those for which the page was hidden
const RATE_WINDOW = 5; // seconds over which rates are averaged
const LATENCY_WINDOW = 30; // seconds over which quantiles are estimated

const gauge = (name) => (history) => history.last.sum(name);
const perSecond = (name, where) => (history) => rate(history.before(RATE_WINDOW), history.last, name, where);
const latency = (q) => (history) =>
    quantile(q, history.before(LATENCY_WINDOW), history.last, "pid_request_seconds", { code: "200" });
const memory = ({ last }) => {
    const isKnown = last.select("pid_memory_bytes", { kind: "used" }).length > 0; // some drivers do not report it
    return isKnown ? last.sum("pid_memory_bytes", { kind: "used" }) : NaN;
};

// `least` is the upper end of the y axis while all values are smaller.
const FIGURES = [
    {
        title: "Images",
        note: "on the server now",
        lines: { waiting: gauge("pid_queue_images"), running: gauge("pid_running_images") },
        format: formatNumber,
        least: 4,
    },
    {
        title: "Predicted wait",
        note: "work of all accepted images",
        lines: { "per device": gauge("pid_backlog_seconds") },
        format: formatSeconds,
        least: 1,
    },
    {
        title: "Latency",
        note: `successful requests of the last ${LATENCY_WINDOW} s, estimated from a histogram`,
        lines: { p50: latency(0.5), p99: latency(0.99) },
        format: formatSeconds,
        least: 1,
    },
    {
        title: "Goodput",
        note: "images delivered before their deadline",
        lines: { "on time": perSecond("pid_image_outcomes_total", { outcome: "in-time" }) },
        format: formatRate,
        least: 1,
    },
    {
        title: "Rejections",
        note: "requests rejected because the server is busy",
        lines: { "status 429": perSecond("pid_requests_total", { code: "429" }) },
        format: formatRate,
        least: 1,
    },
    {
        title: "Memory",
        note: "of the GPUs, or of the process if it decodes on the CPU",
        lines: { used: memory },
        format: formatBytes,
        least: 1e8,
    },
];

/** Scrapes of the last seconds: those that the windows of rates and quantiles need. */
class History {
    #scrapes = [];

    add(scrape) {
        this.#scrapes.push(scrape);
        while (this.#scrapes.length > 2 && scrape.at - this.#scrapes[1].at >= LATENCY_WINDOW) {
            this.#scrapes.shift();
        }
    }

    get last() {
        return this.#scrapes.at(-1);
    }

    /** Return the newest scrape that is at least `seconds` older than the last one, or the oldest. */
    before(seconds) {
        return this.#scrapes.findLast((scrape) => this.last.at - scrape.at >= seconds) ?? this.#scrapes[0];
    }
}

/** One figure on the page: title, numbers, chart and note. */
class Figure {
    #numbers;
    #chart;
    #points;

    constructor(figure) {
        this.figure = figure;
        const names = Object.keys(figure.lines);
        this.#numbers = names.map(() => element("dd", {}, "–"));
        this.#points = names.map(() => []);
        const rows = names.map((name, index) => {
            const key = element("span", { className: `key line-${index + 1}` });
            return element("div", {}, element("dt", {}, key, name), this.#numbers[index]);
        });
        const plot = element("div");
        this.#chart = new Chart(plot, names.map((_, index) => `line-${index + 1}`), figure.format);
        this.element = element(
            "article",
            { className: "figure" },
            element("h3", {}, figure.title),
            element("dl", {}, ...rows),
            plot,
            element("p", { className: "note" }, figure.note),
        );
    }

    update(history) {
        const { format, least, lines } = this.figure;
        const { at } = history.last;
        Object.values(lines).forEach((read, index) => {
            const value = read(history);
            this.#numbers[index].textContent = format(value);
            const points = this.#points[index].filter(([time]) => time >= at - SHOWN);
            if (points.length > 0 && at - points.at(-1)[0] > GAP) {
                points.push([at, NaN]);
            }
            this.#points[index] = [...points, [at, value]];
        });
        this.#chart.draw(this.#points, { from: at - SHOWN, to: at, names: ["2 min ago", "now"] }, least);
    }
}

/** Fill the section with the figures, and keep them up to date. */
export function mount(section) {
    const status = element("p", { id: "figures-status" });
    status.setAttribute("role", "status");
    const figures = FIGURES.map((figure) => new Figure(figure));
    section.append(status, element("div", { className: "figures" }, ...figures.map((figure) => figure.element)));
    poll(figures, status);
}

async function poll(figures, status) {
    const history = new History();
    for (let pause = INTERVAL; ; ) {
        await whenVisible();
        const began = performance.now() / 1000;
        try {
            history.add(await getMetrics(began));
            for (const figure of figures) {
                figure.update(history);
            }
            pause = INTERVAL;
            status.textContent = "";
        } catch (error) {
            if (!(error instanceof ServerError)) {
                throw error;
            }
            pause = Math.min(2 * pause, LONGEST_PAUSE);
            const problem = history.last === undefined ? "/metrics is not available." : "The figures are out of date.";
            status.textContent = `${problem} ${error.detail}`;
        }
        await sleep(began + pause - performance.now() / 1000);
    }
}

function whenVisible() {
    return new Promise((resolve) => {
        const check = () => {
            if (document.visibilityState !== "visible") {
                return;
            }
            document.removeEventListener("visibilitychange", check);
            resolve();
        };
        document.addEventListener("visibilitychange", check);
        check();
    });
}

function sleep(seconds) {
    return new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
}
