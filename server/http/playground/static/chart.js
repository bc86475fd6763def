// A line chart in SVG. Colours and dashes are those of the style sheet, so that it follows the theme.

const SVG = "http://www.w3.org/2000/svg";

/** Lines over time. Screen readers skip them; the page has the same numbers as text. */
export class Chart {
    #paths;
    #grid;
    #scale;
    #ends;
    #formatValue;

    /**
     * @param {HTMLElement} container is filled with the chart
     * @param {string[]} series class of each line
     * @param {(value: number) => string} formatValue text of a tick on the y axis
     */
    constructor(container, series, formatValue) {
        this.#formatValue = formatValue;
        container.classList.add("chart");
        container.setAttribute("aria-hidden", "true");
        const plot = svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none" });
        this.#grid = svg("path", { class: "grid" });
        this.#paths = series.map((name) => svg("path", { class: `line ${name}` }));
        plot.append(this.#grid, ...this.#paths);
        this.#scale = div("scale");
        this.#ends = [div("end"), div("end")];
        const axis = div("axis");
        axis.append(...this.#ends);
        container.replaceChildren(plot, this.#scale, axis);
    }

    /**
     * Draw the lines.
     * @param {[number, number][][]} lines points (time, value) of each series, times ascending; NaN interrupts a line
     * @param {{ from: number, to: number, names: [string, string] }} axis first and last time, and their names
     * @param {number} least upper end of the y axis if all values are smaller
     */
    draw(lines, axis, least) {
        const values = lines.flat().map(([, value]) => value);
        const ticks = ticksUpTo(Math.max(least, ...values.filter(Number.isFinite)));
        const top = ticks.at(-1);
        const x = (time) => ((time - axis.from) / (axis.to - axis.from)).toFixed(4);
        const y = (value) => (1 - value / top).toFixed(4);
        this.#paths.forEach((path, index) => path.setAttribute("d", outline(lines[index], x, y)));
        this.#grid.setAttribute("d", ticks.map((tick) => `M0 ${y(tick)}H1`).join(""));
        this.#scale.replaceChildren(...ticks.map((tick) => this.#tick(tick, tick / top)));
        this.#ends.forEach((end, index) => {
            end.textContent = axis.names[index];
        });
    }

    #tick(value, height) {
        const label = div("tick");
        label.textContent = this.#formatValue(value);
        label.style.bottom = `${100 * height}%`;
        return label;
    }
}

/** Return ticks from 0 to the first round number that is at least `value`, which is above 0. */
export function ticksUpTo(value) {
    const magnitude = 10 ** Math.floor(Math.log10(value));
    const candidates = [1, 2, 3, 4, 5, 6, 8, 10].map((factor) => factor * magnitude);
    const top = candidates.find((each) => each >= value * (1 - 1e-9));
    return [0, top / 2, top];
}

function outline(points, x, y) {
    let [path, command] = ["", "M"];
    for (const [time, value] of points) {
        const known = Number.isFinite(value);
        if (known) path += `${command}${x(time)} ${y(value)}`;
        command = known ? "L" : "M";
    }
    return path;
}

function svg(name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) {
        element.setAttribute(attribute, value);
    }
    return element;
}

function div(name) {
    const element = document.createElement("div");
    element.className = name;
    return element;
}
