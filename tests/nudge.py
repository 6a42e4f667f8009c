"""Nudge one token's key where a site says that it stands, and see what moves.

Only that token's column may move, in the map that it is of, at the heads that share its key, and in proportion. So it
is told whether maps, heads and tokens of a place are right, however far behind the attention it lies: rotary
embeddings and norms of keys may come between.
"""

import itertools
from collections.abc import Mapping
from math import prod

import numpy as np
import onnx_ir as ir
from models import run, with_outputs

from atpatch_onnx import graph
from atpatch_onnx.baking.maps import canonical_map, map_outputs, with_maps
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite, Form, Place

Feed = Mapping[str, np.ndarray]

GIVEN = "given"


def entry_positions(place: Place, shape: tuple[int, ...], maps: int) -> np.ndarray:
    """The flat index of each entry of the keys (or values) of such a tensor, `[maps, heads, tokens, depth]`."""
    tokens = [axis for axis, letters in enumerate(place.axes) if letters]
    features = [axis for axis, letters in enumerate(place.axes) if not letters]
    flat = np.arange(prod(shape)).reshape(shape).transpose(tokens + features)
    maps_first = "".join(place.axes).startswith("n")
    flat = flat.reshape(*((maps, -1) if maps_first else (-1, maps)), prod(place.sizes))
    if not maps_first:
        flat = flat.swapaxes(0, 1)
    chosen = flat[..., place.columns.reshape(-1)]
    return chosen.reshape(*chosen.shape[:2], place.heads, place.depth).swapaxes(1, 2)


def entries(array: np.ndarray, place: Place, maps: int) -> np.ndarray:
    """The keys (or values) that a tensor holds, `[maps, heads, tokens, depth]`."""
    return array.reshape(-1)[entry_positions(place, array.shape, maps)]


def given(model: ir.Model, place: Place, dtype: str) -> ir.Model:
    """A copy in which the attention reads the tensor of a place from a new input, `given`."""
    copied = graph.copy(model)
    value = find_value(copied.graph, place.value)
    reader = None if place.reader is None else find_value(copied.graph, place.reader).producer()
    wanted = ir.Value(name=GIVEN, type=ir.TensorType(ir.DataType[dtype]), shape=value.shape)
    for node, index in list(value.uses()):
        if reader in (None, node):
            node.replace_input_with(index, wanted)
    copied.graph.inputs.append(wanted)
    return copied


def assert_places(model: ir.Model, feed: Feed, *, atol: float = 1e-5) -> None:
    """Keys and values of every site are where it says.

    Args:
        model: The base.
        feed: Inputs of it.
        atol: Of sums of weights and products; float32 unless a net says otherwise.
    """
    for site in find_sites(model):
        if site.form is not Form.FUSED:
            _assert_values(model, site, feed, atol)
            _assert_keys(model, site, feed, atol)


def _seen(model: ir.Model, site: AttentionSite, feed: Feed) -> dict[str, np.ndarray]:
    """Keys, values, output and map of a site."""
    shown = with_maps(model, [site], [])
    found = run(with_outputs(shown, [site.key.value, site.value.value, site.output], site.dtype), feed)
    found |= {name.removesuffix("/seen"): array for name, array in found.items()} | dict(feed)
    return {
        "key": found[site.key.value],
        "value": found[site.value.value],
        "Y": found[site.output],
        "P": canonical_map(found[map_outputs([site])[site.name]], site),
    }


def _assert_values(model: ir.Model, site: AttentionSite, feed: Feed, atol: float) -> None:
    """The map times the values is the output, whatever the order of its axes."""
    seen = _seen(model, site, feed)
    P, Y = seen["P"], seen["Y"].astype(np.float64)
    V = entries(seen["value"], site.value, len(P)).astype(np.float64)
    assert P.shape[1] % V.shape[1] == 0, site.name
    new = P[..., P.shape[3] - V.shape[2] :]  # those in a cache come first
    product = new @ np.repeat(V, P.shape[1] // V.shape[1], axis=1)
    if V.shape[2] < P.shape[3]:
        return
    parts = site.parts if isinstance(site.parts, int) and site.parts else 1
    product = product.reshape(-1, parts, *product.shape[1:])  # windows may stand anywhere
    nearest = min(_distance(product, Y, order) for order in itertools.permutations(range(5)))
    assert nearest <= atol * max(1.0, float(np.abs(Y).max())), f"{site.name}: {nearest}"


def _distance(product: np.ndarray, Y: np.ndarray, order: tuple[int, ...]) -> float:
    return float(np.abs(product.transpose(order).reshape(Y.shape) - Y).max())


def _assert_keys(model: ir.Model, site: AttentionSite, feed: Feed, atol: float) -> None:
    """A nudge of one key moves its column in its map at its heads, and leaves the proportions of the others."""
    seen, dtype = _seen(model, site, feed), site.key.dtype
    P, K = seen["P"], seen["key"]
    where = entry_positions(site.key, K.shape, len(P))
    maps, heads, tokens, depth = where.shape
    assert (heads, depth) == (site.key.heads, site.key.depth)
    group, past = P.shape[1] // heads, P.shape[3] - tokens
    session = with_maps(given(model, site.key, dtype), [site], [])
    rng = np.random.default_rng(site.index)
    for n, h, k in {(0, 0, None), (maps - 1, heads - 1, tokens - 1), (maps // 2, heads // 2, None)}:
        if k is None:  # the one that is drawn to most undecidedly
            undecided = P[n, h * group : (h + 1) * group, :, past:]
            k = int((undecided * (1 - undecided)).max(axis=(0, 1)).argmax())
        nudged = K.copy()
        nudged.reshape(-1)[where[n, h, k]] += 1.5 * rng.normal(size=depth).astype(K.dtype)
        outputs = run(session, {**feed, GIVEN: nudged})
        moved = canonical_map(outputs[map_outputs([site])[site.name]], site)
        own = np.zeros(P.shape[:2], bool)
        own[n, h * group : (h + 1) * group] = True
        assert np.array_equal(moved[~own], P[~own]), f"{site.name}: another map or head moved"
        column = past + k
        if P[own][..., column].max() < 1e-3:  # a mask hides it, or the head's
            continue
        assert np.abs(moved[own][..., column] - P[own][..., column]).max() > 1e-4, f"{site.name}: nothing moved"
        before, after = (np.delete(one[own], column, axis=-1) for one in (P, moved))
        # the others keep their proportions: p'_i * sum p = p_i * sum p'
        crossed = after * before.sum(-1, keepdims=True) - before * after.sum(-1, keepdims=True)
        assert np.abs(crossed).max(initial=0.0) <= atol, f"{site.name}: other columns moved on their own"
