// Opens /docs in Chromium without any other network, authorises with a key, and decodes the example with "Execute".
// Arguments: path of Chromium, address of the server, API key. Prints a JSON object.
const puppeteer = require("puppeteer-core");

const OFFLINE = ["--proxy-server=127.0.0.1:9", "--proxy-bypass-list=127.0.0.1"];

async function authorise(page, key) {
    await page.click(".btn.authorize");
    await page.type(".modal-ux input", key);
    await page.click(".modal-ux .btn.authorize");
    await page.click(".modal-ux .btn-done");
}

async function decode(page) {
    const responses = ".live-responses-table";
    await page.click("#operations-decode-decode .execute");
    await page.waitForSelector(`${responses} img`);
    await page.waitForFunction((image) => document.querySelector(image).naturalWidth > 0, {}, `${responses} img`);
    return page.$eval(responses, (table) => {
        const image = table.querySelector("img");
        return { size: [image.naturalWidth, image.naturalHeight], text: table.innerText };
    });
}

async function main(executablePath, url, key) {
    const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", ...OFFLINE] });
    const page = await browser.newPage();
    const messages = [];
    const requests = [];
    page.on("console", (message) => messages.push(message.text()));
    page.on("pageerror", (error) => messages.push(error.message));
    page.on("request", (request) => requests.push(request.url()));
    await page.goto(`${url}/docs#/decode/decode`, { waitUntil: "networkidle0" });
    await page.waitForSelector("#operations-decode-decode .execute");
    const operations = await page.$$eval(".opblock-summary-path", (paths) => paths.map((path) => path.dataset.path));
    await authorise(page, key);
    const decoded = await decode(page);
    await browser.close();
    console.log(JSON.stringify({ messages, requests, operations, decoded }));
}

main(...process.argv.slice(2)).catch((error) => {
    console.error(error);
    process.exit(1);
});
