// Requests to the server. All addresses are relative to the page, so that it also works below a prefix of a proxy.

import { readEvents } from "./events.js";
import { Scrape } from "./prometheus.js";
import { forTab } from "./storage.js";

const KEY = "pid-api-key"; // name in the storage

const FOREIGN = "This address does not respond like a PiD server."; // for example with a page of a proxy
const DETAILS = { // of errors that browsers throw
    TypeError: "The server cannot be reached. Check that it runs and that you are connected.", // any failed connection
    SyntaxError: FOREIGN, // no JSON
    InvalidStateError: FOREIGN, // no image
};

let askForKey = async () => null; // until `onKeyRequired` is called
let pendingKey = null; // the answer to a question that is open

/** An error that the server reported, or status 0 if it could not be reached. */
export class ServerError extends Error {
    constructor(status, { code = "", detail = "", request_id = "" } = {}, retryAfter = null) {
        super(detail);
        this.name = "ServerError";
        this.status = status;
        this.code = code;
        this.detail = detail;
        this.requestId = request_id;
        this.retryAfter = retryAfter; // seconds, or null
    }
}

/** Set the function that asks the person for an API key; it returns the key, or null if there is none. */
export function onKeyRequired(ask) {
    askForKey = ask;
}

/** Return whether requests are sent with an API key. */
export function hasKey() {
    return forTab.get(KEY) !== null;
}

/** Return the JSON document at `path`, such as "info". */
export async function getJson(path) {
    return readBody(await request(path), (response) => response.json());
}

/** Return the image at `path`. */
export async function getImage(path) {
    return readBody(await request(path), async (response) => createImageBitmap(await response.blob()));
}

/** Return the metrics; `at` is the time in seconds, on any clock. */
export async function getMetrics(at) {
    return readBody(await request("metrics"), async (response) => new Scrape(await response.text(), at));
}

/** Return the state of the server, and the reason for it if there is one. */
export async function getReadiness() {
    return readBody(await fetchFrom("health/ready", { cache: "no-store" }), (response) => response.json());
}

/**
 * Decode a latent.
 *
 * With `preview: "steps"` in the query, `onPreview` is called with { step, steps, blob } after each step.
 * Returns { blob, serverTiming }.
 */
export async function decode({ body, contentType, query = {}, signal, onPreview = () => {} }) {
    const headers = { "Content-Type": contentType };
    const response = await request(`decode?${new URLSearchParams(query)}`, { method: "POST", body, headers, signal });
    if (response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        return readDecodeEvents(response, onPreview);
    }
    const blob = await readBody(response, () => response.blob());
    if (!blob.type.startsWith("image/")) {
        throw new ServerError(0, { detail: FOREIGN, request_id: response.headers.get("X-Request-Id") ?? "" });
    }
    return { blob, serverTiming: response.headers.get("Server-Timing") ?? "" };
}

async function readDecodeEvents(response, onPreview) {
    const requestId = response.headers.get("X-Request-Id");
    for await (const { type, data } of withConnectionErrors(readEvents(response.body), requestId)) {
        const event = JSON.parse(data);
        if (type === "problem") {
            throw new ServerError(event.problem.status, event.problem);
        }
        const blob = toBlob(event);
        if (type === "preview") {
            onPreview({ step: event.step, steps: event.steps, blob });
        } else if (type === "image") {
            return { blob, serverTiming: event.server_timing };
        }
    }
    throw new ServerError(0, { detail: "The response ended before the image had arrived.", request_id: requestId });
}

async function* withConnectionErrors(events, requestId) {
    try {
        yield* events;
    } catch (error) {
        throw toServerError(error, requestId);
    }
}

function toBlob({ data, media_type: type }) {
    const characters = atob(data);
    const bytes = new Uint8Array(characters.length);
    for (let index = 0; index < bytes.length; index++) {
        bytes[index] = characters.charCodeAt(index);
    }
    return new Blob([bytes], { type });
}

/** Send a request, with an API key if there is one, and again with another key as long as the server requires it. */
async function request(path, options = {}) {
    const key = forTab.get(KEY);
    const response = await fetchFrom(path, key === null ? options : withKey(options, key));
    if (response.status === 401 && (forTab.get(KEY) !== key || (await enterKey(key !== null)))) {
        return request(path, options);
    }
    if (!response.ok) {
        const problem = await response.json().catch(() => ({ detail: response.statusText })); // of a proxy: no JSON
        const retryAfter = response.headers.get("Retry-After");
        throw new ServerError(response.status, problem, /^\d+$/.test(retryAfter) ? Number(retryAfter) : null);
    }
    return response;
}

/** Let the person enter a key; return whether there is a new one. Requests that wait for it share one question. */
function enterKey(wasRejected) {
    pendingKey ??= askForKey(wasRejected).then((key) => {
        pendingKey = null;
        if (key !== null) {
            forTab.set(KEY, key);
        }
        return key !== null;
    });
    return pendingKey;
}

function withKey(options, key) {
    return { ...options, headers: { ...options.headers, Authorization: `Bearer ${key}` } };
}

async function fetchFrom(path, options) {
    try {
        return await fetch(path, options);
    } catch (error) {
        throw toServerError(error, "");
    }
}

/** Return what `read` makes of the body of a response. */
async function readBody(response, read) {
    try {
        return await read(response);
    } catch (error) {
        throw toServerError(error, response.headers.get("X-Request-Id"));
    }
}

/** Return a `ServerError` if the response cannot be used; other errors, such as an abort, are returned unchanged. */
function toServerError(error, requestId) {
    const detail = DETAILS[error.name];
    return detail === undefined ? error : new ServerError(0, { detail, request_id: requestId ?? "" });
}
