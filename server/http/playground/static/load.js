// An open-loop load generator: requests are due at fixed times, whatever happened to earlier ones.

const TICK = 10; // milliseconds between looks at the clock
const PATIENCE = 0.1; // seconds for which a due request may wait for a free connection

/**
 * A run of requests at a fixed rate. `times` has the time of each event, in seconds since the start: of `offered` and
 * `unsent` requests when they were due, of the outcomes `onTime`, `late`, `rejected` and `failed` when they ended.
 */
export class OpenLoop {
    #next = 0; // index of the next request
    #inFlight = 0;
    #began = 0;
    #duration = null;
    #ended;

    /**
     * @param {number} rate requests per second
     * @param {number} seconds duration; requests that are open at the end are awaited
     * @param {number} connections maximum number of open requests; one that does not get a connection is not sent
     * @param {() => Promise<string>} send sends a request and returns its outcome, a key of `times`; never rejects
     */
    constructor({ rate, seconds, connections, send }) {
        Object.assign(this, { rate, seconds, connections, send });
        this.times = { offered: [], unsent: [], onTime: [], late: [], rejected: [], failed: [] };
    }

    /** Seconds since the start, until the last request has ended. */
    get elapsed() {
        return this.#duration ?? performance.now() / 1000 - this.#began;
    }

    /** Images on time per second since the start. */
    get goodput() {
        return this.times.onTime.length / this.elapsed;
    }

    get sent() {
        return this.times.offered.length - this.times.unsent.length;
    }

    /** Send the requests; resolves when the last one has ended. */
    async run() {
        this.#began = performance.now() / 1000;
        const timer = setInterval(() => this.#pump(), TICK);
        await new Promise((resolve) => {
            this.#ended = resolve;
            this.#pump();
        });
        clearInterval(timer);
        this.#duration = this.elapsed;
    }

    /** Let no further request become due. */
    stop() {
        this.seconds = Math.min(this.seconds, this.elapsed);
    }

    /** Return the events per second during the last `window` seconds before `time`. */
    rateAt(kind, time, window) {
        const start = Math.max(0, time - window);
        const count = this.times[kind].filter((event) => event >= start && event < time).length;
        return time > start ? count / (time - start) : 0;
    }

    #pump() {
        const { elapsed } = this;
        const end = Math.min(elapsed, this.seconds);
        for (let due = this.#next / this.rate; due < end; due = this.#next / this.rate) {
            const expired = elapsed - due > PATIENCE;
            if (!expired && this.#inFlight >= this.connections) {
                break;
            }
            this.#next += 1;
            this.times.offered.push(due);
            if (expired) {
                this.times.unsent.push(due);
            } else {
                this.#start();
            }
        }
        const isOver = elapsed >= this.seconds && this.#next / this.rate >= this.seconds;
        if (isOver && this.#inFlight === 0) {
            this.#ended();
        }
    }

    async #start() {
        this.#inFlight += 1;
        const outcome = await this.send();
        this.#inFlight -= 1;
        this.times[outcome].push(this.elapsed);
        this.#pump();
    }
}
