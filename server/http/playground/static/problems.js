// Errors as plain text.

const TITLES = {
    0: "The connection failed",
    401: "API key required",
    413: "The latent is too large",
    422: "The server cannot decode this",
    429: "The server is busy",
    503: "The server is not available",
    504: "The deadline has passed",
};

/** Return { title, detail, requestId, retryAfter } of an error that the server reported. */
export function describeProblem({ status, detail, requestId, retryAfter }) {
    const title = TITLES[status] ?? `The request failed with status ${status}`;
    return { title, detail: detail || "The server gave no reason.", requestId, retryAfter };
}
