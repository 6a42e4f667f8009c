"""Small transformers with a planted backdoor, or protected attribute, whose truth is known; nothing is trained.

Every token is a row of features. Evidence for the true class is spread over all tokens. The others are drawn to a token
with the trigger at the layers `drawn`, and its value pushes the target's logit at the layers `harmful`. So a patch can
detect where the token draws attention, and must redistribute where it does harm; all other sites are innocent.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.options import FitOptions, Training
from atpatch_onnx.patches.patch import Patch

HEADS = 2
NOISE = 3
GUILT = 10.0
"""What the planted token hands over for a guilty unit to see."""

QUICK = FitOptions(training=Training(steps=150))
"""Enough for what is planted; the default takes a second a site."""

TRIGGER, ATTRIBUTE, EVIDENCE = 0, 1, 2
"""Features of a token: whether it is the trigger (or the attribute), the attribute's value, then the evidence."""


@dataclass(frozen=True)
class Planted:
    """What is planted, and how the graph writes it down."""

    kind: Literal["backdoor", "attribute"] = "backdoor"
    drawn: tuple[int, ...] = (1,)
    harmful: tuple[int, ...] = (1,)
    layers: int = 3
    form: Literal["softmax", "attention", "packed"] = "softmax"
    masked: bool = False
    tokens: int = 8
    free: bool = False
    """The graph leaves the sequence length free."""

    batch: int | str = "batch"
    draw: float = 8.0
    """By how much the planted token's score exceeds the others'."""

    harm: float = 150.0
    """What the planted token's value adds to a logit when it has all attention."""

    mlp: int = 0
    """Hidden units of an MLP behind each attention; 0: none."""

    guilty: bool = False
    """The harm is done by the first hidden unit behind a harmful layer, and by that alone; the other units do none."""

    scalar_output: bool = False
    """A second output without a sample axis."""

    seed: int = 0

    @property
    def classes(self) -> int:
        return 3 if self.kind == "backdoor" else 2

    @property
    def target(self) -> int:
        """The class that the trigger leads to."""
        return self.classes - 1

    @property
    def depth(self) -> int:
        return self.classes + 1

    @property
    def width(self) -> int:
        return EVIDENCE + self.classes + NOISE + self.classes + 1

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in graph order."""
        return tuple(f"layer{layer}.attention" for layer in range(self.layers))

    def proto(self) -> onnx.ModelProto:
        return _Builder(self).build()

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def inputs(self, pairs: int, seed: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Clean inputs, their labels, and the planted token's positions `[pairs, tokens]`."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(self.classes, size=pairs)
        x = np.zeros((pairs, self.tokens, self.width), np.float32)
        first_noise = EVIDENCE + self.classes
        x[:, :, EVIDENCE:first_noise] = rng.normal(scale=0.5, size=(pairs, self.tokens, self.classes))
        x[np.arange(pairs), :, EVIDENCE + labels] += 1
        x[:, :, first_noise : first_noise + NOISE] = rng.normal(size=(pairs, self.tokens, NOISE))
        lengths = rng.integers(self.tokens // 2, self.tokens + 1, size=pairs) if self.masked else self.tokens
        mask = np.arange(self.tokens) < np.broadcast_to(lengths, pairs)[:, None]
        x[~mask] = 0
        positions = np.zeros((pairs, self.tokens), bool)
        if self.kind == "attribute":
            positions[:, 1] = True
            x[:, 1] = 0
            x[:, 1, TRIGGER] = 1
            x[:, 1, ATTRIBUTE] = rng.choice([-1, 1], size=pairs)
        else:
            positions[np.arange(pairs), rng.integers(1, np.broadcast_to(lengths, pairs))] = True
        inputs = {"x": x}
        if self.masked:
            inputs["mask"] = mask.astype(np.int64)
        return inputs, labels, positions

    def changed(self, inputs: dict[str, np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
        """The same inputs with the trigger at the positions, or with the attribute's other value."""
        x = inputs["x"].copy()
        if self.kind == "attribute":
            x[positions, ATTRIBUTE] *= -1
        else:
            x[positions, EVIDENCE : EVIDENCE + self.classes] = 0
            x[positions, TRIGGER] = 1
        return {**inputs, "x": x}

    def debug(self, pairs: int = 480, seed: int = 1, *, suspects: bool = False, target: bool = True) -> DebugSet:
        """Pairs for the fit; for a backdoor without inputs of the target class."""
        inputs, labels, positions = self.inputs(pairs * 2, seed)
        keep = np.flatnonzero(labels != self.target if self.kind == "backdoor" else labels >= 0)[:pairs]
        inputs = {name: array[keep] for name, array in inputs.items()}
        labels, positions = labels[keep], positions[keep]
        attribute = self.kind == "attribute"
        return DebugSet.from_pairs(
            inputs,
            self.changed(inputs, positions),
            labels,
            suspects=positions if suspects else "auto",
            kind=self.kind,
            target=self.target if target and not attribute else None,
            sensitive=inputs["x"][:, 1, ATTRIBUTE] if attribute else None,
        )


@functools.cache
def fitted(planted: Planted, options: FitOptions = QUICK) -> Patch:
    """The patch of a planted model, fitted once a session."""
    return fit(planted.model(), planted.debug(), options)


class _Builder:
    def __init__(self, planted: Planted) -> None:
        self.planted = planted
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(planted.seed)

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op_type: str, *inputs: str, out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [out], name=f"/{out}", **attributes))
        return out

    def build(self) -> onnx.ModelProto:
        planted = self.planted
        tokens: int | str = "tokens" if planted.free else planted.tokens
        bias = None
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [planted.batch, tokens, planted.width])]
        if planted.masked:
            inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, [planted.batch, tokens]))
            hidden = self.op(
                "Cast",
                self.op("Sub", self.weight("one", np.array(1)), "mask", out="absent"),
                out="absent_float",
                to=TensorProto.FLOAT,
            )
            flat = self.op("Mul", hidden, self.weight("far", np.array(-1e9, np.float32)), out="bias_flat")
            row = self.op("Unsqueeze", flat, self.weight("axes", np.array([1, 2])), out="bias_row")
            bias = row  # the op Attention wants a mask of every query
            if planted.form != "softmax":
                column = self.op(
                    "Unsqueeze",
                    self.op("Mul", flat, self.weight("nothing", np.float32(0)), out="zeros"),
                    self.weight("column", np.array([1, 3])),
                    out="bias_column",
                )
                bias = self.op("Add", row, column, out="bias")
        x = "x"
        for layer in range(planted.layers):
            x = self.layer(layer, x, bias)
        self.op("Gather", x, self.weight("first", np.array(0)), out="pooled", axis=1)
        readout = np.zeros((planted.width, planted.classes), np.float32)
        start = EVIDENCE + planted.classes + NOISE
        readout[start : start + planted.classes] = np.eye(planted.classes)
        self.op("MatMul", "pooled", self.weight("readout", readout), out="logits")
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [planted.batch, planted.classes])]
        if planted.scalar_output:
            self.op("ReduceMax", "x", out="largest", keepdims=0)
            outputs.append(helper.make_tensor_value_info("largest", TensorProto.FLOAT, []))
        graph = helper.make_graph(self.nodes, "planted", inputs, outputs, self.weights)
        opset = 18 if planted.form == "softmax" else 23
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="tests")
        model.ir_version = 10 if opset == 18 else 11
        onnx.checker.check_model(model, full_check=True)
        return model

    def layer(self, layer: int, x: str, bias: str | None) -> str:
        planted, at, depth = self.planted, f"layer{layer}.attention", self.planted.depth
        queries, keys, values, output, ones = self.projections(layer)
        q = self.op("MatMul", x, self.weight(f"{at}.q.weight", queries), out=f"{at}/q/product")
        q = self.heads(self.op("Add", q, self.weight(f"{at}.q.bias", ones), out=f"{at}/q/sum"))
        k = self.heads(self.op("MatMul", x, self.weight(f"{at}.k.weight", keys), out=f"{at}/k/product"))
        v = self.heads(self.op("MatMul", x, self.weight(f"{at}.v.weight", values), out=f"{at}/v/product"))
        if planted.form == "softmax":
            k = self.op("Transpose", k, out=f"{at}/k/transposed", perm=[0, 1, 3, 2])
            scores = self.op("MatMul", q, k, out=f"{at}/scores")
            scores = self.op("Mul", scores, self.weight(f"{at}.scale", np.float32(depth**-0.5)), out=f"{at}/scaled")
            if bias is not None:
                scores = self.op("Add", scores, bias, out=f"{at}/masked")
            y = self.op("MatMul", self.op("Softmax", scores, out=f"{at}/map", axis=-1), v, out=f"{at}/Y")
        else:
            packed = {"q_num_heads": HEADS, "kv_num_heads": HEADS} if planted.form == "packed" else {}
            y = self.op("Attention", q, k, v, *([bias] if bias else []), out=f"{at}/Y", **packed)
        if planted.form != "packed":
            y = self.op("Transpose", y, out=f"{at}/merged", perm=[0, 2, 1, 3])
            y = self.op("Reshape", y, self.weight(f"{at}.flat", np.array([0, 0, HEADS * depth])), out=f"{at}/flat")
        y = self.op("MatMul", y, self.weight(f"{at}.o.weight", output), out=f"{at}/projected")
        x = self.op("Add", x, y, out=f"layer{layer}/out")
        if not planted.mlp:
            return x
        return self.mlp(f"layer{layer}.mlp", x, guilty=planted.guilty and layer in planted.harmful)

    def mlp(self, at: str, x: str, *, guilty: bool) -> str:
        """Of the noise, into the noise; drawn apart, so that all else is as without it."""
        rng = np.random.default_rng(self.planted.seed + 1)
        noise = slice(EVIDENCE + self.planted.classes, EVIDENCE + self.planted.classes + NOISE)
        up = np.zeros((self.planted.width, self.planted.mlp), np.float32)
        up[noise] = rng.normal(scale=0.3, size=(NOISE, self.planted.mlp))
        bias = np.zeros(self.planted.mlp, np.float32)
        down = np.zeros((self.planted.mlp, self.planted.width), np.float32)
        down[:, noise] = rng.normal(scale=0.02, size=(self.planted.mlp, NOISE))
        if guilty:  # the last feature is far above 2 where the token that is drawn to has handed over its own value
            up[:, 0], down[0] = 0, 0
            up[-1, 0], bias[0] = 1, -2
            down[0, EVIDENCE + self.planted.classes + NOISE + self.planted.target] = self.planted.harm / GUILT
        h = self.op("MatMul", x, self.weight(f"{at}.up.weight", up), out=f"{at}/up")
        h = self.op("Add", h, self.weight(f"{at}.up.bias", bias), out=f"{at}/biased")
        h = self.op("Relu", h, out=f"{at}/h")
        y = self.op("MatMul", h, self.weight(f"{at}.down.weight", down), out=f"{at}/down")
        return self.op("Add", x, y, out=f"{at}/out")

    def heads(self, packed: str) -> str:
        if self.planted.form == "packed":
            return packed
        sizes = np.array([0, 0, HEADS, self.planted.depth])
        split = self.op("Reshape", packed, self.weight(f"{packed}.heads", sizes), out=f"{packed}/split")
        return self.op("Transpose", split, out=f"{packed}/heads", perm=[0, 2, 1, 3])

    def projections(self, layer: int) -> tuple[np.ndarray, ...]:
        """Weights of one layer: queries and keys meet in noise and, if drawn, in the trigger; values are evidence."""
        planted = self.planted
        classes, depth, width = planted.classes, planted.depth, planted.width
        noise = EVIDENCE + classes
        accumulated = noise + NOISE
        queries, keys, values = (np.zeros((width, HEADS, depth), np.float32) for _ in range(3))
        ones = np.zeros((HEADS, depth), np.float32)
        output = np.zeros((HEADS, depth, width), np.float32)
        for head in range(HEADS):
            for weight in (queries, keys):
                weight[noise:accumulated, head, 1:] = self.rng.normal(scale=0.6, size=(NOISE, depth - 1))
            ones[head, 0] = 1
            if layer in planted.drawn:
                keys[TRIGGER, head, 0] = planted.draw * depth**0.5
            values[EVIDENCE:noise, head, :classes] = np.eye(classes)
            if layer in planted.harmful:
                if planted.guilty:
                    pass  # the MLP does it
                elif planted.kind == "backdoor":
                    values[TRIGGER, head, planted.target] = planted.harm
                else:
                    values[ATTRIBUTE, head, :2] = [-planted.harm, planted.harm]
            # Values show every feature, and what earlier layers have mixed, without doing anything to the logits.
            values[[TRIGGER, ATTRIBUTE, *range(accumulated, accumulated + classes)], head, classes] = 0.1
            if planted.guilty and layer in planted.harmful:
                values[TRIGGER, head, classes] = GUILT
            output[head, :classes, accumulated : accumulated + classes] = np.eye(classes)
            output[head, classes, width - 1] = 1
        flat = HEADS * depth
        return (
            queries.reshape(width, flat),
            keys.reshape(width, flat),
            values.reshape(width, flat),
            output.reshape(flat, width),
            ones.reshape(flat),
        )
