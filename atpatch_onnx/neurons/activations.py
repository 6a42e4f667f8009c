"""What hidden units do on the pairs of a debug set: mean, range, and how far apart the two sides are.

Activations are never kept. A batch's are summed up, in float64, as it comes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.maps import canonical_map, map_outputs, with_maps
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.matching.hidden import HiddenLayer
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.neurons.units import Unit
from atpatch_onnx.running.batching import Batching
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

MAX_BATCH = 8
"""Inputs at a time: activations of all layers are outputs at once, 60 megabytes an input in a ViT-B/16, both sides."""

_FLOOR = 1e-3
"""Standard deviations are at least this share of the layer's mean one. A unit that is silent on clean inputs and fires
on a trigger comes first; one that moves by rounding errors does not."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Activations:
    """Of one layer. Padding does not count where the first self-attention tells which tokens are padding."""

    layer: HiddenLayer

    mean: Floats
    """`[units]`, over the tokens of the clean inputs."""

    low: Floats
    """`[units]`, the smallest on the clean inputs."""

    high: Floats
    """`[units]`, the largest on the clean inputs."""

    low_of_both: Floats
    """`[units]`, the smallest on either side."""

    high_of_both: Floats
    """`[units]`, the largest on either side."""

    difference: Floats
    """`[units]`: mean of |counterfactual - clean| over the tokens, in standard deviations of the unit on the clean
    inputs."""


def measure_activations(
    model: ir.Model,
    layers: Sequence[HiddenLayer],
    debug: DebugSet,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
    stage: str = "measuring activations",
) -> tuple[Activations, ...]:
    """Stream the activations of `layers` over both sides of `debug`.

    Args:
        model: The base.
        layers: Hidden layers of it.
        debug: Pairs for it.
        batch_size: Pairs at a time, `MAX_BATCH` at most, and one where tokens may be padding.
        progress: Told after every batch.
        stage: What to call that.
    """
    site = _padding_site(model)
    probed = _with_activations(model, layers, site)
    where = batching(probed)
    hidden = {_output(layer): where.outputs[_output(layer)] for layer in layers}
    session = Session(probed, batching=replace(where, outputs=hidden))
    fixed = _fixed(model, where)
    names = [*hidden] + (list(map_outputs([site]).values()) if site else [])
    alone = 1 if site else MAX_BATCH  # then it does not matter whether samples or tokens come first
    stream = partial(session.stream, outputs=names, batch_size=min(batch_size, alone))
    sums = [_Sums() for _ in layers]
    sides = zip(stream(debug.clean), stream(debug.counterfactual, progress=progress, stage=stage), strict=True)
    for (part, clean), (_, other) in sides:
        count = part.stop - part.start
        run = fixed or count
        seen = [_seen_in(outputs, site) for outputs in (clean, other)]
        for layer, own in zip(layers, sums, strict=True):
            h, h_other = (_of_samples(outputs[_output(layer)], count, run) for outputs in (clean, other))
            own.add(h, h_other, *(_tokens(array, tokens) for array, tokens in zip((h, h_other), seen, strict=True)))
    return tuple(own.activations(layer) for layer, own in zip(layers, sums, strict=True))


def _fixed(model: ir.Model, where: Batching) -> int | None:
    """The batch size, where the model has one."""
    if where.one_by_one:
        return 1
    sizes = [value.shape[where.axis(value.name or "") or 0] for value in model.graph.inputs if value.shape]
    return next((size for size in sizes[:1] if isinstance(size, int)), None)


def most_different(activations: Sequence[Activations], count: int | None) -> tuple[Unit, ...]:
    """The `count` units of all layers whose two sides are farthest apart, None: all of them; in graph order."""
    units = [Unit(layer, unit) for layer, of in enumerate(activations) for unit in range(of.layer.units)]
    farthest = sorted(units, key=lambda unit: (-activations[unit.layer].difference[unit.unit], unit))
    return tuple(sorted(farthest[:count]))


class _Sums:
    """What is kept of one layer while streaming."""

    def __init__(self) -> None:
        self.tokens = self.pairs = 0
        self.total: Floats | float = 0.0
        self.squares: Floats | float = 0.0
        self.apart: Floats | float = 0.0
        self.clean: Floats | None = None
        self.both: Floats | None = None

    def add(self, clean: Array, other: Array, of_clean: NDArray[np.bool_], of_other: NDArray[np.bool_]) -> None:
        """Keep of one batch: activations `[rows, units]` of both sides, and which rows count, bool `[rows]`."""
        apart = np.abs(other.astype(np.float64) - clean)[of_clean & of_other]
        clean, other = clean[of_clean].astype(np.float64), other[of_other].astype(np.float64)
        self.tokens, self.pairs = self.tokens + len(clean), self.pairs + len(apart)
        self.total = self.total + clean.sum(axis=0)
        self.squares = self.squares + np.square(clean).sum(axis=0)
        self.apart = self.apart + apart.sum(axis=0)
        self.clean = _wider(self.clean, clean)
        self.both = _wider(_wider(self.both, clean), other)

    def activations(self, layer: HiddenLayer) -> Activations:
        assert self.clean is not None, "a debug set has pairs, and these have tokens"
        assert self.both is not None
        mean = np.asarray(self.total / self.tokens)
        deviation = np.sqrt(np.maximum(self.squares / self.tokens - np.square(mean), 0.0))
        floor = max(_FLOOR * float(deviation.mean()), float(np.finfo(np.float32).tiny))
        difference = self.apart / max(self.pairs, 1) / np.maximum(deviation, floor)
        (low, high), (low_of_both, high_of_both) = self.clean, self.both
        return Activations(layer, mean, low, high, low_of_both, high_of_both, difference)


def _wider(bounds: Floats | None, rows: Floats) -> Floats | None:
    """Smallest and largest so far, `[2, units]`, of these rows `[rows, units]` as well."""
    if not len(rows):
        return bounds
    low, high = rows.min(axis=0), rows.max(axis=0)
    if bounds is not None:
        low, high = np.minimum(bounds[0], low), np.maximum(bounds[1], high)
    return np.stack([low, high])


def _output(layer: HiddenLayer) -> str:
    return own_name(layer.scope, "probe/hidden")


def _seen_in(outputs: Mapping[str, Array], site: AttentionSite | None) -> NDArray[np.bool_] | None:
    """Which tokens are no padding, bool `[samples, tokens]`, where a map tells: those that some query sees."""
    if site is None:
        return None
    (name,) = map_outputs([site]).values()
    return np.asarray((canonical_map(outputs[name], site) > 0).any(axis=(1, 2)))


def _with_activations(model: ir.Model, layers: Sequence[HiddenLayer], site: AttentionSite | None) -> ir.Model:
    """A copy of `model` with the activations of `layers`, and the map of `site`, as outputs in float32."""
    probed = with_maps(model, [site], []) if site else graphs.copy(model)
    for layer in layers:
        at = Insertion(probed.graph, layer.scope)
        h = find_value(probed.graph, layer.value)
        to = ir.AttrInt64("to", ir.DataType.FLOAT)
        output = at.op("Cast", h, name="probe/hidden", attributes=[to])
        output.dtype = ir.DataType.FLOAT
        probed.graph.outputs.append(output)
    return probed


def _padding_site(model: ir.Model) -> AttentionSite | None:
    """The first self-attention, if something can be masked in it: it tells which tokens are padding."""
    first = next((site for site in find_sites(model) if site.self_attention and site.parts == 1), None)
    return first if first is not None and first.masked else None


def _of_samples(h: Array, count: int, run: int) -> Array:
    """`h` as `[rows, units]`, without the rows of samples that filled up a batch of `run` to its fixed size."""
    folded = h.shape[0] != count and h.shape[0] % run == 0  # samples and tokens on one axis
    if folded:
        h = h[: h.shape[0] // run * count]
    return h.reshape(-1, h.shape[-1])


def _tokens(rows: Array, seen: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which rows `[rows, units]` count: those of tokens that are seen, where there is a row a token; else all."""
    if seen is None or seen.size != len(rows):
        return np.ones(len(rows), bool)
    return seen.ravel()
