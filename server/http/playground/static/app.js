// Connects the parts of the page.

import { getJson, onKeyRequired, ServerError } from "./client.js";
import { isDct, mountChoice } from "./decoders.js";
import { Decoding } from "./decoding.js";
import * as figures from "./figures.js";
import { keyDialog } from "./key_dialog.js";
import { Dct } from "./latents.js";
import * as overload from "./overload.js";
import { Status } from "./status.js";
import * as theme from "./theme.js";

const RETRY = 2000; // milliseconds until the next attempt to load what the page needs

const byId = (id) => document.getElementById(id);

/** Return a JSON document, once the server can be reached and the person has entered a key if it requires one. */
async function load(path) {
    for (;;) {
        try {
            return await getJson(path);
        } catch (error) {
            if (!(error instanceof ServerError)) {
                throw error;
            }
            await (error.status === 401 ? keyRequested() : delay(RETRY));
        }
    }
}

/** Wait until the person who closed the dialog for the API key wants to enter it. */
async function keyRequested() {
    const button = byId("enter-key");
    byId("run-reason").textContent = "This server requires an API key.";
    button.hidden = false;
    await new Promise((resolve) => button.addEventListener("click", resolve, { once: true }));
    button.hidden = true;
}

function delay(milliseconds) {
    return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function describe({ model, device, precision, sizes, latent_space: space }) {
    const [{ output, latent }] = sizes;
    const ratio = Math.round((3 * output[0] * output[1]) / (space.channels * latent[0] * latent[1]));
    byId("ratio").textContent = `1⁄${ratio}`;
    byId("model").textContent = [model, device, precision].join(" · ");
}

theme.mount(byId("theme"));
figures.mount(byId("figures"));
onKeyRequired(keyDialog(byId("key-dialog")));
const status = new Status(byId("status"));
const info = await load("info");
const transform = info.decoders.some(isDct) ? new Dct(await load(new URL("dct.json", import.meta.url))) : null;
const decoding = new Decoding(byId("decode"), info);
const onChoice = mountChoice(byId("decoder-field"), info);
onChoice((decoder) => {
    describe(decoder);
    decoding.use(decoder, isDct(decoder) ? transform : null);
});
status.onChange((isReady, text) => decoding.setReady(isReady, text));
await status.ready(); // the costs in /info are complete now
onChoice(overload.mount(byId("overload"), info));
