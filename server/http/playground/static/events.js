// Server-sent events (HTML standard, section 9.2) from the body of a response.

/** Yield the events of a stream of bytes as { type, data }. */
export async function* readEvents(stream) {
    let type = "message";
    let data = [];
    for await (const line of readLines(stream)) {
        if (line === "") {
            if (data.length > 0) {
                yield { type, data: data.join("\n") };
            }
            type = "message";
            data = [];
            continue;
        }
        const [, field, value] = line.match(/^([^:]*):? ?(.*)$/s);
        if (field === "event") {
            type = value;
        } else if (field === "data") {
            data.push(value);
        }
    }
}

/** Yield the complete lines of a stream of UTF-8, which end with LF or CR LF. */
async function* readLines(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let parts = []; // of a line whose end has not arrived; an image is one long line
    try {
        for (;;) {
            const { done, value } = await reader.read();
            if (done) {
                return;
            }
            const [first, ...others] = value.split("\n");
            parts.push(first);
            for (const next of others) {
                yield parts.join("").replace(/\r$/, "");
                parts = [next];
            }
        }
    } finally {
        reader.cancel().catch(() => {}); // the stream may have failed already
    }
}
