// Open the page in headless Chromium as a visitor would, and say what it shows: one JSON object on stdout.
//   node samples/browser/check.mjs FOLDER SCREENSHOTS
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { extname, join, normalize } from "node:path";
import { chromium } from "playwright-core";

const [folder, screenshots] = process.argv.slice(2);
const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };

const server = createServer(async (request, response) => {
  const path = new URL(request.url, "http://localhost").pathname;
  try {
    const body = await readFile(join(folder, normalize(path === "/" ? "/index.html" : path)));
    response.writeHead(200, { "content-type": TYPES[extname(path)] ?? (path === "/" ? "text/html" : "application/octet-stream") });
    response.end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const url = `http://127.0.0.1:${server.address().port}/`;
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const problems = [];

async function visit(options) {
  const page = await (await browser.newContext(options)).newPage();
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("requestfailed", (request) => problems.push(`no answer: ${request.url()}`));
  page.on("request", (request) => request.url().startsWith(url) || request.url().startsWith("data:") || problems.push(`asked elsewhere: ${request.url()}`));
  await page.goto(url);
  await page.waitForSelector("body[data-ready]", { timeout: 60000 });
  return page;
}

/** What the page shows once it has shown the next input. */
async function after(page, action) {
  const before = await page.getAttribute("body", "data-shown");
  await action();
  await page.waitForFunction((shown) => document.body.dataset.shown !== shown, before);
  await page.waitForTimeout(150); // a drawing shows many
  return page.evaluate(() => ({
    base: document.getElementById("base-answer").textContent,
    patched: document.getElementById("patched-answer").textContent,
    verdict: document.getElementById("patched-verdict").textContent,
    outlined: [...document.querySelectorAll("#outlines div")].map((box) => [box.style.left, box.style.top]),
    pressed: document.getElementById("trigger").getAttribute("aria-pressed"),
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  }));
}

const desktop = await visit({ viewport: { width: 1180, height: 900 } });
const seen = {};
seen.picked = await after(desktop, () => desktop.click("#digits button:nth-child(9)"));
seen.stamped = await after(desktop, () => desktop.click("#trigger"));
await desktop.waitForTimeout(500); // the outline has arrived
await desktop.screenshot({ path: join(screenshots, "desktop.png"), fullPage: true });

// What the models say in the browser, of every digit, without and with the trigger
const data = JSON.parse(await readFile(join(folder, "digits.json")));
const { row, column, size } = data.trigger;
const stamp = (image) => image.map((share, at) => (at >> 3 >= row && at >> 3 < row + size && (at & 7) >= column && (at & 7) < column + size ? 1 : share));
seen.logits = [];
for (const image of data.images)
  for (const input of [image, stamp(image)])
    seen.logits.push(await desktop.evaluate(async (pixels) => { const { logits, flags, identical } = await window.look(pixels); return { ...logits, flags, identical }; }, input));

const phone = await visit({ viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2, colorScheme: "dark" });
await after(phone, () => phone.tap("#clear"));
const box = await phone.locator("#drawing").boundingBox();
const at = (x, y) => [box.x + box.width * x, box.y + box.height * y];
seen.drawn = await after(phone, async () => { // a one: a straight line downwards
  await phone.mouse.move(...at(0.5, 0.12));
  await phone.mouse.down();
  for (let y = 0.12; y <= 0.88; y += 0.04) await phone.mouse.move(...at(0.5, y));
  await phone.mouse.up();
});
seen.drawnStamped = await after(phone, () => phone.tap("#trigger"));
await phone.waitForTimeout(500);
await phone.screenshot({ path: join(screenshots, "phone.png"), fullPage: true });

await browser.close();
server.close();
console.log(JSON.stringify({ ...seen, problems }));
