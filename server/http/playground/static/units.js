// Numbers with units, for people. A value that is not known is a dash.

export const NBSP = "\u00a0"; // between a number and its unit

const UNKNOWN = "–";

/** Format a number with about two significant digits: 0.25, 4.7, 48. */
export function formatNumber(value) {
    if (!Number.isFinite(value)) {
        return UNKNOWN;
    }
    const digits = Number.isInteger(value) || Math.abs(value) >= 10 ? 0 : Math.abs(value) >= 1 ? 1 : 2;
    return value.toFixed(digits);
}

/** Format a duration in seconds: 0 s, 85 ms, 1.5 s. */
export function formatSeconds(value) {
    if (!Number.isFinite(value)) {
        return UNKNOWN;
    }
    return value > 0 && value < 1 ? `${(1000 * value).toFixed(0)}${NBSP}ms` : `${formatNumber(value)}${NBSP}s`;
}

/** Format a rate per second: 4.7/s. */
export function formatRate(value) {
    return Number.isFinite(value) ? `${formatNumber(value)}/s` : UNKNOWN;
}

/** Format a number of bytes: 620 MB, 1.5 GB. */
export function formatBytes(value) {
    if (!Number.isFinite(value)) {
        return UNKNOWN;
    }
    return value < 1e9 ? `${(value / 1e6).toFixed(0)}${NBSP}MB` : `${formatNumber(value / 1e9)}${NBSP}GB`;
}
