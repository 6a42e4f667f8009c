"""What the leading axes of a map are: samples, parts of a sample, heads; folded into one axis or on their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.provenance import Factor, Source, factors
from atpatch_onnx.matching.sites import Dim
from atpatch_onnx.matching.view import View


@dataclass(frozen=True)
class Axis:
    """A leading axis of a map, and the tensors in which it can be followed back."""

    size: Dim
    traces: tuple[tuple[ir.Value, int], ...]


@dataclass(frozen=True)
class Leading:
    """The letters of the leading axes (see `atpatch_onnx.matching.layout`)."""

    letters: tuple[str, ...]
    heads: Dim
    parts: Dim
    """Maps of one sample; 0 where samples share a map, None where it is not known."""


def name_leading(axes: Sequence[Axis], view: View) -> Leading | str:
    """The letters of a map's leading axes, or why they cannot be told."""
    traced: list[tuple[Factor, ...] | None] = []
    for axis in axes:
        traced.append(_factors(axis, view, known=any(_has(Source.SAMPLES, before) for before in traced)))
    found = _without_repeats(traced, view)
    unseen = not any(_has(Source.SAMPLES, of_axis) for of_axis in found)
    if axes and unseen and axes[0].size in view.batches:  # lost on the way, and as many as the samples
        found[0] = None
    if None in found:
        found = _by_position(axes, found, view)
    if [[factor.source for factor in factors or ()] for factors in found] == [[Source.SAMPLES], [Source.PARTS]]:
        found[1] = (Factor(prod(factor.size for factor in found[1] or ()), Source.HEADS),)  # an input brings them apart
    if None in found:
        shown = ", ".join(str(axis.size) for axis in axes)
        return f"it cannot be told which of the axes [{shown}] before its queries and keys are samples and heads"
    letters = ["".join(factor.source for factor in factors) for factors in found if factors is not None]
    sizes = {f.source: f.size for factors in found if factors is not None for f in factors}
    spread = "".join(letters)
    heads = prod(f.size for factors in found for f in factors or () if f.source is Source.HEADS)
    if spread.count("h") == 2:  # heads, and the heads that share keys and values
        where = max(index for index, own in enumerate(letters) if "h" in own)
        letters[where] = letters[where][::-1].replace("h", "g", 1)[::-1]
        spread = "".join(letters)
    if any(spread.count(letter) > 1 for letter in spread):
        return "its samples, parts or heads are spread over several axes that belong together"
    parts: Dim = sizes.get(Source.PARTS, 1)
    named, parts = _samples(letters, parts, view)
    parts = _symbolic_parts(axes, named, parts, heads)
    if parts is None and any("w" in own and len(own) > 1 for own in named):
        return "the number of its parts, which share an axis with samples or heads, is not fixed"
    return Leading(tuple(named), _symbolic_heads(axes, named, heads), parts)


def _has(source: Source, traced: Sequence[Factor] | None) -> bool:
    return any(factor.source is source for factor in traced or ())


def _factors(axis: Axis, view: View, *, known: bool) -> tuple[Factor, ...] | None:
    """The first trace without parts, if there is one: a cache of keys and values is an input, its heads unmarked.

    Where the samples are `known` to be another axis, a trace that names them is a mask's, whose first axis it is. What
    one trace calls copies and another one parts are parts, all of which are asked the same queries.
    """
    found = [traced for value, index in axis.traces if (traced := factors(value, index, view)) is not None]
    others = [traced for traced in found if not (known and _has(Source.SAMPLES, traced))] or found
    plain = [traced for traced in others if not _has(Source.PARTS, traced)]
    best = next(iter(plain or others), None)
    return best if best is None else next((traced for traced in others if _copies_for_parts(best, traced)), best)


def _copies_for_parts(one: Sequence[Factor], other: Sequence[Factor]) -> bool:
    """Whether two traces are the same but for copies in one that are parts in the other."""
    same = [factor.size for factor in one] == [factor.size for factor in other]
    unlike = {(a.source, b.source) for a, b in zip(one, other, strict=False) if a.source is not b.source}
    return same and unlike == {(Source.REPEATS, Source.PARTS)}


def _without_repeats(found: Sequence[tuple[Factor, ...] | None], view: View) -> list[tuple[Factor, ...] | None]:
    """Copies are samples where nothing else is, and as many as these; else they are heads that share keys and values.

    What is copied for each head is a head itself, also where keys and values are inputs of the model.
    """
    unseen = not any(_has(Source.SAMPLES, of_axis) for of_axis in found)
    result: list[tuple[Factor, ...] | None] = []
    for of_axis in found:
        named: list[Factor] = []
        for factor in of_axis or ():
            source, size = factor.source, factor.size
            if source is Source.REPEATS:
                source = Source.SAMPLES if unseen and not named and size == view.samples else Source.HEADS
                unseen = unseen and source is not Source.SAMPLES
                if source is Source.HEADS and [part.source for part in named] == [Source.PARTS]:
                    size *= named.pop().size
            if named and named[-1].source is source:
                size *= named.pop().size
            named.append(Factor(size, source))
        result.append(None if of_axis is None else tuple(named))
    return result


def _by_position(
    axes: Sequence[Axis], found: Sequence[tuple[Factor, ...] | None], view: View
) -> list[tuple[Factor, ...] | None]:
    """What is not known from the flow of data: exporters write [samples, heads, queries, keys] by far most often."""
    usual = {2: (Source.SAMPLES, Source.HEADS), 1: (Source.SAMPLES,)}.get(len(axes), ())
    result = list(found)
    for index, source in enumerate(usual):
        size = axes[index].size
        is_batch = size in view.batches
        if result[index] is None and (source is Source.HEADS or is_batch or (len(axes) == 2 and size is None)):
            result[index] = (Factor(size if isinstance(size, int) else 2, source),)
    return result


def _samples(letters: list[str], parts: Dim, view: View) -> tuple[list[str], Dim]:
    """The same letters with `n` for samples and parts where they stand together."""
    spread = "".join(letters)
    if "b" in spread:
        if "w" not in spread:
            return [own.replace("b", "n") for own in letters], 1
        if any("bw" in own for own in letters):
            return [own.replace("bw", "n") for own in letters], parts
        return letters, parts
    if "w" in spread:
        return [own.replace("w", "n") for own in letters], parts if view.samples == 1 else 0
    shared = 1 if view.samples in (1, None) else 0
    if "" in letters:
        first = letters.index("")
        return [*letters[:first], "n", *letters[first + 1 :]], shared
    return letters, shared


def _symbolic_parts(axes: Sequence[Axis], letters: Sequence[str], parts: Dim, heads: int) -> Dim:
    """The number of parts is one of a trial, unless sizes are static; a multiple of the samples says it."""
    if parts in (0, 1) or all(isinstance(axis.size, int) for axis in axes):
        return parts
    for axis, own in zip(axes, letters, strict=True):
        if own == "w":
            return axis.size
        folded = parts * heads if "h" in own and isinstance(parts, int) else parts
        if set(own) & {"n", "w"} and str(axis.size).startswith(f"{folded}*"):
            return parts
    return None


def _symbolic_heads(axes: Sequence[Axis], letters: Sequence[str], heads: int) -> Dim:
    """The number of heads, where it stands on a separate axis in the words of the graph."""
    own = {letters[index]: axis.size for index, axis in enumerate(axes)}
    return own["h"] if "h" in own and "g" not in own else heads
