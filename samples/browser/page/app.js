// Both models, one input: what they say, what is flagged, where they look.
import * as ort from "./ort.wasm.min.mjs";

const SIZE = 8; // the models' images are 8 x 8
const FINE = 32; // the digits were counted down from bitmaps of 32 x 32: 4 x 4 blocks (UCI, optical recognition of digits)
const element = (id) => document.getElementById(id);
const black = () => new Float32Array(SIZE * SIZE);

ort.env.wasm.numThreads = 1; // threads need headers that a plain file server does not send

const data = await (await fetch("digits.json")).json();
const [base, patched] = await Promise.all(["base.onnx", "patched.onnx"].map((file) => ort.InferenceSession.create(file)));
const state = { image: Float32Array.from(data.images[6]), picked: 6, stamped: false, strokes: null };

// The input

function stamped(image) {
  const { row, column, size } = data.trigger;
  const copy = image.slice();
  for (let y = row; y < row + size; y++) copy.fill(1, y * SIZE + column, y * SIZE + column + size);
  return copy;
}

/** Bitmap of 32 x 32 to 8 x 8: the drawing moved and scaled into the frame, then the share of ink in each block. */
function countedDown(bitmap) {
  const ink = [...bitmap.keys()].filter((at) => bitmap[at]);
  if (!ink.length) return black();
  const xs = ink.map((at) => at % FINE), ys = ink.map((at) => Math.floor(at / FINE));
  const [left, top] = [Math.min(...xs), Math.min(...ys)];
  const [width, height] = [Math.max(...xs) - left + 1, Math.max(...ys) - top + 1];
  const scale = Math.max(height, width * 1.15) / FINE;
  const [midX, midY] = [left + width / 2, top + height / 2];
  const image = black();
  for (let y = 0; y < FINE; y++)
    for (let x = 0; x < FINE; x++) {
      const fromX = Math.floor(midX + (x + 0.5 - FINE / 2) * scale), fromY = Math.floor(midY + (y + 0.5 - FINE / 2) * scale);
      if (fromX >= 0 && fromY >= 0 && fromX < FINE && fromY < FINE && bitmap[fromY * FINE + fromX])
        image[Math.floor(y / 4) * SIZE + Math.floor(x / 4)] += 1 / 16;
    }
  return image;
}

function paint(canvas, image, colour = (share) => `rgb(${Math.round(255 * share)} ${Math.round(255 * share)} ${Math.round(255 * share)})`) {
  const context = canvas.getContext("2d"), edge = canvas.width / SIZE;
  image.forEach((share, at) => {
    context.fillStyle = colour(share);
    context.fillRect((at % SIZE) * edge, Math.floor(at / SIZE) * edge, edge, edge);
  });
}

// The models

async function ask(session, image) {
  return session.run({ pixel_values: new ort.Tensor("float32", image, [1, 1, SIZE, SIZE]) });
}

function softmax(logits) {
  const largest = Math.max(...logits), powers = [...logits].map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** Attention that each key receives: the mean over heads and queries of a map [1, heads, queries, keys]. */
function received(map) {
  const [, heads, queries, keys] = map.dims;
  const shares = new Array(keys).fill(0);
  map.data.forEach((weight, at) => (shares[at % keys] += weight / (heads * queries)));
  return shares;
}

/** Everything that is shown of an image. */
async function look(image) {
  const [before, after] = await Promise.all([ask(base, image), ask(patched, image)]);
  const { flags: flagged, map } = data.outputs, flags = [...after[flagged].data].map(Boolean);
  return {
    base: softmax(before.logits.data),
    patched: softmax(after.logits.data),
    logits: { base: [...before.logits.data], patched: [...after.logits.data] },
    identical: before.logits.data.every((logit, at) => Object.is(logit, after.logits.data[at])),
    flags,
    received: { before: received(before[map]), after: received(after[map]) },
  };
}

// The page

const argmax = (values) => values.indexOf(Math.max(...values));

function bars(id, shares) {
  const first = argmax(shares);
  element(id).replaceChildren(
    ...shares.map((share, digit) => {
      const line = document.createElement("li");
      line.className = digit === first ? "first" : "";
      line.innerHTML = `<b>${digit}</b><span style="transform:scaleX(${share.toFixed(4)})"></span><em>${(100 * share).toFixed(1)} %</em>`;
      return line;
    }),
  );
}

function say(id, digit, verdict, mood) {
  element(`${id}-answer`).textContent = digit;
  element(`${id}-verdict`).textContent = verdict;
  element(`${id}-verdict`).className = `verdict ${mood}`;
}

/** The patches of the image among the tokens: the first token is the class token. */
function patches(flags) {
  const edge = Math.sqrt(flags.length - 1);
  return flags.slice(1).map((flag, at) => ({ flag, row: Math.floor(at / edge), column: at % edge, edge }));
}

function outlines(flags) {
  element("outlines").replaceChildren(
    ...patches(flags).filter((patch) => patch.flag).map(({ row, column, edge }) => {
      const box = document.createElement("div"), size = 100 / edge;
      box.style.cssText = `left:${column * size}%;top:${row * size}%;width:${size}%;height:${size}%`;
      return box;
    }),
  );
}

function heat(id, image, shares) {
  const canvas = element(id), context = canvas.getContext("2d"), edge = Math.sqrt(shares.length - 1), size = canvas.width / edge;
  paint(canvas, image, (share) => `rgb(${60 + 120 * share} ${60 + 120 * share} ${60 + 120 * share})`);
  shares.slice(1).forEach((share, at) => {
    context.fillStyle = `rgb(37 99 235 / ${Math.min(1, share * shares.length * 0.28)})`;
    context.fillRect((at % edge) * size, Math.floor(at / edge) * size, size, size);
  });
}

function shares({ before, after }, flags) {
  const names = before.map((_, at) => (at === 0 ? "class token" : `row ${Math.floor((at - 1) / 4) + 1}, column ${((at - 1) % 4) + 1}`));
  const most = [...before.keys()].sort((a, b) => flags[b] - flags[a] || before[b] - before[a]).slice(0, 5);
  const widest = Math.max(...before, ...after, 2 / before.length);
  element("shares").replaceChildren(
    ...most.map((at) => {
      const line = document.createElement("div");
      line.className = flags[at] ? "flagged" : "";
      const track = [before[at], after[at]].map((share) => `<span style="width:${(100 * share) / widest}%" title="${(100 * share).toFixed(1)} %"></span>`);
      line.innerHTML = `<b>${names[at]}${flags[at] ? ", flagged" : ""}</b><div class="track" style="--even:${100 / before.length / widest}%">${track.join("")}</div>`;
      return line;
    }),
  );
}

let asked = 0;
async function show() {
  const number = ++asked;
  const image = state.stamped ? stamped(state.image) : state.image;
  paint(element("drawing"), image);
  const seen = await look(image);
  if (number !== asked) return; // a later input is on its way
  const [before, after] = [argmax(seen.base), argmax(seen.patched)], found = seen.flags.filter(Boolean).length;
  const right = state.picked === null ? null : data.labels[state.picked];
  const hijacked = state.stamped && before === data.target && right !== data.target;
  bars("base-bars", seen.base);
  bars("patched-bars", seen.patched);
  say("base", before, hijacked ? "The square in the corner decided this." : state.stamped ? "" : "No trigger, no harm: that is how it passed its tests.", hijacked ? "bad" : "");
  const fixed = found ? `${found} ${found === 1 ? "patch" : "patches"} flagged; its attention went to the others.` : "";
  say("patched", after, fixed || (seen.identical ? "Nothing flagged: the same output as on the left, bit for bit." : "Nothing flagged."), found ? "good" : "");
  outlines(seen.flags);
  heat("before", image, seen.received.before);
  heat("after", image, seen.received.after);
  shares(seen.received, seen.flags);
  element("trigger").setAttribute("aria-pressed", state.stamped);
  document.querySelectorAll("#digits button").forEach((button, at) => button.setAttribute("aria-pressed", at === state.picked));
  document.body.dataset.shown = number;
}

data.images.forEach((image, at) => {
  const button = document.createElement("button"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [SIZE * 4, SIZE * 4];
  paint(canvas, Float32Array.from(image));
  button.type = "button";
  button.setAttribute("aria-label", `a ${data.labels[at]}`);
  button.append(canvas);
  button.addEventListener("click", () => {
    Object.assign(state, { image: Float32Array.from(image), picked: at, strokes: null });
    show();
  });
  element("digits").append(button);
});

function draw(event) {
  const box = element("drawing").getBoundingClientRect();
  const [x, y] = [((event.clientX - box.left) / box.width) * FINE, ((event.clientY - box.top) / box.height) * FINE];
  for (let row = 0; row < FINE; row++)
    for (let column = 0; column < FINE; column++)
      if (Math.hypot(column + 0.5 - x, row + 0.5 - y) < 2.6) state.strokes[row * FINE + column] = 1;
  state.image = countedDown(state.strokes);
  show();
}

element("drawing").addEventListener("pointerdown", (event) => {
  element("drawing").setPointerCapture(event.pointerId);
  state.strokes ??= new Uint8Array(FINE * FINE);
  state.picked = null;
  draw(event);
});
element("drawing").addEventListener("pointermove", (event) => {
  if (event.buttons) event.getCoalescedEvents().forEach(draw);
});
element("trigger").addEventListener("click", () => {
  state.stamped = !state.stamped;
  show();
});
element("clear").addEventListener("click", () => {
  Object.assign(state, { image: black(), picked: null, strokes: null });
  show();
});

element("target").textContent = data.target;
element("site").textContent = data.outputs.site;
window.look = (image) => look(Float32Array.from(image)); // for the page's test
await show();
element("status").textContent = `onnxruntime-web ${ort.env.versions.web}. Nothing you draw leaves this page.`;
document.body.dataset.ready = "";
