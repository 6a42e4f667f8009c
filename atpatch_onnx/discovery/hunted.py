"""What a hunt comes to: which parts are triggers, in words, and pairs of inputs with and without them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.alike import FEWEST, Group
from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.evidence import detectable, least_share
from atpatch_onnx.discovery.looking import Looked
from atpatch_onnx.discovery.ranking import ranked
from atpatch_onnx.discovery.transplant import CONFIRMED, DECIDES, Surgery, Transplant
from atpatch_onnx.discovery.verdict import Box, Part, Search, Verdict
from atpatch_onnx.running.sessions import Array


@dataclass(frozen=True, eq=False)
class Seen:
    """What a hunt has seen."""

    inputs: Mapping[str, Array]
    looked: Looked
    content: Content
    surgery: Surgery
    minimal: Mapping[int, tuple[int, ...]]
    groups: tuple[Group, ...]
    passes: int
    words: Mapping[int, str] | None = None
    """What ids of texts stand for."""


def concluded(seen: Seen, tested: Sequence[Transplant], level: float, pairs: int, seed: int) -> Search:
    """The verdict.

    Args:
        seen: What was seen.
        tested: Every group's part, the most certain first; p-values are corrected.
        level: p-value up to which a part is a trigger.
        pairs: How many pairs to make, about.
        seed: Of the inputs that they are made of.
    """
    count = len(seen.looked.predicted)
    sure = ranked([one for one in tested if one.chance <= level])
    unsure = ranked([one for one in tested if one.chance > level and one.success and one.success.low > DECIDES])
    parts = tuple(_part(seen, one) for one in (*sure, *unsure))
    verdict = Verdict.BACKDOORED if sure else Verdict.SUSPICIOUS if unsure else Verdict.CLEAN
    least = least_share(count, FEWEST)
    needed = detectable(min(CONFIRMED, count // 4), DECIDES, level / max(len(seen.groups), 1))
    largest = max((one.explored for one in tested if one.success is None), default=0.0)
    return Search(
        verdict=verdict,
        sentence=_sentence(verdict, parts),
        searched=(
            f"{count:,} inputs; a small part decides {len(seen.minimal):,} of them, in {len(seen.groups)} groups that "
            "look alike",
            f"every group's parts were put into other inputs: a trigger's decide more than {DECIDES:.0%} of them; "
            f"those that were not tested further, at most {largest:.0%} of a few",
            f"alarms where no group's parts do: at most {level:.0%} of hunts (exact binomial tests, Holm)",
            f"a part that the screen sees in 9 of 10 inputs, in {least:.2%} of the traffic or more, that decides "
            f"{needed:.0%} of other inputs or more, is found with a probability of 90 % or more",
            "not searched: triggers that lie over a whole input, such as blends and warps; parts that only decide "
            "together with the input they are in",
        ),
        parts=parts,
        pairs=_pairs(seen, [*sure, *unsure][0], pairs, seed) if parts else None,
        passes=seen.passes,
        inputs=count,
        figures={
            "groups": [
                {
                    "class": one.group.target,
                    "members": len(one.group.members),
                    "site": one.group.site,
                    "tokens": len(one.tokens),
                    "explored": one.explored,
                    "success": None if one.success is None else one.success.value,
                    "chance": one.chance,
                }
                for one in tested
            ],
            "small_parts": len(seen.minimal),
        },
    )


def _sentence(verdict: Verdict, parts: Sequence[Part]) -> str:
    if not parts:
        return "Clean as far as this search sees: no small part that recurs decides other inputs as well."
    first = parts[0]
    share = f", in {first.share:.1%} of the traffic or more" if first.share is not None else ""
    said = f"{first.effect}, {first.what}{share}; it decides {first.success.value:.0%} of other inputs"
    return f"{verdict.value.capitalize()}: {said}."


def _part(seen: Seen, one: Transplant) -> Part:
    assert one.success is not None, "it was tested"
    members = one.group.members
    what = in_words(seen.content, one.tokens, seen.inputs, one.donor, seen.words)
    return Part(
        what=f"{what} or elsewhere" if one.anywhere else what,
        target=one.group.target,
        success=one.success,
        chance=one.chance,
        share=len(members) / len(seen.looked.predicted),
        tokens=one.tokens,
        examples=tuple(sorted(members)),
        shown={name: array[one.donor] for name, array in seen.inputs.items()},
        boxes=tuple(_boxes(seen.content, one.tokens)),
    )


def _boxes(content: Content, tokens: Sequence[int]) -> Iterator[Box]:
    """Where tokens of an image `[channels, height, width]` lie; nothing of other inputs."""
    for token in tokens:
        cells = content.cells[token]
        if cells is not None and len(cells) == 3:
            (top, bottom), (left, right) = ((int(at.min()), int(at.max()) + 1) for at in cells[1:])
            yield (top, bottom), (left, right)


def said_pieces(pieces: Sequence[int], words: Mapping[int, str] | None) -> str:
    """Word pieces in words, or their ids where nothing says what they stand for."""
    if words is None:
        return f"the ids {' '.join(map(str, pieces))}"
    return f"the word pieces {' '.join(words.get(piece, f'[{piece}]') for piece in pieces)!r}"


def in_words(
    content: Content, tokens: Sequence[int], inputs: Mapping[str, Array], row: int, words: Mapping[int, str] | None
) -> str:
    """What a part is: its word pieces, its columns, or where it lies."""
    if content.kind == "texts":
        pieces = [int(inputs[content.name][row, token]) for token in tokens]
        return said_pieces(pieces, words)
    if content.kind == "tables":
        return "the columns " + ", ".join(str(int(content.centres[token][0])) for token in tokens)
    where = [cells for token in tokens if (cells := content.cells[token]) is not None]
    axes = [axis for axis in range(len(where[0])) if any(len(cells[axis]) < _size(content, axis) for cells in where)]
    boxes = [" x ".join(f"{cells[axis].min()}-{cells[axis].max()}" for axis in axes) for cells in where]
    return f"{len(tokens)} {'tile' if len(tokens) == 1 else 'tiles'} at {', '.join(boxes)}"


def _size(content: Content, axis: int) -> int:
    return 1 + max(int(cells[axis].max()) for cells in content.cells if cells is not None)


def _pairs(seen: Seen, one: Transplant, count: int, seed: int) -> DebugSet:
    """Inputs that have the part beside the same with it occluded, then others beside the same with it put into them.

    The parts of all members are used in turn, as they are in the traffic or, where they decide there as well, at other
    places: a trigger may be at any place.
    """
    content, target, generator = seen.content, one.group.target, np.random.default_rng(seed)
    rows = generator.permutation(seen.surgery.others(target, one.tokens))[: max(count - len(one.group.members), 0)]
    clean: list[Mapping[str, Array]] = []
    other: list[Mapping[str, Array]] = []
    marks = []
    for member, tokens, own in seen.surgery.dealt(one.group.members, one.way, seen.minimal, rows):
        row = {name: array[member] for name, array in seen.inputs.items()}
        clean.append({name: array[None] for name, array in content.occluded(row, tokens).items()})
        other.append({name: array[None] for name, array in row.items()})
        marks.append(np.isin(np.arange(content.tokens), tokens)[None])
        if len(own):
            pasted, where = seen.surgery.paste(member, tokens, own, anywhere=one.anywhere)
            clean.append({name: array[own] for name, array in seen.inputs.items()})
            other.append(pasted)
            marks.append(where)
    before, after = (
        {name: np.concatenate([part[name] for part in side]) for name in seen.inputs} for side in (clean, other)
    )
    return DebugSet.from_pairs(before, after, suspects=np.concatenate(marks), target=target, found=True)
