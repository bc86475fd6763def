// Calls of Node's fetch: `node node_fetch.mjs CASE URL`, with a JSON document on stdin. The result is JSON on stdout.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout } from "node:timers/promises";

const [, , name, url] = process.argv;
const input = JSON.parse(readFileSync(0, "utf8"));
const headers = { "Content-Type": "application/json" };
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

async function json() {
  const response = await fetch(`${url}/decode`, { method: "POST", headers, body: JSON.stringify(input) });
  const image = new Uint8Array(await response.arrayBuffer());
  return { status: response.status, type: response.headers.get("Content-Type"), images: [sha256(image)] };
}

async function streamed() {
  const response = await fetch(`${url}/decode?seed=${input.seed}&shape=${input.latent.shape}&dtype=${input.latent.dtype}`, {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: new Blob([Buffer.from(input.latent.data, "base64")]).stream(),
    duplex: "half",
  });
  const hash = createHash("sha256");
  for await (const chunk of response.body) hash.update(chunk);
  return { status: response.status, seed: response.headers.get("X-Seed"), images: [hash.digest("hex")] };
}

// fetch has no parser for multipart/mixed. The boundary is a line of its own that occurs in no image.
async function multipart() {
  const response = await fetch(`${url}/decode`, { method: "POST", headers, body: JSON.stringify(input) });
  const type = response.headers.get("Content-Type");
  const boundary = /boundary="?([^";]+)/.exec(type)[1];
  const body = Buffer.from(await response.arrayBuffer()).toString("latin1");
  const parts = body.split(`--${boundary}`).slice(1, -1);
  const images = parts.map((part) => part.slice(part.indexOf("\r\n\r\n") + 4, -2));
  return { status: response.status, type, images: images.map((image) => sha256(Buffer.from(image, "latin1"))) };
}

async function batchAsJson() {
  const accept = { ...headers, Accept: "application/json" };
  const response = await fetch(`${url}/decode`, { method: "POST", headers: accept, body: JSON.stringify(input) });
  const body = await response.json();
  return { status: response.status, body };
}

async function abort() {
  const controller = new AbortController();
  const { signal } = controller;
  let ended = false;
  const decode = fetch(`${url}/decode`, { method: "POST", headers, body: JSON.stringify(input), signal })
    .then((response) => response.text())
    .then((body) => ({ body }), (error) => ({ error: error.name }))
    .finally(() => { ended = true; });
  while (!ended && !/^pid_running_images\{[^}]*\} [1-9]/m.test(await (await fetch(`${url}/metrics`)).text())) await setTimeout(20);
  controller.abort();
  return decode;
}

console.log(JSON.stringify(await { json, streamed, multipart, batchAsJson, abort }[name]()));
