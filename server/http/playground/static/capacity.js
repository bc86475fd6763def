// Predicts what a server can do, from the costs of the stages in /info.

const STEPS = 4;

/** Return images per second that all devices can decode together, with the best batch size. */
export function capacity(info, size) {
    const single = costOf(info, size, "condition") + costOf(info, size, "finish");
    const batches = info.costs.filter((cost) => cost.stage === "step" && isSize(cost, size));
    const perDevice = batches.map(({ batch, seconds }) => batch / (batch * single + STEPS * seconds));
    return info.devices * Math.max(...perDevice);
}

/** Return the seconds that a device needs for one image. */
export function decodeSeconds(info, size) {
    const single = costOf(info, size, "condition") + costOf(info, size, "finish");
    return single + STEPS * costOf(info, size, "step");
}

/** Return the seconds that one image needs in the encoder. */
export function encodeSeconds(info, size, encoding) {
    return costOf(info, size, "encode", encoding);
}

function costOf(info, size, stage, encoding = "") {
    const found = info.costs.find(
        (cost) => cost.stage === stage && cost.batch === 1 && cost.encoding === encoding && isSize(cost, size),
    );
    if (found === undefined) throw new Error(`/info has no cost of the stage ${stage} for ${size.join("×")}`);
    return found.seconds;
}

function isSize(cost, size) {
    return cost.size !== null && cost.size.join() === size.join();
}
