"""On which axis of a model's inputs and outputs the samples are.

Most exports have them first. torch's `nn.MultiheadAttention` and `nn.TransformerEncoder` have the sequence first by
default, and some graphs take one sample, without an axis for it. Attention tells: what the keys of a map are positions
of is no sample, and what each map is one of may be.

    axes of inputs that tokens, and that maps, come from  ->  an axis of samples for each input  ->  for each output
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx.matching.provenance import Source, factors, roots
from atpatch_onnx.matching.tokenizers import takes_one_text
from atpatch_onnx.matching.view import View, given_inputs, view, with_batch
from atpatch_onnx.running.batching import Array, Batching
from atpatch_onnx.running.drawing import draw_inputs

_Axes = frozenset[tuple[str, int]]
"""Axes of inputs, by the input's name."""


@dataclass(frozen=True)
class _Evidence:
    """What attention says of the inputs."""

    tokens: _Axes
    """What keys are positions of."""

    maps: _Axes
    """What there is a map for each of."""

    whole: bool
    """Whether of every axis of maps it is known what it comes from."""


def look(model: ir.Model) -> View:
    """Look at a model: its shapes, what is constant in it, and where its samples are."""
    seen = view(model)
    return with_batch(seen, _of_inputs(seen))


def batching(model: ir.Model) -> Batching:
    """How samples are given to a model, and taken from it."""
    seen = look(model)
    outputs = {str(output.name): _of_output(output, seen) for output in model.graph.outputs}
    return Batching(seen.batch, outputs, alone=any(takes_one_text(node) for node in model.graph))


def drawn_inputs(model: ir.Model, rng: np.random.Generator) -> dict[str, Array]:
    """A few samples, drawn as the model takes them; errors as in `draw_inputs`."""
    return draw_inputs(model, rng, batching=batching(model))


def _of_inputs(seen: View) -> dict[str, int | None]:
    """The axis of samples of each input: as attention tells, else where others have the same symbol, else the first."""
    evidence = _evidence(seen)
    told = {name: _told(name, evidence, seen) for name in given_inputs(seen) if _is_told(name, evidence)}
    shapes = {name: seen.inferred.shapes.get(name) for name in given_inputs(seen)}
    symbols = {(shapes[name] or ())[axis] for name, axis in told.items() if axis is not None}
    alone = bool(told) and set(told.values()) == {None}
    return {name: told[name] if name in told else _as_others(shape, symbols, alone) for name, shape in shapes.items()}


def _as_others(shape: tuple[int | str | None, ...] | None, symbols: set[int | str | None], alone: bool) -> int | None:
    """The axis of samples of an input that no attention tells of; `alone` where no other input has one."""
    if alone or shape == ():
        return None
    return next((axis for axis, size in enumerate(shape or ()) if isinstance(size, str) and size in symbols), 0)


def _is_told(name: str, evidence: _Evidence) -> bool:
    return any(name == other for other, _ in evidence.tokens | evidence.maps)


def _told(name: str, evidence: _Evidence, seen: View) -> int | None:
    """The first axis, but where no map is one of its entries: then an axis of maps, or none.

    There is none where the first axis is one of tokens, or of neither where all is known; where tokens come from the
    first and from others, all samples are in one sequence.
    """
    tokens, maps = ({axis for other, axis in axes if other == name} for axes in (evidence.tokens, evidence.maps))
    single = seen.inferred.sizes.get(name, (1,))[0] == 1 and 0 not in tokens
    if single or 0 in maps or (0 in tokens and len(tokens) > 1):
        return 0
    if maps - tokens:
        return min(maps - tokens)
    return None if tokens == {0} or (evidence.whole and not maps) else 0


def _evidence(seen: View) -> _Evidence:
    """What every attention, and whatever else weighs positions by a softmax, says of the inputs."""
    looked_at = [found for node in seen.model.graph for found in _looked_at(node, seen)]
    maps = [(value, axis) for value, last, axes in looked_at for axis in axes if not _one_map(value, last, seen)]
    return _Evidence(
        tokens=roots(((value, axis) for value, axis, _ in looked_at), seen),
        maps=roots(maps, seen),
        whole=all(_is_known(value, axis, seen) for value, axis in maps),
    )


def _one_map(scores: ir.Value, keys: int, seen: View) -> bool:
    """Whether scores of two axes are one map, of queries and keys, whose keys stand on an input's first axis."""
    return seen.rank(scores) == 2 and any(axis == 0 for _, axis in roots([(scores, keys)], seen))


def _is_known(value: ir.Value, axis: int, seen: View) -> bool:
    sizes = seen.sizes(value)
    return sizes is not None and (sizes[axis] == 1 or factors(value, axis, seen) is not None)


def _looked_at(node: ir.Node, seen: View) -> Iterator[tuple[ir.Value, int, range]]:
    """A tensor of an attention, its axis of tokens, and its axes of maps."""
    if node.op_type.endswith("Softmax"):
        scores, rank = node.inputs[0], seen.rank(node.inputs[0]) or 0
        axis = node.attributes.get_int("axis", -1)
        if scores is not None and rank > 1 and axis % rank == rank - 1:
            yield scores, rank - 1, range(max(rank - 2, 1))
    elif node.op_type == "Attention" and node.domain == "":
        for keys in node.inputs[1:2]:
            rank = seen.rank(keys) or 0
            if keys is not None and rank in (3, 4):
                yield keys, rank - 2, range(1)
    elif node.op_type in ("MultiHeadAttention", "GroupQueryAttention", "Attention"):
        for operand in node.inputs[:2]:
            if operand is not None and seen.rank(operand) == 3:
                yield operand, 1, range(1)
    elif node.op_type == "PagedAttention":
        for operand in node.inputs[:2]:
            if operand is not None and seen.rank(operand) == 2:
                yield operand, 0, range(0)


def _of_output(output: ir.Value, seen: View) -> int | None:
    """The axis of samples of an output: traced back to that of an input, or of their number; None: there is none."""
    sizes = seen.sizes(output) or ()
    traced = [factors(output, axis, seen) or () for axis in range(len(sizes))]
    for axis, found in enumerate(traced):
        if [factor.source for factor in found] == [Source.SAMPLES]:
            return axis
    if set(seen.batch.values()) == {None}:
        return 0 if sizes[:1] == (1,) else None
    same = [axis for axis, size in enumerate(sizes) if size == seen.samples]
    return same[0] if len(same) == 1 else 0
