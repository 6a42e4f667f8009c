"""What small nets of one layer of attention are drafted with: see `place_nets`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from form_nets import Sketch
from onnx import TensorProto, helper

TOKENS, HEADS, KV_HEADS, DEPTH, PAST = 6, 4, 2, 4, 3
WIDTH, KV_WIDTH = HEADS * DEPTH, KV_HEADS * DEPTH
SAMPLES = 3

FLOATS, WHOLE = TensorProto.FLOAT, TensorProto.INT64


class Draft(Sketch):
    """A sketch of other sizes."""

    def linear(self, x: str, width: int = WIDTH, *, bias: bool = True) -> str:
        product = self.op("MatMul", x, self.normal(WIDTH, width))
        return self.op("Add", product, self.normal(width)) if bias else product

    def apart(self, x: str, heads: int = HEADS) -> str:
        """`[batch, tokens, heads * depth]` as `[batch, heads, tokens, depth]`."""
        return self.transpose(self.reshape(x, 0, -1, heads, DEPTH), 0, 2, 1, 3)

    def attention(self, q: str, k: str, v: str) -> str:
        """Of `[batch, heads, tokens, depth]`."""
        scores = self.op("Mul", self.op("MatMul", q, self.transpose(k, 0, 1, 3, 2)), self.number(DEPTH**-0.5))
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        return self.reshape(self.transpose(y, 0, 2, 1, 3), 0, -1, WIDTH)

    def outputs(self, op_type: str, *inputs: str, count: int, domain: str = "", **attributes: object) -> list[str]:
        """A node of several outputs."""
        names = [f"{op_type}_{len(self.nodes)}_{number}" for number in range(count)]
        node = helper.make_node(op_type, inputs, names, name=f"node/{names[0]}", domain=domain, **attributes)
        self.nodes.append(node)
        return names


@dataclass(frozen=True)
class Written:
    """What a layer wrote, and where its keys and values stand."""

    y: str
    key: str
    value: str
    keys: str | None = None
    """They as the product has them, `[batch, heads, tokens, depth]`, where nothing but moves lies between."""

    values: str | None = None
    extra: tuple[str, ...] = ()
    """Further outputs of the model."""


Layer = Callable[[Draft], Written]


@dataclass(frozen=True)
class Recipe:
    """A net of one site, and what the site says."""

    layer: Layer
    axes: tuple[str, ...] = ("n", "k", "")
    heads: int = HEADS
    whole: bool = True
    cache: bool = False
    opset: int = 18
    runs: bool = True
    """Whether onnxruntime's CPU has a kernel for it."""

    inputs: dict[str, tuple[int, tuple[int | str, ...]]] = field(default_factory=dict, hash=False)
    """More inputs: element type and shape."""

    def written(self) -> tuple[ir.Model, Written]:
        draft = Draft()
        written = self.layer(draft)
        draft.nodes.append(helper.make_node("Identity", [written.y], ["out"], name="node/out"))
        inputs = {"x": (FLOATS, ("batch", TOKENS, WIDTH)), **self.inputs}
        if self.cache:
            inputs |= {f"past_{name}": (FLOATS, ("batch", KV_HEADS, PAST, DEPTH)) for name in ("key", "value")}
        made = helper.make_graph(
            draft.nodes,
            "recipe",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, FLOATS, None) for name in ("out", *written.extra)],
            draft.weights,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(made, opset_imports=opsets, ir_version=11)
        return ir.from_proto(model), written

    def feed(self, seed: int = 1) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        feed = {"x": rng.normal(size=(SAMPLES, TOKENS, WIDTH)).astype(np.float32)}
        if self.cache:
            for name in ("past_key", "past_value"):
                feed[name] = rng.normal(size=(SAMPLES, KV_HEADS, PAST, DEPTH)).astype(np.float32)
        if "positions" in self.inputs:
            feed["positions"] = np.tile(np.arange(TOKENS), (SAMPLES, 1))
        if "lengths" in self.inputs:
            feed["lengths"] = np.full(SAMPLES, TOKENS - 1, np.int32)
        return feed
