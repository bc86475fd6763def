// The stages of a decode as a bar.

// Of the header Server-Timing, in the order in which they happen; the names are those of the style sheet.
const STAGES = {
    caption: "Caption",
    queue: "Waiting",
    condition: "Condition",
    denoise: "Steps",
    finish: "Finish",
    encode: "Encoding",
};

/** Show the stages in `Server-Timing`, and the rest of the time until the image was in the browser. */
export function showTiming(section, serverTiming, totalMs) {
    const stages = parse(serverTiming).filter(([name]) => name in STAGES);
    const rest = totalMs - stages.reduce((sum, [, duration]) => sum + duration, 0);
    const parts = stages.map(([name, duration]) => ({ name, label: STAGES[name], duration }));
    parts.push({ name: "rest", label: "Other", duration: Math.max(rest, 0) });
    section.querySelector("#total").textContent = milliseconds(totalMs);
    section.querySelector(".bar").replaceChildren(...parts.map(segment));
    section.querySelector("dl").replaceChildren(...parts.map(legend));
}

/** Return a duration as text with three digits. */
export function milliseconds(value) {
    if (value >= 1000) {
        return `${(value / 1000).toFixed(2)} s`;
    }
    return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function parse(serverTiming) {
    const entries = serverTiming.matchAll(/([\w-]+);dur=([\d.]+)/g);
    return Array.from(entries, ([, name, duration]) => [name, Number(duration)]);
}

function segment({ name, duration }) {
    const element = document.createElement("span");
    element.className = `stage-${name}`;
    element.style.flexGrow = duration;
    return element;
}

function legend({ name, label, duration }) {
    const [entry, term, value] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    entry.className = `stage-${name}`;
    term.textContent = label;
    value.textContent = milliseconds(duration);
    entry.append(term, value);
    return entry;
}
