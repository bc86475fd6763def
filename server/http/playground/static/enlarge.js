// Bicubic enlargement, as torch.nn.functional.interpolate computes it.

const SHARPNESS = -0.75; // parameter of the cubic kernel (Keys 1981) in PyTorch

/** Return an image { height, width, data } enlarged by an integer factor. */
export function enlarge({ height, width, data }, factor) {
    const taps = phases(factor);
    const wide = enlargeLines(data, 3 * height, width, 1, width, factor, taps);
    const planes = [0, 1, 2].map((plane) => {
        const size = height * width * factor;
        const rows = wide.subarray(plane * size, (plane + 1) * size);
        return enlargeLines(rows, width * factor, height, width * factor, 1, factor, taps);
    });
    const enlarged = new Float32Array(3 * planes[0].length);
    planes.forEach((plane, index) => enlarged.set(plane, index * plane.length));
    return { height: height * factor, width: width * factor, data: enlarged };
}

/** Return the first of the four neighbours of each output position in a period, relative to it, and their weights. */
function phases(factor) {
    return Array.from({ length: factor }, (_, phase) => {
        const position = (phase + 0.5) / factor - 0.5;
        const first = Math.floor(position) - 1;
        return { first, weights: [0, 1, 2, 3].map((tap) => kernel(position - first - tap)) };
    });
}

function kernel(distance) {
    const x = Math.abs(distance);
    if (x <= 1) {
        return ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1;
    }
    return x < 2 ? SHARPNESS * (((x - 5) * x + 8) * x - 4) : 0;
}

/**
 * Enlarge lines of pixels; the edge pixels continue beyond the edges.
 *
 * @param {number} lines number of lines
 * @param {number} length pixels of a line
 * @param {number} stride distance of neighbours in a line, the same in the input and in the output
 * @param {number} next distance of the beginnings of two lines in the input; in the output, lines are as close as there
 */
function enlargeLines(input, lines, length, stride, next, factor, taps) {
    const output = new Float32Array(input.length * factor);
    const nextOutput = stride === 1 ? next * factor : next;
    const clamp = (index) => Math.min(Math.max(index, 0), length - 1) * stride;
    for (let index = 0; index < length; index++) {
        for (let phase = 0; phase < factor; phase++) {
            const { first, weights } = taps[phase];
            const [a, b, c, d] = [0, 1, 2, 3].map((tap) => clamp(index + first + tap));
            const to = (index * factor + phase) * stride;
            for (let line = 0; line < lines; line++) {
                const from = line * next;
                output[line * nextOutput + to] =
                    weights[0] * input[from + a] +
                    weights[1] * input[from + b] +
                    weights[2] * input[from + c] +
                    weights[3] * input[from + d];
            }
        }
    }
    return output;
}

/** Return an image { height, width, data } with values in [-1, 1] as pixels of a canvas. */
export function toImageData({ height, width, data }) {
    const pixels = new ImageData(width, height);
    const area = height * width;
    for (let index = 0; index < area; index++) {
        for (let plane = 0; plane < 3; plane++) {
            pixels.data[4 * index + plane] = (data[plane * area + index] + 1) * 127.5; // rounded and clamped
        }
        pixels.data[4 * index + 3] = 255;
    }
    return pixels;
}
