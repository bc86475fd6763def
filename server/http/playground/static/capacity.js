// Predicts what a server can do, from the costs of the stages in /info.

const STEPS = 4;

/**
 * Return images per second that all devices can decode together, with the best batch size.
 *
 * @param {object} info the document /info
 * @param {{ decoder: string, size: number[] }} output name of the decoder and [height, width] of the images
 */
export function capacity(info, output) {
    const single = costOf(info, output, "condition") + costOf(info, output, "finish");
    const batches = info.costs.filter((cost) => cost.stage === "step" && isOf(cost, output));
    const perDevice = batches.map(({ batch, seconds }) => batch / (batch * single + STEPS * seconds));
    return info.devices * Math.max(...perDevice);
}

/** Return the seconds that a device needs for one image. */
export function decodeSeconds(info, output) {
    const single = costOf(info, output, "condition") + costOf(info, output, "finish");
    return single + STEPS * costOf(info, output, "step");
}

/** Return the seconds that one image needs in the encoder. */
export function encodeSeconds(info, output, encoding) {
    return costOf(info, output, "encode", encoding);
}

function costOf(info, output, stage, encoding = "") {
    const found = info.costs.find(
        (cost) => cost.stage === stage && cost.batch === 1 && cost.encoding === encoding && isOf(cost, output),
    );
    if (found === undefined) {
        throw new Error(`/info has no cost of the stage ${stage} of ${output.decoder} for ${output.size.join("×")}`);
    }
    return found.seconds;
}

function isOf(cost, { decoder, size }) {
    return cost.decoder === decoder && cost.tile === null && cost.size.join() === size.join();
}
