"""How detectors see tokens in a graph: by their own keys, where `matching.places` found them.

Shapes in brackets: B maps, K tokens, F features of a token's key (heads times depth), U units.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.patches.patch import Array, Detector, Places


def read_scores(at: Insertion, place: Place, detector: Detector) -> ir.Value:
    """The score of every token, float `[*tokens, 1]`, the axes of tokens as the place has them.

    One product where the detector is linear, `relu(X W + b) w` where it has a hidden layer.
    """
    own = own_bias(at.graph, place)
    score = _product(at, place, detector.weights, "scores" if detector.is_linear else "units")
    if detector.output is None or detector.bias is None:
        return score
    bias = at.constant("detector_bias", np.asarray(detector.bias + _folded(own, detector), np.float32))
    units = at.op("Relu", at.op("Add", score, bias, name="biased"), name="hidden")
    return at.op("MatMul", units, at.constant("detector_output", detector.output[:, None]), name="scores")


def read_places(at: Insertion, site: AttentionSite, detector: Places) -> ir.Value:
    """The score of every token, float `[B, K, 1]`: the same in every map.

    It is spread over the maps before the threshold is taken off: what optimizers can compute beforehand, a service
    cannot exchange.
    """
    marks = np.asarray(detector.marks, np.float32).reshape(1, -1, 1)
    rest = at.constant("places/tokens", np.array(marks.shape[1:], np.int64))
    sizes = at.op(
        "Concat", samples(at, site, "places"), rest, name="places/sizes", attributes=[ir.AttrInt64("axis", 0)]
    )
    return at.op("Expand", at.constant("places", marks), sizes, name="scores", dtype=ir.DataType.FLOAT)


def read_threshold(graph: ir.Graph, place: Place, detector: Detector | Places) -> Array:
    """What scores are held against, `[1]`; a bias that the operator adds to keys by itself is counted in."""
    own = own_bias(graph, place)
    folded = _folded(own, detector) if isinstance(detector, Detector) and detector.is_linear else 0.0
    threshold = np.asarray([detector.threshold] - np.asarray(folded, np.float32), np.float32).reshape(1)
    return np.where(threshold == 0, np.finfo(np.float32).tiny, threshold)  # optimizers drop the subtraction of a zero


def _folded(own: Array | None, detector: Detector) -> Array:
    return np.zeros(1, np.float32) if own is None else np.asarray(own.reshape(-1) @ detector.weights, np.float32)


def own_bias(graph: ir.Graph, place: Place) -> Array | None:
    """What the operator adds to each feature by itself, `[heads, depth]`; None where it adds nothing."""
    if place.bias is None:
        return None
    tensor = find_value(graph, place.bias).const_value
    assert tensor is not None, "matching saw that it is a weight"
    whole = np.asarray(tensor.numpy(), np.float32)
    return whole[place.bias_start : place.bias_start + place.features].reshape(place.heads, place.depth)


def _product(at: Insertion, place: Place, weights: Array, name: str) -> ir.Value:
    """`X W`, float `[*tokens, U]`: rows of W stand where the features do, and are zero for the others."""
    spread = np.zeros((prod(place.sizes), weights.shape[1]), np.float32)
    spread[place.columns.reshape(-1)] = weights
    return at.op("MatMul", _tokens_first(at, place, name), at.constant("detector", spread), name=name)


def _tokens_first(at: Insertion, place: Place, name: str) -> ir.Value:
    """The tensor of a place, float `[*tokens, features]`."""
    value = dequantized(at, place, find_value(at.graph, place.value), name)
    features = [axis for axis, letters in enumerate(place.axes) if not letters]
    tokens = [axis for axis, letters in enumerate(place.axes) if letters]
    if tokens + features != list(range(len(place.axes))):
        value = at.op("Transpose", value, name=f"{name}/ordered", attributes=[ir.AttrInt64s("perm", tokens + features)])
    if len(features) != 1:
        value = _reshaped(at, value, [0] * len(tokens) + [prod(place.sizes)], f"{name}/flat")
    if place.quantization is None and place.dtype != ir.DataType.FLOAT.name:
        value = at.op("Cast", value, name=f"{name}/read", attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)])
    return value


def dequantized(at: Insertion, place: Place, value: ir.Value, name: str) -> ir.Value:
    """What the whole numbers of a place stand for; floats as they are."""
    return _converted(at, place, value, "DequantizeLinear", f"{name}/dequantized", ir.DataType.FLOAT)


def quantized(at: Insertion, place: Place, value: ir.Value, name: str) -> ir.Value:
    """The reverse of `dequantized`, which gives back each number that it was given."""
    return _converted(at, place, value, "QuantizeLinear", name, ir.DataType[place.dtype])


def _converted(at: Insertion, place: Place, value: ir.Value, op_type: str, name: str, dtype: ir.DataType) -> ir.Value:
    own = place.quantization
    if own is None:
        return value
    scale = at.constant(f"scale_{own.scale!r}", np.array(own.scale, np.float32))
    zero_point = at.constant(
        f"zero_point_{own.zero_point}_{place.dtype}", np.array(own.zero_point), ir.DataType[place.dtype]
    )
    return at.op(op_type, value, scale, zero_point, name=name, shape=place.shape, dtype=dtype, domain=own.domain)


def _reshaped(at: Insertion, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
    return at.op("Reshape", value, at.constant(f"{name}/shape", np.array(shape, np.int64)), name=name)


def in_order(at: Insertion, site: AttentionSite, found: ir.Value, name: str) -> ir.Value:
    """`[*tokens, 1]` of a site's keys, the axes of tokens as the place has them, as `[B, K, 1]`."""
    return _maps_first(at, site, site.key, found, 1, name)


def _maps_first(at: Insertion, site: AttentionSite, place: Place, found: ir.Value, width: int, name: str) -> ir.Value:
    if not place.apart and isinstance(site.keys, int):  # holds for a batch of none, too, unlike what follows
        sizes = [-1, site.keys] if place.order == "nk" else [site.keys, -1]
        found = _reshaped(at, found, [*sizes, width], f"{name}/apart")
    elif not place.apart and (known := _known_maps(at.graph, site)) is not None:
        sizes = [known, -1] if place.order == "nk" else [-1, known]
        found = _reshaped(at, found, [*sizes, width], f"{name}/apart")
    elif place.folded:
        maps = _maps(at, site, name)
        folded = sum(bool(letters) for letters in place.axes) == 1
        rest = _tokens(at, found, maps, name) if folded else at.constant(f"{name}/rest", np.array([-1], np.int64))
        both = [maps, rest] if place.order == "nk" else [rest, maps]
        both.append(at.constant(f"{name}/width", np.array([width], np.int64)))
        whole = at.op("Concat", *both, name=f"{name}/sizes", attributes=[ir.AttrInt64("axis", 0)])
        found = at.op("Reshape", found, whole, name=f"{name}/apart")
    elif not place.apart:
        found = _on_one_axis_each(at, place, found, width, name)
    if place.order == "kn":
        found = at.op("Transpose", found, name=f"{name}/maps_first", attributes=[ir.AttrInt64s("perm", [1, 0, 2])])
    return found


def _on_one_axis_each(at: Insertion, place: Place, found: ir.Value, width: int, name: str) -> ir.Value:
    """All maps on one axis and all tokens on the other, in the order of the place; for any number of either."""
    outer = sum(place.order[0] in letters for letters in place.axes)
    joined = at.op("Flatten", found, name=f"{name}/joined", attributes=[ir.AttrInt64("axis", outer)])
    if width > 1:
        return _reshaped(at, joined, [0, -1, width], f"{name}/apart")
    return at.op("Unsqueeze", joined, at.constant("last", np.array([2], np.int64)), name=f"{name}/apart")


def _tokens(at: Insertion, found: ir.Value, maps: ir.Value, name: str) -> ir.Value:
    """How many tokens each map has of `[maps * tokens, width]`, int64 `[1]`; what -1 would ask for, but of no map."""
    shape = at.op("Shape", found, name=f"{name}/both")
    both = at.op("Gather", shape, at.constant("first", np.array([0], np.int64)), name=f"{name}/all")
    some = at.op("Max", maps, at.constant("one_map", np.array([1], np.int64)), name=f"{name}/some")
    return at.op("Div", both, some, name=f"{name}/tokens")


def _known_maps(graph: ir.Graph, site: AttentionSite) -> int | None:
    """The number of maps, where the model fixes it."""
    if site.parts == 0:
        return 1
    count = _known_samples(graph, site)
    return None if count is None or not isinstance(site.parts, int) else count * site.parts


def _maps(at: Insertion, site: AttentionSite, name: str) -> ir.Value:
    """The number of maps, int64 `[1]`; matching refuses a place that asks for it where it is not known."""
    if site.parts == 1:
        return samples(at, site, name)
    parts = at.constant(f"{name}/parts", np.array([site.parts], np.int64))
    return at.op("Mul", samples(at, site, name), parts, name=f"{name}/maps")


def _known_samples(graph: ir.Graph, site: AttentionSite) -> int | None:
    """The number of samples, where the model fixes it."""
    if site.samples is None:
        return 1
    shape = find_value(graph, site.samples[0]).shape
    size = None if shape is None else shape[site.samples[1]]
    return size if isinstance(size, int) else None


def samples(at: Insertion, site: AttentionSite, name: str) -> ir.Value:
    """The number of samples, int64 `[1]`."""
    if site.samples is None:
        return at.constant(f"{name}/samples", np.array([1], np.int64))
    source, axis = site.samples
    shape = at.op("Shape", find_value(at.graph, source), name=f"{name}/shape")
    which = at.constant("first" if axis == 0 else "samples", np.array([axis], np.int64))
    return at.op("Gather", shape, which, name=f"{name}/samples")


def per_sample(at: Insertion, site: AttentionSite, of_maps: ir.Value, width: int, name: str) -> ir.Value:
    """`[B, K, width]` of maps as `[samples, tokens, width]`: a sample's tokens are those of all its parts."""
    if site.parts == 1:
        return of_maps
    if isinstance(site.columns, int):  # holds for a batch of none, too, unlike what follows
        return _reshaped(at, of_maps, [-1, site.columns, width], name)
    count = _known_samples(at.graph, site)
    if count is not None:
        return _reshaped(at, of_maps, [count, -1, width], name)
    if _share_maps(at.graph, site):
        return _shared_out(at, of_maps, samples(at, site, name), width, name)
    shape = at.op("Shape", of_maps, name=f"{name}/of_maps")
    keys = at.op("Gather", shape, at.constant("second", np.array([1], np.int64)), name=f"{name}/keys")
    both = at.op("Mul", keys, at.constant(f"{name}/parts", np.array([site.parts], np.int64)), name=f"{name}/tokens")
    sizes = at.op(
        "Concat",
        samples(at, site, name),
        both,
        at.constant(f"{name}/width", np.array([width], np.int64)),
        name=f"{name}/sizes",
        attributes=[ir.AttrInt64("axis", 0)],
    )
    return at.op("Reshape", of_maps, sizes, name=name)


def _share_maps(graph: ir.Graph, site: AttentionSite) -> bool:
    """Whether samples share a map, or may for all that is known, and neither they nor their tokens are counted."""
    several = isinstance(site.parts, int) and site.parts > 0
    return not (several or isinstance(site.columns, int)) and _known_samples(graph, site) is None


def _shared_out(at: Insertion, of_maps: ir.Value, count: ir.Value, width: int, name: str) -> ir.Value:
    """`[maps, tokens, width]` as `[samples, tokens, width]`; of no sample, as of one without a token."""
    some = at.op("Max", count, at.constant("one_sample", np.array([1], np.int64)), name=f"{name}/some")
    rest = at.constant(f"{name}/rest", np.array([-1, width], np.int64))
    sizes = at.op("Concat", some, rest, name=f"{name}/sizes", attributes=[ir.AttrInt64("axis", 0)])
    return at.op("Reshape", of_maps, sizes, name=name)


def of_samples(at: Insertion, site: AttentionSite, found: ir.Value, name: str) -> ir.Value:
    """What was made of `per_sample`, `[samples, ...]`, without that one sample where there is none."""
    if site.parts == 1 or not _share_maps(at.graph, site):
        return found
    begin = at.constant("first", np.array([0], np.int64))
    return at.op("Slice", found, begin, samples(at, site, name), begin, name=name)


def read_features(at: Insertion, site: AttentionSite, place: Place, name: str) -> ir.Value:
    """What a fit collects: the keys (or values) of every token, float `[samples, tokens, features]`, heads first."""
    own, columns = own_bias(at.graph, place), place.columns.reshape(-1)
    found = _tokens_first(at, place, name)
    if not np.array_equal(columns, np.arange(prod(place.sizes))):
        where = at.constant(f"{name}/columns", columns)
        found = at.op("Gather", found, where, name=f"{name}/own", attributes=[ir.AttrInt64("axis", -1)])
    if own is not None:
        found = at.op("Add", found, at.constant(f"{name}/bias", own.reshape(-1)), name=f"{name}/biased")
    found = _maps_first(at, site, place, found, place.features, name)
    return per_sample(at, site, found, place.features, f"{name}/per_sample")


def in_place(place: Place, features: NDArray[np.generic]) -> NDArray[np.generic]:
    """Features `[heads, depth]` where they stand in the tensor of a place, zero elsewhere; 1 on the axes of tokens."""
    flat = np.zeros(prod(place.sizes), features.dtype)
    flat[place.columns] = features
    return flat.reshape(place.sizes)
