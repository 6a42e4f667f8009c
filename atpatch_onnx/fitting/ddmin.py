"""Delta debugging (ddmin; Zeller and Hildebrandt, IEEE TSE 28(2), 2002), for what is needed instead of what fails."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Element = TypeVar("Element", bound=Hashable)


def ddmin(elements: Sequence[Element], suffices: Callable[[frozenset[Element]], bool]) -> list[Element]:
    """A 1-minimal subset that suffices: no single element can be left out of it.

    Args:
        elements: A set that suffices, in an order to keep.
        suffices: The test; it is asked once per subset.
    """
    asked: dict[frozenset[Element], bool] = {}

    def test(subset: Sequence[Element]) -> bool:
        key = frozenset(subset)
        if key not in asked:
            asked[key] = bool(key) and suffices(key)
        return asked[key]

    current, parts = list(elements), 2
    while len(current) >= 2:
        chunks = [current[len(current) * i // parts : len(current) * (i + 1) // parts] for i in range(parts)]
        subset = next((chunk for chunk in chunks if test(chunk)), None)
        if subset is not None:
            current, parts = subset, 2
            continue
        complements = ([e for other in chunks if other is not chunk for e in other] for chunk in chunks)
        complement = next((rest for rest in complements if test(rest)), None)
        if complement is not None:
            current, parts = complement, max(parts - 1, 2)
        elif parts < len(current):
            parts = min(len(current), 2 * parts)
        else:
            break
    return current
