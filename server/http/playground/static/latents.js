// Latents in the browser: the transform of the bundled decoder, noise, and float16.
//
// A latent is { shape: [channels, height, width], data: Float32Array }. An image is { height, width, data } with planes
// of red, green and blue in [-1, 1].

const LARGEST_HALF = 65504;

/** The latent space `dct`: a block of a low-resolution image is one cell, by a linear map that the server describes. */
export class Dct {
    #block;
    #channels;
    #analysis;
    #synthesis;

    /** Create the transform from the document dct.json. */
    constructor({ block, channels, analysis, synthesis }) {
        this.#block = block;
        this.#channels = channels;
        this.#analysis = analysis;
        this.#synthesis = synthesis;
    }

    /** Return the latent of an image whose sides are multiples of the block. */
    encode(image) {
        const [height, width] = [image.height / this.#block, image.width / this.#block];
        const data = new Float32Array(this.#channels * height * width);
        this.#forEachPair(height, width, image, (cell, pixel, weight) => {
            data[cell] += this.#analysis[weight] * image.data[pixel];
        });
        return { shape: [this.#channels, height, width], data };
    }

    /** Return the low-resolution image of a latent, not clamped. */
    decode({ shape, data }) {
        const [, height, width] = shape;
        const image = { height: height * this.#block, width: width * this.#block };
        image.data = new Float32Array(3 * image.height * image.width);
        this.#forEachPair(height, width, image, (cell, pixel, weight) => {
            image.data[pixel] += this.#synthesis[weight] * data[cell];
        });
        return image;
    }

    /** Call `visit` with the indices of each latent value, of each pixel in its block, and of the weight of the two. */
    #forEachPair(height, width, image, visit) {
        const block = this.#block;
        for (let channel = 0, weight = 0; channel < this.#channels; channel++) {
            for (let plane = 0; plane < 3; plane++) {
                for (let v = 0; v < block; v++) {
                    for (let u = 0; u < block; u++, weight++) {
                        for (let y = 0, cell = channel * height * width; y < height; y++) {
                            let pixel = (plane * image.height + y * block + v) * image.width + u;
                            for (let x = 0; x < width; x++, cell++, pixel += block) {
                                visit(cell, pixel, weight);
                            }
                        }
                    }
                }
            }
        }
    }
}

/** Return an image of the first three channels of a latent, as there is no other view of it without its decoder. */
export function showChannels({ shape, data }) {
    const [channels, height, width] = shape;
    const cells = height * width;
    const image = { height, width, data: new Float32Array(3 * cells) };
    for (let plane = 0; plane < 3; plane++) {
        const start = Math.min(plane, channels - 1) * cells;
        const values = data.subarray(start, start + cells);
        const mean = values.reduce((sum, value) => sum + value, 0) / cells;
        const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / cells) || 1;
        image.data.set(values.map((value) => (value - mean) / (2.5 * deviation)), plane * cells);
    }
    return image;
}

/** Return a latent of Gaussian noise. */
export function randomLatent(shape, seed) {
    const data = new Float32Array(shape.reduce((product, side) => product * side));
    return { shape, data: data.map(normal(seed)) };
}

/**
 * Return `latent` with the noise level `sigma`.
 *
 * @param {string} frame convention of the decoder: "flow" or "variance-preserving"
 */
export function addNoise(latent, sigma, seed, frame) {
    if (sigma === 0) {
        return latent;
    }
    const kept = frame === "flow" ? 1 - sigma : Math.sqrt(1 - sigma ** 2);
    const noise = normal(seed);
    return { shape: latent.shape, data: latent.data.map((value) => kept * value + sigma * noise()) };
}

/** Return a function that returns normally distributed numbers, by the Box-Muller transform. */
function normal(seed) {
    const random = uniform(seed);
    return () => Math.sqrt(-2 * Math.log(random())) * Math.cos(2 * Math.PI * random());
}

/** Return a function that returns numbers between 0 and 1: a counter, mixed like the last steps of MurmurHash3. */
function uniform(seed) {
    let counter = mix(seed);
    return () => {
        counter = (counter + 0x9e3779b9) | 0;
        return (mix(counter) + 0.5) / 2 ** 32;
    };
}

function mix(bits) {
    bits = Math.imul(bits ^ (bits >>> 16), 0x85ebca6b);
    bits = Math.imul(bits ^ (bits >>> 13), 0xc2b2ae35);
    return (bits ^ (bits >>> 16)) >>> 0;
}

/** Return the bits of `values` as float16, rounded to nearest even; larger values than float16 has become its largest. */
export function toFloat16(values) {
    return Uint16Array.from(values, (value) => {
        const magnitude = Math.min(Math.abs(value), LARGEST_HALF);
        const exponent = magnitude < 2 ** -14 ? -14 : Math.floor(Math.log2(magnitude));
        const mantissa = roundToEven(magnitude * 2 ** (10 - exponent)); // with its leading one, unless it is subnormal
        const sign = value < 0 ? 0x8000 : 0;
        return sign + ((exponent + 14) << 10) + mantissa; // a carry of the rounding increments the exponent
    });
}

function roundToEven(value) {
    const down = Math.floor(value);
    const rest = value - down;
    return rest > 0.5 || (rest === 0.5 && down % 2 === 1) ? down + 1 : down;
}

/** Return the values of float16 numbers from their bits. */
export function fromFloat16(bits) {
    return Float32Array.from(bits, (half) => {
        const exponent = (half >> 10) & 31;
        const mantissa = half & 1023;
        const sign = half & 0x8000 ? -1 : 1;
        if (exponent === 31) {
            return mantissa ? NaN : sign * Infinity;
        }
        return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
    });
}
