// Photos as input of the bundled decoder.

/** Return the size { output, latent } that fits a photo best: nearest in aspect ratio, then the largest it fills. */
export function nearestSize({ height, width }, sizes) {
    const distance = ({ output }) => Math.abs(Math.log((output[1] / output[0]) * (height / width)));
    const nearest = Math.min(...sizes.map(distance));
    const similar = sizes.filter((size) => distance(size) < nearest + 1e-6).sort((a, b) => a.output[0] - b.output[0]);
    const filled = similar.filter(({ output }) => output[0] <= height && output[1] <= width);
    return filled.at(-1) ?? similar[0];
}

/**
 * Return the middle of a photo, scaled to `height` and `width` and then averaged over squares of `factor` pixels, as an
 * image { height, width, data } in [-1, 1].
 */
export function lowResolution(photo, height, width, factor) {
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white"; // behind transparent pixels
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    const scale = Math.min(photo.width / width, photo.height / height);
    const [cropWidth, cropHeight] = [width * scale, height * scale];
    const [left, top] = [(photo.width - cropWidth) / 2, (photo.height - cropHeight) / 2];
    context.drawImage(photo, left, top, cropWidth, cropHeight, 0, 0, width, height);
    return average(context.getImageData(0, 0, width, height).data, height, width, factor);
}

function average(pixels, height, width, factor) {
    const low = { height: height / factor, width: width / factor };
    low.data = new Float32Array(3 * low.height * low.width).fill(-1);
    const share = 1 / (127.5 * factor ** 2);
    for (let y = 0, index = 0; y < height; y++) {
        for (let x = 0; x < width; x++, index += 4) {
            const cell = Math.floor(y / factor) * low.width + Math.floor(x / factor);
            for (let plane = 0; plane < 3; plane++) {
                low.data[plane * low.height * low.width + cell] += pixels[index + plane] * share;
            }
        }
    }
    return low;
}
