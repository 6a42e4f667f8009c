"""Small attention nets, random patches and one way to run a model: what these tests share.

The nets are built with onnx.helper, so that nothing of the package is used to make what the package is tested on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.fitting.options import Kind
from atpatch_onnx.graph.insertion import replaced_value
from atpatch_onnx.graph.names import REPLACES_KEY, SITE_KEY
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.measuring import drawn
from atpatch_onnx.patches.patch import Detector, Patch, SitePatch

FORMS = (True, False)
"""Both ways a patch is written into a graph: with an `If` or without."""

NEVER = drawn.NEVER
"""A threshold that no score exceeds."""

ALWAYS = -drawn.NEVER
"""A threshold that every token exceeds."""

IR_OF_OPSET = {15: 8, 17: 8, 18: 8, 23: 11, 24: 12, 25: 13, 26: 13}


# Nets


@dataclass(frozen=True)
class Net:
    """A stack of self-attention layers `[batch, tokens, width]` -> the same, with residual sums."""

    opset: int = 18
    form: str = "softmax"
    """`softmax`, `guarded` (SDPA's Where(IsNaN)), `attention` (4-D op) or `packed` (3-D op)."""

    layers: int = 2
    heads: int = 2
    kv_heads: int = 2
    depth: int = 4
    batch: int | str = "batch"
    tokens: int | str = "tokens"
    bias: bool = False
    """A model input `bias` `[batch, 1, tokens, tokens]`, added to the scores."""

    causal: bool = False
    """Causality of the op itself (forms `attention` and `packed`)."""

    past: int | None = None
    """Length of the model inputs `past_key` and `past_value` of the first layer (forms `attention`, `packed`)."""

    mode: int | None = None
    """The first layer's op already has a 4th output, of this `qk_matmul_output_mode`, and the model hands it out."""

    y_is_output: bool = False
    """The first site's output is an output of the model as well."""

    y_in_if: bool = False
    """The first site's output is used inside an If of the model."""

    mlp: int = 0
    """Hidden units of an MLP behind each attention; 0: none."""

    half: bool = False
    ir_version: int | None = None
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.depth

    def proto(self) -> onnx.ModelProto:
        return _Builder(self).build()

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def feed(self, rng: np.random.Generator, batch: int = 3, tokens: int = 5) -> dict[str, np.ndarray]:
        """Random inputs; a bias hides nothing."""
        batch = self.batch if isinstance(self.batch, int) else batch
        tokens = self.tokens if isinstance(self.tokens, int) else tokens
        kind = np.float16 if self.half else np.float32
        feed = {"x": rng.normal(size=(batch, tokens, self.width)).astype(kind)}
        if self.bias:
            feed["bias"] = np.zeros((batch, 1, tokens, tokens), kind)
        if self.past is not None:
            for name in ("past_key", "past_value"):
                feed[name] = rng.normal(size=(batch, self.kv_heads, self.past, self.depth)).astype(kind)
        return feed


class _Builder:
    def __init__(self, net: Net) -> None:
        self.net = net
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(net.seed)
        self.kind = TensorProto.FLOAT16 if net.half else TensorProto.FLOAT
        self.extra: list[onnx.ValueInfoProto] = []

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, name: str, *shape: int, scale: float = 0.4) -> str:
        array = self.rng.normal(size=shape) * scale
        return self.weight(name, array.astype(np.float16 if self.net.half else np.float32))

    def op(self, op_type: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [out], name=f"node/{out}", **attributes))
        return out

    def info(self, name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.kind, shape)

    def build(self) -> onnx.ModelProto:
        net = self.net
        x = "x"
        for layer in range(net.layers):
            x = self.layer(layer, x)
        self.op("Identity", x, out="hidden")
        self.op("Gather", "hidden", self.weight("first", np.array(0, np.int64)), out="pooled", axis=1)
        self.op("MatMul", "pooled", self.normal("classes", net.width, 3), out="logits")
        inputs = [self.info("x", net.batch, net.tokens, net.width)]
        if net.bias:
            inputs.append(self.info("bias", net.batch, 1, net.tokens, net.tokens))
        if net.past is not None:
            inputs += [
                self.info(name, net.batch, net.kv_heads, net.past, net.depth) for name in ("past_key", "past_value")
            ]
        outputs = [self.info("logits", net.batch, 3), self.info("hidden", net.batch, net.tokens, net.width)]
        made = helper.make_graph(self.nodes, "net", inputs, outputs + self.extra, self.weights)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", net.opset)], producer_name="tests")
        model.ir_version = net.ir_version or IR_OF_OPSET[net.opset]
        onnx.checker.check_model(model, full_check=True)
        return model

    def layer(self, layer: int, x: str) -> str:
        net, at = self.net, f"layer{layer}"
        q = self.linear(f"{at}/q", x, net.heads)
        k = self.linear(f"{at}/k", x, net.kv_heads)
        v = self.linear(f"{at}/v", x, net.kv_heads)
        y = self.fused(layer, q, k, v) if net.form in ("attention", "packed") else self.decomposed(layer, q, k, v)
        if layer == 0:
            self.special_uses(y)
        if net.form != "packed":
            y = self.op("Transpose", y, out=f"{at}/merged", perm=[0, 2, 1, 3])
            y = self.op("Reshape", y, self.shape(f"{at}/merge", 0, 0, net.width), out=f"{at}/flat")
        y = self.op("MatMul", y, self.normal(f"{at}/o", net.width, net.width), out=f"{at}/projected")
        x = self.op("Add", x, y, out=f"{at}/out")
        return self.mlp(at, x) if net.mlp else x

    def mlp(self, at: str, x: str) -> str:
        width, units = self.net.width, self.net.mlp
        h = self.op("MatMul", x, self.normal(f"{at}/mlp/up", width, units), out=f"{at}/mlp/product")
        h = self.op("Add", h, self.normal(f"{at}/mlp/bias", units), out=f"{at}/mlp/sum")
        h = self.op("Relu", h, out=f"{at}/mlp/h")
        y = self.op("MatMul", h, self.normal(f"{at}/mlp/down", units, width), out=f"{at}/mlp/projected")
        return self.op("Add", x, y, out=f"{at}/mlp/out")

    def linear(self, name: str, x: str, heads: int) -> str:
        """A projection with bias; split into heads unless the op takes them packed."""
        net = self.net
        width = heads * net.depth
        y = self.op("MatMul", x, self.normal(f"{name}/weight", net.width, width), out=f"{name}/product")
        y = self.op("Add", y, self.normal(f"{name}/bias", width), out=f"{name}/sum")
        if net.form == "packed":
            return y
        y = self.op("Reshape", y, self.shape(f"{name}/heads", 0, 0, heads, net.depth), out=f"{name}/split")
        return self.op("Transpose", y, out=f"{name}/values", perm=[0, 2, 1, 3])

    def shape(self, name: str, *sizes: int) -> str:
        return self.weight(name, np.array(sizes, np.int64))

    def decomposed(self, layer: int, q: str, k: str, v: str) -> str:
        net, at = self.net, f"layer{layer}"
        kind = np.float16 if net.half else np.float32
        if net.kv_heads != net.heads:
            k, v = (self.repeat(value) for value in (k, v))
        k = self.op("Transpose", k, out=f"{at}/keys", perm=[0, 1, 3, 2])
        scores = self.op("MatMul", q, k, out=f"{at}/product")
        scale = self.weight(f"{at}/scale", np.array(net.depth**-0.5, kind))
        scores = self.op("Mul", scores, scale, out=f"{at}/scaled")
        if net.bias:
            scores = self.op("Add", scores, "bias", out=f"{at}/biased")
        weights = self.op("Softmax", scores, out=f"{at}/map", axis=-1)
        if net.form == "guarded":
            nan = self.op("IsNaN", weights, out=f"{at}/nan")
            zero = self.weight(f"{at}/zero", np.array(0, kind))
            weights = self.op("Where", nan, zero, weights, out=f"{at}/guarded")
        return self.op("MatMul", weights, v, out=f"{at}/Y")

    def repeat(self, value: str) -> str:
        """Grouped heads, the way exporters write them: unsqueeze, expand, reshape."""
        net = self.net
        groups = net.heads // net.kv_heads
        y = self.op("Unsqueeze", value, self.shape(f"{value}/two", 2), out=f"{value}/unsqueezed")
        y = self.op("Expand", y, self.shape(f"{value}/groups", 1, 1, groups, 1, 1), out=f"{value}/expanded")
        return self.op("Reshape", y, self.shape(f"{value}/heads", 0, net.heads, -1, net.depth), out=f"{value}/repeated")

    def fused(self, layer: int, q: str, k: str, v: str) -> str:
        net, at = self.net, f"layer{layer}"
        past = net.past is not None and layer == 0
        inputs = [q, k, v, "bias" if net.bias else "", *(("past_key", "past_value") if past else ())]
        while not inputs[-1]:
            inputs.pop()
        outputs = [f"{at}/Y"]
        total = f"{net.past}+tokens" if past else net.tokens
        if past:
            outputs += ["present_key", "present_value"]
            self.extra += [self.info(name, net.batch, net.kv_heads, total, net.depth) for name in outputs[1:]]
        attributes: dict[str, Any] = {"is_causal": int(net.causal)}
        if net.form == "packed":
            attributes |= {"q_num_heads": net.heads, "kv_num_heads": net.kv_heads}
        if net.mode is not None and layer == 0:
            outputs += [""] * (3 - len(outputs)) + ["scores"]
            attributes["qk_matmul_output_mode"] = net.mode
            self.extra.append(self.info("scores", net.batch, net.heads, net.tokens, total))
        self.nodes.append(helper.make_node("Attention", inputs, outputs, name=f"node/{at}/Y", **attributes))
        return f"{at}/Y"

    def special_uses(self, y: str) -> None:
        net = self.net
        packed = net.form == "packed"
        shape = (net.batch, net.tokens, net.width) if packed else (net.batch, net.heads, net.tokens, net.depth)
        if net.y_is_output:
            self.extra.append(self.info(y, *shape))
        if net.y_in_if:
            branches = {
                name: helper.make_graph(
                    [helper.make_node(op, [y], [f"{name}/result"], name=f"node/{name}")],
                    name,
                    [],
                    [helper.make_tensor_value_info(f"{name}/result", self.kind, None)],
                )
                for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
            }
            sum_ = self.op("ReduceSum", "x", out="x_sum", keepdims=0)
            zero = self.weight("if/zero", np.array(0, np.float16 if net.half else np.float32))
            self.op("Greater", sum_, zero, out="if/condition")
            self.op("If", "if/condition", out="from_if", **branches)
            self.extra.append(self.info("from_if", *shape))


# Running


def session(model: ir.Model | onnx.ModelProto | bytes, *, optimize: bool = True) -> ort.InferenceSession:
    """A quiet session on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, ir.Model):
        model = graph.to_bytes(model)
    elif isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: Any, feed: Mapping[str, np.ndarray], *, optimize: bool = True) -> dict[str, np.ndarray]:
    """The outputs by name."""
    opened = model if isinstance(model, ort.InferenceSession) else session(model, optimize=optimize)
    return dict(zip((output.name for output in opened.get_outputs()), opened.run(None, dict(feed)), strict=True))


def with_outputs(model: ir.Model, names: Sequence[str], dtype: str = "FLOAT") -> ir.Model:
    """A copy that returns these values as well; `dtype` for those whose type the graph does not tell."""
    seen = graph.copy(model)
    values = {value.name: value for node in seen.graph for value in node.outputs}
    values |= {value.name: value for value in (*seen.graph.inputs, *seen.graph.initializers.values())}
    have = {output.name for output in seen.graph.outputs}
    for name in names:
        if name in have:
            continue
        if values[name].producer() is None:  # an input cannot be an output
            node = ir.Node("", "Identity", [values[name]])
            node.outputs[0].name, node.outputs[0].type = f"{name}/seen", values[name].type
            seen.graph.append(node)
            seen.graph.outputs.append(node.outputs[0])
        else:
            if values[name].type is None:
                values[name].type = ir.TensorType(ir.DataType[dtype])
            seen.graph.outputs.append(values[name])
    return seen


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal bit for bit: -0 differs from 0, a NaN equals itself."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


# Patches


def draw_detector(
    site: AttentionSite, rng: np.random.Generator, *, kind: Kind = "linear", threshold: float = NEVER
) -> Detector:
    """A random detector of a site's keys; every token gets a separate score."""
    return drawn.draw_detector(site.key, rng, kind, threshold)


def draw_site_patch(
    site: AttentionSite,
    rng: np.random.Generator,
    *,
    threshold: float = NEVER,
    detects: bool = True,
    redistributes: bool = True,
    kind: Kind = "linear",
) -> SitePatch:
    """What a fit would find out about a site, drawn at random."""
    detector = draw_detector(site, rng, kind=kind, threshold=threshold)
    neutral = drawn.draw_neutral(site, rng)
    return SitePatch(site.name, detector if detects else None, neutral if redistributes else None)


def draw_patch(model: ir.Model, seed: int = 0, *, detects: Sequence[bool] | None = None, **options: Any) -> Patch:
    """A random patch of all sites; by default every one detects and redistributes."""
    rng = np.random.default_rng(seed)
    sites = find_sites(model)
    entries = (draw_site_patch(site, rng, detects=detects is None or detects[site.index], **options) for site in sites)
    return Patch(graph.fingerprint(model), tuple(entries), {"drawn": seed})


def with_threshold(patch: Patch, number: int, threshold: float) -> Patch:
    """The same patch with another threshold at its site `number`."""
    detector = patch.sites[number].detector
    assert detector is not None
    changed = replace(patch.sites[number], detector=replace(detector, threshold=float(np.float32(threshold))))
    return replace(patch, sites=(*patch.sites[:number], changed, *patch.sites[number + 1 :]))


def margins(model: ir.Model, patch: Patch, number: int, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far each token of the site `number` is above its own threshold, `[maps, tokens]`."""
    baked = bake(model, patch, conditional=False)
    name = read_record(baked).sites[number].own
    assert name is not None, "the site detects"
    return run(with_outputs(baked, [name]), feed)[name][..., 0]


def fire_on_some(model: ir.Model, patch: Patch, feed: Mapping[str, np.ndarray], share: float | None = None) -> Patch:
    """The same patch with thresholds that some tokens exceed and some do not.

    A threshold lies in the middle of a gap between two scores: of the widest gap, or, given a `share`, of the one that
    lets about this share of the tokens fire. Sites are set one after the other, since flags of one move the next.
    """
    for number, entry in enumerate(patch.sites):
        if entry.detector is None:
            continue
        patch = with_threshold(patch, number, 0.0)
        scores = np.unique(margins(model, patch, number, feed))
        if len(scores) < 2:
            raise AssertionError(f"site {entry.site}: all tokens have the same score")
        gaps = np.diff(scores)
        at = int(gaps.argmax()) if share is None else min(int(len(gaps) * (1 - share)), len(gaps) - 1)
        if gaps[at] < 1e-5:  # far above float32's rounding of scores: the flags do not hang by a rounding error
            at = int(gaps.argmax())
        patch = with_threshold(patch, number, (scores[at] + scores[at + 1]) / 2)
    return patch


# What a site of a patched model must have computed


@dataclass(frozen=True, eq=False)
class Seen:
    """A redistributing site of a patched model, for some inputs: keys and values `[maps, heads, tokens, depth]`."""

    key: np.ndarray
    """As the base computes it."""

    replaced_key: np.ndarray
    value: np.ndarray
    replaced_value: np.ndarray
    flags: np.ndarray
    """`[maps, tokens]`."""


def see(patched: ir.Model, base: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, Seen]:
    """What a patched model computes at its redistributing sites, by name, brought to the same axes everywhere."""
    chosen = [site for site in read_record(patched).sites if site.redistributes]
    places = {site.name: site for site in find_sites(base)}
    handed = {}
    for node in patched.graph:
        if REPLACES_KEY in node.metadata_props:
            value = replaced_value(node)
            assert value is not None
            handed[node.metadata_props[SITE_KEY], node.metadata_props[REPLACES_KEY]] = (
                str(value.name),
                str(node.outputs[0].name),
            )
    names = [name for pair in handed.values() for name in pair] + [site.margin for site in chosen]
    (dtype,) = {site.dtype for site in places.values()}
    found = run(with_outputs(patched, list(dict.fromkeys(names)), dtype), feed)
    found |= {name.removesuffix("/seen"): array for name, array in found.items()}
    result = {}
    for site in chosen:
        key, value = places[site.site].key, places[site.site].value
        pairs = [[found[name] for name in handed[site.site, place.value]] for place in (key, value)]
        maps = len(found[site.margin])
        laid_out = [
            [in_axes(array, place, maps) for array in pair] for pair, place in zip(pairs, (key, value), strict=True)
        ]
        result[site.site] = Seen(*laid_out[0], *laid_out[1], flags=found[site.margin][..., 0] > 0)
    return result


def in_axes(array: np.ndarray, place: Place, maps: int | None = None) -> np.ndarray:
    """The keys or values that a tensor holds, `[maps, heads, tokens, depth]`.

    Args:
        array: The tensor.
        place: Where it holds them.
        maps: How many there are; None where they have a separate axis.
    """
    tokens = [axis for axis, letters in enumerate(place.axes) if letters]
    features = [axis for axis, letters in enumerate(place.axes) if not letters]
    maps = array.shape[place.axes.index("n")] if maps is None else maps
    maps_first = "".join(place.axes).startswith("n")
    flat = array.transpose(tokens + features)
    flat = flat.reshape(*((maps, -1) if maps_first else (-1, maps)), prod(place.sizes))
    if not maps_first:
        flat = flat.swapaxes(0, 1)
    return flat[..., place.columns.reshape(-1)].reshape(*flat.shape[:2], place.heads, place.depth).swapaxes(1, 2)
