// Run a model in onnxruntime-node or onnxruntime-web (WebAssembly): tensors as JSON on stdin, outputs as JSON on stdout.
//   node samples/browser/runtimes.mjs onnxruntime-node|onnxruntime-web MODEL < inputs.json
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const [name, model] = process.argv.slice(2);
const ort = name === "onnxruntime-node" ? createRequire(import.meta.url)(name) : await import(name);
if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
let text = "";
for await (const chunk of process.stdin) text += chunk;
const feeds = {};
for (const [input, { type, dims, data }] of Object.entries(JSON.parse(text))) {
  const values = type === "int64" ? data.map(BigInt) : data;
  feeds[input] = new ort.Tensor(type, ARRAYS[type].from(values), dims);
}
try {
  const session = await ort.InferenceSession.create(new Uint8Array(await readFile(model)), { executionProviders: [name === "onnxruntime-node" ? "cpu" : "wasm"] });
  const answer = {};
  for (const [output, { type, dims, data }] of Object.entries(await session.run(feeds))) {
    answer[output] = { type, dims, data: Array.from(data, Number) };
  }
  process.stdout.write(JSON.stringify(answer));
} catch (error) {
  process.stdout.write(JSON.stringify({ error: String(error.message ?? error) }));
}
