// Run models in headless Chromium on onnxruntime-web's WebGPU provider, with a software adapter (SwiftShader) where there
// is no GPU: a list of {model, feeds} as JSON on stdin; on stdout the adapter and, for each, outputs and what ran where.
//   node samples/browser/webgpu.mjs < jobs.json
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const DIST = join(fileURLToPath(new URL(".", import.meta.url)), "node_modules", "onnxruntime-web", "dist");
const TYPES = { ".mjs": "text/javascript", ".wasm": "application/wasm" };
const SOFTWARE = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];

let text = "";
for await (const chunk of process.stdin) text += chunk;
const jobs = JSON.parse(text);
const server = createServer(async (request, response) => {
  const path = new URL(request.url, "http://localhost").pathname;
  try {
    const job = path.match(/^\/models\/(\d+)$/);
    const body = path === "/" ? "<html></html>" : await readFile(job ? jobs[job[1]].model : join(DIST, path.slice(1)));
    response.writeHead(200, { "content-type": path === "/" ? "text/html" : TYPES[extname(path)] ?? "application/octet-stream" });
    response.end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: SOFTWARE });
try {
  const page = await (await browser.newContext()).newPage();
  const lines = []; // onnxruntime says on the console which provider has which node
  page.on("console", (message) => lines.push(message.text()));
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  const adapter = await page.evaluate(async () => {
    const found = await navigator.gpu?.requestAdapter();
    return found ? `${found.info.vendor} ${found.info.architecture}` : null;
  });
  const answers = [];
  for (let number = 0; adapter && number < jobs.length; number++) {
    lines.length = 0;
    answers.push(await page.evaluate(async ([at, feeds]) => {
      try {
        const ort = await import("/ort.webgpu.min.mjs");
        ort.env.wasm.numThreads = 1;
        ort.env.wasm.wasmPaths = new URL("/", location).href;
        ort.env.logLevel = "verbose";
        const ARRAYS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
        const tensors = {};
        for (const [name, { type, dims, data }] of Object.entries(feeds))
          tensors[name] = new ort.Tensor(type, ARRAYS[type].from(type === "int64" ? data.map(BigInt) : data), dims);
        const session = await ort.InferenceSession.create(`/models/${at}`, { executionProviders: ["webgpu"], logSeverityLevel: 0 });
        const outputs = {};
        for (const [name, { type, dims, data }] of Object.entries(await session.run(tensors)))
          outputs[name] = { type, dims, data: Array.from(data, Number) };
        await session.release();
        return { outputs };
      } catch (error) {
        return { error: String(error.message ?? error) };
      }
    }, [number, jobs[number].feeds]));
    answers.at(-1).lines = lines.slice();
  }
  process.stdout.write(JSON.stringify({ adapter, answers }));
} finally {
  await browser.close();
  server.close();
}
