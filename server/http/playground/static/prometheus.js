// Reads the text format of Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/

const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?\s*/y;
const NAME = /[a-zA-Z_:][a-zA-Z0-9_:]*/y;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** The samples of one scrape. */
export class Scrape {
    /**
     * @param {string} text response of /metrics
     * @param {number} at time of the scrape in seconds, on any clock
     */
    constructor(text, at) {
        this.at = at;
        this.samples = new Map(); // [{ labels, value }] by name
        for (const line of text.split("\n")) {
            if (line.trim() === "" || line.startsWith("#")) {
                continue;
            }
            const { name, labels, value } = parseSample(line);
            if (!this.samples.has(name)) {
                this.samples.set(name, []);
            }
            this.samples.get(name).push({ labels, value });
        }
    }

    /** Return the samples of `name` that have all labels of `where`; an empty array if there are none. */
    select(name, where = {}) {
        const wanted = Object.entries(where);
        const samples = this.samples.get(name) ?? [];
        return samples.filter(({ labels }) => wanted.every(([label, value]) => labels[label] === value));
    }

    /** Return the sum over the samples that `select` returns; 0 if there are none. */
    sum(name, where = {}) {
        return this.select(name, where).reduce((total, { value }) => total + value, 0);
    }

    /** Return the cumulative buckets of a histogram as a Map from upper bound to count, bounds ascending. */
    buckets(name, where = {}) {
        const counts = new Map();
        for (const { labels, value } of this.select(`${name}_bucket`, where)) {
            const bound = parseValue(labels.le);
            counts.set(bound, (counts.get(bound) ?? 0) + value);
        }
        return new Map([...counts].sort(([a], [b]) => a - b));
    }
}

/** Return the increase of a counter per second between two scrapes. After a restart it counts from zero. */
export function rate(before, after, name, where = {}) {
    const [first, last] = [before.sum(name, where), after.sum(name, where)];
    return (last < first ? last : last - first) / (after.at - before.at);
}

/**
 * Return the quantile `q` of what a histogram observed between two scrapes, by linear interpolation in its bucket as
 * Prometheus' histogram_quantile() does; NaN if nothing was observed.
 */
export function quantile(q, before, after, name, where = {}) {
    const last = after.buckets(name, where);
    let first = before.buckets(name, where);
    if ((first.get(Infinity) ?? 0) > (last.get(Infinity) ?? 0)) { // the server was restarted
        first = new Map();
    }
    const counts = [...last].map(([bound, count]) => [bound, count - (first.get(bound) ?? 0)]);
    const total = counts.at(-1)?.[1] ?? 0;
    if (!(total > 0)) {
        return NaN;
    }
    const rank = q * total;
    const index = counts.findIndex(([, count]) => count >= rank && count > 0);
    const [low, below] = index > 0 ? counts[index - 1] : [0, 0];
    const [high, count] = counts[index];
    return high === Infinity ? low : low + ((high - low) * (rank - below)) / (count - below);
}

function parseSample(line) {
    const name = match(NAME, line, 0);
    const labels = {};
    let end = skipSpaces(line, NAME.lastIndex);
    if (line[end] === "{") {
        end = skipSpaces(line, end + 1);
        while (line[end] !== "}") {
            const [, label, value] = match(LABEL, line, end);
            labels[label] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
            end = LABEL.lastIndex;
        }
        end += 1;
    }
    const [value] = line.slice(end).trim().split(/\s+/); // a time stamp may follow
    return { name: name[0], labels, value: parseValue(value) };
}

function match(pattern, line, start) {
    pattern.lastIndex = start;
    const found = pattern.exec(line);
    if (found === null) throw new SyntaxError(`not a sample of Prometheus' text format: ${line}`);
    return found;
}

function skipSpaces(line, start) {
    let end = start;
    while (line[end] === " " || line[end] === "\t") {
        end += 1;
    }
    return end;
}

function parseValue(text) {
    if (text === "NaN") {
        return NaN;
    }
    const unsigned = text.replace(/^[+-]/, "");
    if (unsigned === "Inf") {
        return text[0] === "-" ? -Infinity : Infinity;
    }
    const value = Number(text);
    if (text === "" || Number.isNaN(value)) throw new SyntaxError(`not a number of Prometheus' text format: ${text}`);
    return value;
}
