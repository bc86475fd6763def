// The decoders of the server, one of which the page uses.

/** Return whether a decoder of /info has the latent space of the bundled decoder, which the page can compute. */
export function isDct({ latent_space: space }) {
    return space.name === "dct";
}

/** Return the options of a request to a decoder: its name, unless the server has no other decoder. */
export function decoderOptions(info, { name }) {
    return info.decoders.length > 1 ? { decoder: name } : {};
}

/**
 * Let the person choose a decoder, if the server has several.
 *
 * Returns a function that calls its argument with the chosen decoder, now and whenever it changes.
 */
export function mountChoice(field, { decoders }) {
    const select = field.querySelector("select");
    select.replaceChildren(...decoders.map(({ name }, index) => new Option(name, index)));
    field.hidden = decoders.length === 1;
    return (use) => {
        select.addEventListener("change", () => use(decoders[select.value]));
        use(decoders[select.value]);
    };
}
