"""Whether what a debug set is made of goes together: both sides, what belongs to each pair, and its kind."""

from typing import Any

from atpatch_onnx.debugset import files
from atpatch_onnx.debugset.arrays import (
    Array,
    as_class,
    as_inputs,
    as_labels,
    as_payload,
    as_sensitive,
    as_suspects,
    check_finite,
    listed,
    matched,
)
from atpatch_onnx.errors import DebugSetError


def checked(
    given: files.Stored, where: str
) -> tuple[dict[str, Array], dict[str, Array], int | None, dict[str, Array | None]]:
    """Both sides, the target, and what belongs to each pair by name, None where it is not there.

    Raises:
        DebugSetError: Something is not what it should be, or does not go with the rest.
    """
    clean, other = (as_inputs(getattr(given, side), f"{where}{side}") for side in files.SIDES)
    before, after = matched(clean, other, where)
    for side, arrays in zip(files.SIDES, (before, after), strict=True):
        for name, array in arrays.items():
            check_finite(array, f"{where}{side}[{name!r}]")
    if given.kind not in files.KINDS:
        advice = "Choose one of these."
        raise DebugSetError(
            f"{where}kind", expected=f"one of {listed(files.KINDS)}", found=repr(given.kind), advice=advice
        )
    if (given.kind == "generation") != ("payload" in given.extras):
        raise DebugSetError(
            f"{where}payload",
            expected="one for prompts of a language model, and for nothing else",
            found=f"kind {given.kind!r} {'with' if 'payload' in given.extras else 'without'} one",
            advice="Make such a set with from_prompts.",
        )
    rules = {"labels": as_labels, "suspects": as_suspects, "sensitive": as_sensitive, "payload": as_payload}
    pairs = len(next(iter(before.values())))
    extras: dict[str, Any] = {
        name: rule(given.extras[name], pairs, f"{where}{name}") if name in given.extras else None
        for name, rule in rules.items()
    }
    target = None if given.target is None else as_target(given.target, given.kind, f"{where}target")
    return before, after, target, extras


def as_target(target: int, kind: str, where: str) -> int:
    """Check a target class of a debug set of this kind.

    Raises:
        DebugSetError: It is no class index, or the set is not about a backdoor.
    """
    if kind != "backdoor":
        raise DebugSetError(
            where,
            expected="a debug set of kind 'backdoor'",
            found=f"one of kind {kind!r}",
            advice="Leave the target out: only a backdoor sends inputs to one class.",
        )
    return as_class(target, where)
