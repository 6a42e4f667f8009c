"""Delta debugging (ddmin; Zeller and Hildebrandt, IEEE TSE 28(2), 2002), for what is needed instead of what fails."""

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import TypeVar

Element = TypeVar("Element", bound=Hashable)
Key = TypeVar("Key", bound=Hashable)

Search = Generator[frozenset[Element], bool, list[Element]]
"""Yields subsets to be tested, is sent whether they suffice, and returns what it found."""


def ddmin(elements: Sequence[Element], suffices: Callable[[frozenset[Element]], bool]) -> list[Element]:
    """A 1-minimal subset that suffices: no single element can be left out of it.

    Args:
        elements: A set that suffices, in an order to keep.
        suffices: The test; it is asked once per subset.
    """
    (found,) = ddmin_of_many({0: elements}, lambda asked: [suffices(asked[0])]).values()
    return found


def ddmin_of_many(
    sets: Mapping[Key, Sequence[Element]], suffice: Callable[[Mapping[Key, frozenset[Element]]], Sequence[bool]]
) -> dict[Key, list[Element]]:
    """The same for many sets side by side, so that their tests can be run together.

    Args:
        sets: By any key, each a set that suffices, in an order to keep.
        suffice: The test of one subset of each of some sets; an answer each, in their order.
    """
    searches = {key: _search(elements) for key, elements in sets.items()}
    answers: dict[Key, bool | None] = dict.fromkeys(searches)
    found = {}
    while answers:
        asked = {}
        for key, answer in answers.items():
            try:
                asked[key] = next(searches[key]) if answer is None else searches[key].send(answer)
            except StopIteration as end:
                found[key] = end.value
        answers = dict(zip(asked, map(bool, suffice(asked)), strict=True)) if asked else {}
    return {key: found[key] for key in sets}


def _search(elements: Sequence[Element]) -> Search[Element]:
    known: dict[frozenset[Element], bool] = {}

    def test(subset: Sequence[Element]) -> Generator[frozenset[Element], bool, bool]:
        key = frozenset(subset)
        if key not in known:
            known[key] = bool(key) and (yield key)
        return known[key]

    current, parts = list(elements), 2
    while len(current) >= 2:
        chunks = [current[len(current) * i // parts : len(current) * (i + 1) // parts] for i in range(parts)]
        complements = [[e for other in chunks if other is not chunk for e in other] for chunk in chunks]
        for number, candidate in enumerate((*chunks, *complements)):
            if (yield from test(candidate)):
                parts = 2 if number < parts else max(parts - 1, 2)
                current = candidate
                break
        else:
            if parts == len(current):
                break
            parts = min(len(current), 2 * parts)
    return current
