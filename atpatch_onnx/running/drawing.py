"""Draw inputs that a model takes, of the sizes and types that it declares."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.running.batching import AS_GIVEN, Array, Batching
from atpatch_onnx.running.slots import Slot, slots, undrawable

PAST = 5
"""Positions in a cache whose size is free."""

WAVE = 64
"""Points of a waveform for each of the tokens that it becomes, roughly, where its size is free."""

_CARRIES = {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators whose results are indices where their inputs are."""

_EMBEDDINGS = {"EmbedLayerNormalization": {0: 2, 1: 4}}
"""Operators with separate tables: the table's input by that of the indices."""

_MOST = 2**28
"""Elements of an input."""


def draw_inputs(
    model: ir.Model,
    rng: np.random.Generator,
    *,
    samples: int = 2,
    length: int = 16,
    past: int | None = None,
    batching: Batching = AS_GIVEN,
) -> dict[str, Array]:
    """Inputs of the sizes and types that the model declares.

    Tokens are indices into the smallest table that they look up, and end with what the graph looks for in them (end of
    text); texts are what the graph encodes; masks are ones, but for some padding at the end of the last sample; other
    numbers are normal.

    Args:
        model: The model.
        rng: Where they are drawn from.
        samples: The size of an axis of samples that is free.
        length: The size of any other axis that is free, but for caches and waveforms (`WAVE`).
        past: Positions in caches whose size is free; None: `PAST`, or none where an operator takes several tokens
            behind them of one sample only.
        batching: Where the model has the samples, if not first.

    Raises:
        RunError: An input has no shape, or one that memory cannot hold.
    """
    taken = slots(model)
    shapes = _shapes(taken, samples, length, past, batching)
    for slot in taken:
        shape = shapes[slot.name]
        if min(shape, default=0) < 0 or prod(shape) > _MOST:
            raise undrawable(slot.value, str(list(shape)))
    cached = max((shapes[slot.name][2] for slot in taken if slot.is_cache), default=0)
    return {slot.name: _draw(slot, shapes, cached, rng) for slot in taken}


def input_shapes(
    model: ir.Model, *, samples: int, length: int, batching: Batching = AS_GIVEN
) -> dict[str, tuple[int, ...]]:
    """The shapes of what `draw_inputs` draws."""
    return _shapes(slots(model), samples, length, None, batching)


def _shapes(
    taken: Sequence[Slot], samples: int, length: int, past: int | None, batching: Batching
) -> dict[str, tuple[int, ...]]:
    """Shapes by input; an equal symbol is an equal size, and a mask covers the cache as well."""
    caches = [slot for slot in taken if slot.is_cache]
    fixed = [slot.sizes[2] for slot in caches]
    if past is None:
        past = 0 if samples > 1 and any(slot.is_grouped for slot in caches) else PAST
    earlier = next((size for size in fixed if isinstance(size, int)), past) if caches else 0
    tokens = next((slot.sizes[1] for slot in taken if slot.is_ids and isinstance(slot.sizes[1], int)), length)
    assert isinstance(tokens, int)
    by_symbol: dict[str, int] = {}

    def size_of(slot: Slot, axis: int) -> int:
        size = slot.sizes[axis]
        if isinstance(size, int):
            return size
        if axis == batching.axis(slot.name):
            drawn = samples
        elif slot.is_cache:
            drawn = earlier if axis < 3 else slot.depth or PAST
        elif slot.is_wave and batching.axis(slot.name) == 0:
            drawn = WAVE * length
        elif slot.is_mask and axis == len(slot.sizes) - 1:
            drawn = earlier + tokens
        else:
            drawn = length
        return drawn if size is None else by_symbol.setdefault(size, drawn)

    return {slot.name: tuple(size_of(slot, axis) for axis in range(len(slot.sizes))) for slot in taken}


def _draw(slot: Slot, shapes: Mapping[str, tuple[int, ...]], cached: int, rng: np.random.Generator) -> Array:
    shape, name, kind = shapes[slot.name], slot.name.lower(), slot.dtype.kind
    if slot.is_mask:
        additive = kind not in "biu" and len(shape) == 4
        return np.zeros(shape, slot.dtype) if additive else _mask(shape, slot.dtype)
    if kind == "b":
        return np.zeros(shape, slot.dtype)
    if kind == "O":
        return rng.choice(_texts(slot.value), shape).astype(object)
    if kind not in "iu":
        return rng.normal(size=shape).astype(slot.dtype)
    if "position" in name:
        return np.broadcast_to(cached + np.arange(shape[-1]), shape).astype(slot.dtype)
    if not shape or "seqlens" in name:  # lengths of what was cached before
        tokens = next((other[1] for key, other in shapes.items() if "ids" in key and len(other) == 2), 1)
        total = cached + (tokens - 1 if "seqlens" in name else tokens if "total" in name else 0)
        return np.full(shape, total, slot.dtype)
    if any(word in name for word in ("shapes", "sizes", "grid")):  # rows and columns of patches
        patches = max((other[-1] for key, other in shapes.items() if "mask" in key.lower()), default=1)
        return np.full(shape, int(patches**0.5), slot.dtype)
    return _draw_ids(slot.value, shape, rng).astype(slot.dtype)


def _texts(value: ir.Value) -> list[str]:
    """Texts that the graph has a number for, else some words."""
    for node, _ in value.uses():
        if node.op_type == "LabelEncoder" and "keys_strings" in node.attributes:
            return list(node.attributes["keys_strings"].as_strings())
    return ["one", "two words", "three words here"]


def _mask(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Ones, and zeros for the last quarter of the last sample."""
    mask = np.ones(shape, dtype)
    if len(shape) == 2 and shape[0] > 1:
        mask[-1, shape[1] - shape[1] // 4 :] = 0
    return mask


def _draw_ids(indices: ir.Value, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Indices into the smallest table; those that the graph looks for (end of text) stand once, at the end."""
    uses = list(_uses(indices))
    size = min(_tables(uses), default=2)
    marks = sorted({mark for mark in _marks(uses) if 0 <= mark < size})
    others = size - len(marks)
    ids = rng.integers(others or size, size=shape)
    for mark in marks if others else ():  # counted over the others: a table may be too long to be listed
        ids += ids >= mark
    if shape[-1] > len(marks) > 0:
        ids[..., -len(marks) :] = marks
    return ids


def _uses(indices: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that take these indices, and as which of their inputs."""
    pending, seen = [indices], set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if node.op_type in _CARRIES or (node.op_type == "Where" and index > 0):
                pending.extend(node.outputs)
            yield node, index


def _tables(uses: Iterable[tuple[ir.Node, int]]) -> Iterator[int]:
    """Sizes of the tables that indices look up."""
    for node, index in uses:
        table, axis = None, 0
        if node.op_type == "Gather" and index == 1:
            table, axis = node.inputs[0], node.attributes.get_int("axis", 0)
        elif index in _EMBEDDINGS.get(node.op_type, {}):
            table = node.inputs[_EMBEDDINGS[node.op_type][index]]
        size = table.shape[axis] if table is not None and table.shape is not None and len(table.shape) else None
        if isinstance(size, int):
            yield size


def _marks(uses: Iterable[tuple[ir.Node, int]]) -> Iterator[int]:
    """Indices that the graph compares these with."""
    for node, index in uses:
        if node.op_type == "Equal":
            other = node.inputs[1 - index]
            mark = None if other is None else graph.constant(other)
            if mark is not None and mark.size == 1:
                yield int(mark.numpy().item())
