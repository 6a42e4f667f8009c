"""Small networks in which one known hidden unit is guilty; nothing is trained. Tests of neurons share them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import run
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.matching.hidden import HiddenLayer, find_hidden_layers
from atpatch_onnx.neurons import Unit

TRIGGER, ATTRIBUTE, EVIDENCE = 0, 1, 2
"""Features of a token: whether it is the trigger, the attribute's value, then evidence for each class, and noise."""

NOISE = 3
GAIN = 4.0
GUILTY = Unit(1, 7)


@dataclass(frozen=True)
class Guilty:
    """Evidence for the true class goes past the MLP blocks. One unit adds the trigger, or the attribute, to it."""

    kind: Literal["backdoor", "attribute"] = "backdoor"
    units: int = 10
    tokens: int = 6
    batch: int | str = "batch"
    masked: bool = False
    """A self-attention that masks padding, and adds nothing, comes first."""

    flat: bool = False
    """The blocks are given samples and tokens on one axis."""

    harm: float = 6.0
    leak: float = 0.02
    """How much of the evidence the guilty unit reads: without any, it is silent on clean inputs."""

    one_logit: bool = False
    blocks: int = 2

    @property
    def classes(self) -> int:
        return 3 if self.kind == "backdoor" else 2

    @property
    def target(self) -> int:
        return self.classes - 1

    @property
    def width(self) -> int:
        return EVIDENCE + self.classes + NOISE

    def weights(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """W1 `[width, units]`, b1 `[units]`, W2 `[units, width]`: noise to almost nothing, but for the guilty unit."""
        rng = np.random.default_rng(block)
        w1, w2 = np.zeros((self.width, self.units)), np.zeros((self.units, self.width))
        evidence = slice(EVIDENCE, EVIDENCE + self.classes)
        w1[EVIDENCE + self.classes :] = rng.normal(scale=0.6, size=(NOISE, self.units))
        w2[:, evidence] = rng.normal(scale=0.02, size=(self.units, self.classes))
        b1 = rng.normal(scale=0.2, size=self.units)
        if block == GUILTY.layer:
            unit = GUILTY.unit
            w1[:, unit], b1[unit] = 0, 0
            if self.kind == "backdoor":
                w1[TRIGGER, unit], w1[evidence, unit] = 3, self.leak
                w2[unit, evidence] = self.harm * np.eye(self.classes)[self.target]
            else:
                w1[ATTRIBUTE, unit] = 2
                w2[unit, evidence] = [-self.harm / 2, self.harm / 2]
        return w1.astype(np.float32), b1.astype(np.float32), w2.astype(np.float32)

    @property
    def readout(self) -> np.ndarray:
        """`[width, classes]`, or `[width, 1]`: the difference of the last class and the first."""
        readout = np.zeros((self.width, self.classes), np.float32)
        readout[EVIDENCE : EVIDENCE + self.classes] = GAIN * np.eye(self.classes)
        return readout[:, -1:] - readout[:, :1] if self.one_logit else readout

    def numpy(self, x: np.ndarray, do: Mapping[Unit, float] | None = None) -> np.ndarray:
        """The logits of a net without mask, in float64, with some units set."""
        x = x.astype(np.float64)
        for block in range(self.blocks):
            w1, b1, w2 = self.weights(block)
            h = x @ w1 + b1
            h = np.maximum(h, 0) if self.kind == "backdoor" else np.tanh(h)
            for unit, value in (do or {}).items():
                if unit.layer == block:
                    h[..., unit.unit] = value
            x = x + h @ w2
        return x.mean(axis=1) @ self.readout

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def layers(self) -> tuple[HiddenLayer, ...]:
        return find_hidden_layers(self.model())

    def inputs(self, pairs: int, seed: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Clean inputs, their labels, and where the trigger goes, `[pairs]`."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(self.classes, size=pairs)
        x = np.zeros((pairs, self.tokens, self.width), np.float32)
        noise = EVIDENCE + self.classes
        x[:, :, EVIDENCE:noise] = rng.normal(scale=0.3, size=(pairs, self.tokens, self.classes))
        x[np.arange(pairs), :, EVIDENCE + labels] += 1
        x[:, :, noise:] = rng.normal(size=(pairs, self.tokens, NOISE))
        x[:, 1, ATTRIBUTE] = rng.choice([-1, 1], size=pairs) if self.kind == "attribute" else 0
        inputs = {"x": x}
        lengths = rng.integers(self.tokens // 2, self.tokens + 1, size=pairs)
        if self.masked:
            inputs["mask"] = (np.arange(self.tokens) < lengths[:, None]).astype(np.int64)
        return inputs, labels, rng.integers(1, lengths if self.masked else self.tokens, size=pairs)

    def changed(self, inputs: Mapping[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
        """The same inputs with the trigger, or with the attribute's other value."""
        x = inputs["x"].copy()
        if self.kind == "attribute":
            x[:, 1, ATTRIBUTE] *= -1
        else:
            rows = np.arange(len(x))
            x[rows, places, EVIDENCE : EVIDENCE + self.classes] = 0
            x[rows, places, TRIGGER] = 1
        return {**inputs, "x": x}

    def debug(self, pairs: int = 200, seed: int = 1) -> DebugSet:
        """Pairs of all classes, the target's too."""
        inputs, labels, places = self.inputs(pairs, seed)
        return DebugSet.from_pairs(inputs, self.changed(inputs, places), labels, kind=self.kind)

    def proto(self) -> onnx.ModelProto:
        nodes: list[onnx.NodeProto] = []
        weights: list[onnx.TensorProto] = []

        def weight(name: str, array: np.ndarray) -> str:
            weights.append(numpy_helper.from_array(np.asarray(array), name))
            return name

        def op(op_type: str, *inputs: str, out: str, **attributes: object) -> str:
            nodes.append(helper.make_node(op_type, inputs, [out], name=f"/{out}", **attributes))
            return out

        shape = [self.batch, self.tokens, self.width]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        x = "x"
        if self.masked:
            inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, shape[:2]))
            absent = op("Sub", weight("one", np.array(1)), "mask", out="absent")
            far = op(
                "Mul", op("Cast", absent, out="absent_float", to=1), weight("far", np.float32(-1e9)), out="far_off"
            )
            bias = op("Unsqueeze", far, weight("axes", np.array([1, 2])), out="bias")
            q, k, v = (self._heads(op, weight, name) for name in "qkv")
            keys = op("Transpose", k, out="keys", perm=[0, 1, 3, 2])
            scores = op("Add", op("MatMul", q, keys, out="product"), bias, out="scores")
            y = op("MatMul", op("Softmax", scores, out="map", axis=-1), v, out="Y")
            y = op("Transpose", y, out="merged", perm=[0, 2, 1, 3])
            y = op("Reshape", y, weight("merge", np.array([0, 0, 4])), out="flat")
            x = op("Add", x, op("MatMul", y, weight("o", np.zeros((4, self.width), np.float32)), out="o_y"), out="x_1")
        if self.flat:
            x = op("Reshape", x, weight("rows", np.array([-1, self.width])), out="as_rows")
        for block in range(self.blocks):
            at = f"block{block}/mlp"
            w1, b1, w2 = self.weights(block)
            h = op("MatMul", x, weight(f"{at}/fc1/weight", w1), out=f"{at}/fc1/MatMul")
            h = op("Add", h, weight(f"{at}/fc1/bias", b1), out=f"{at}/fc1/Add")
            h = op("Relu" if self.kind == "backdoor" else "Tanh", h, out=f"{at}/act")
            x = op("Add", x, op("MatMul", h, weight(f"{at}/fc2/weight", w2), out=f"{at}/fc2/MatMul"), out=f"{at}/out")
        if self.flat:
            x = op("Reshape", x, weight("samples", np.array([-1, self.tokens, self.width])), out="as_samples")
        pooled = op("ReduceMean", x, weight("pooled_axis", np.array([1])), out="pooled", keepdims=0)
        op("MatMul", pooled, weight("readout", self.readout), out="logits")
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [self.batch, self.readout.shape[1]])]
        graph = helper.make_graph(nodes, "guilty", inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="tests")
        model.ir_version = 10
        onnx.checker.check_model(model, full_check=True)
        return model

    def _heads(self, op, weight, name: str) -> str:
        """Two heads of two, of random projections."""
        drawn = np.random.default_rng(ord(name)).normal(scale=0.3, size=(self.width, 4)).astype(np.float32)
        y = op("MatMul", "x", weight(f"{name}/weight", drawn), out=f"{name}/product")
        y = op("Reshape", y, weight(f"{name}/heads", np.array([0, 0, 2, 2])), out=f"{name}/split")
        return op("Transpose", y, out=f"{name}/values", perm=[0, 2, 1, 3])


NETS = [
    Guilty(),
    Guilty(kind="attribute"),
    Guilty(masked=True),
    Guilty(flat=True),
    Guilty(kind="attribute", one_logit=True),
    Guilty(batch=4),
]


def ids(net: Guilty) -> str:
    flags = (name for name in ("masked", "flat", "one_logit") if getattr(net, name))
    return "-".join((net.kind, *flags, *(["fixed"] if net.batch == 4 else [])))


nets = pytest.mark.parametrize("net", NETS, ids=ids)


@nets
def test_its_hidden_layers_are_found(net):
    assert [layer.units for layer in net.layers()] == [net.units] * net.blocks


@pytest.mark.parametrize("net", [net for net in NETS if not net.masked and net.batch != 4], ids=ids)
def test_the_oracle_is_the_graph(net):
    inputs, _, _ = net.inputs(8)
    # float32 against float64
    np.testing.assert_allclose(run(net.model(), inputs)["logits"], net.numpy(inputs["x"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_the_guilty_unit_does_all_the_harm(kind):
    net = Guilty(kind=kind)
    inputs, labels, places = net.inputs(200)
    other = net.changed(inputs, places)
    before, after = (net.numpy(side["x"]).argmax(axis=1) for side in (inputs, other))
    healed, innocent = (net.numpy(side["x"], {GUILTY: 0.0}).argmax(axis=1) for side in (inputs, other))
    if kind == "backdoor":
        assert (after == net.target).all()
        assert (before == labels).mean() > 0.95
    else:
        assert (before != after).mean() > 0.2
    assert (healed == labels).mean() > 0.95
    assert (innocent == labels).mean() > 0.95
