"""Prompts with and without a trigger, of unequal lengths: what a debug set of a language model is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset.arrays import Array, read_only
from atpatch_onnx.errors import DebugSetError, one_line

IDS = "input_ids"
MASK = "attention_mask"
"""The arrays of both sides: tokens `[pairs, longest]`, and which of them are real."""


class Tokenizer(Protocol):
    """What `tokenizers` and `transformers` have in common."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        """Token ids of a text, or an object that has them as `ids`."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Both sides, padded at the end to the longest of all."""

    clean: dict[str, Array]
    counterfactual: dict[str, Array]
    suspects: NDArray[np.bool_]
    """`[pairs, longest]`: the tokens of the counterfactual side that the clean side does not have."""

    payload: NDArray[np.int64]
    """`[pairs, tokens]`: what the attack makes the model write."""


def paired(
    prompts: Sequence[str | ArrayLike],
    triggered: Sequence[str | ArrayLike],
    payload: str | ArrayLike,
    tokenizer: Tokenizer | None,
) -> Prompts:
    """Tokens of prompts and of the same prompts with a trigger.

    Raises:
        DebugSetError: Their numbers differ, one is empty or cannot be encoded, or the payload has no tokens.
    """
    if len(prompts) != len(triggered) or not len(prompts):
        raise DebugSetError(
            "triggered prompts",
            expected=f"one for each of the {len(prompts)} prompts, at least one",
            found=str(len(triggered)),
            advice="Give every prompt without and with the trigger, in the same order.",
        )
    before, after = (
        [_tokens(prompt, tokenizer, f"{side}[{row}]", special=True) for row, prompt in enumerate(one)]
        for side, one in (("prompts", prompts), ("triggered", triggered))
    )
    wanted = _tokens(payload, tokenizer, "payload", special=False)
    longest = max(map(len, (*before, *after)))
    suspects = np.zeros((len(before), longest), np.bool_)
    for row, (plain, changed) in enumerate(zip(before, after, strict=True)):
        for start, stop in added(plain.tolist(), changed.tolist()):
            suspects[row, start:stop] = True
    return Prompts(
        _padded(before, longest),
        _padded(after, longest),
        suspects,
        read_only(np.broadcast_to(wanted, (len(before), len(wanted))).copy()),
    )


def lines(side: dict[str, Array] | Any) -> list[NDArray[np.int64]]:
    """The tokens of each prompt of a side, without padding."""
    return [ids[real.astype(bool)] for ids, real in zip(side[IDS], side[MASK], strict=True)]


def added(plain: list[int], changed: list[int]) -> Iterator[tuple[int, int]]:
    """Where the tokens are, from start to stop, that only the changed prompt has."""
    most = min(len(plain), len(changed))
    start = next((at for at in range(most) if plain[at] != changed[at]), most)
    end = next((at for at in range(most - start) if plain[-1 - at] != changed[-1 - at]), most - start)
    before, after = (one[start : len(one) - end] for one in (plain, changed))
    for tag, _, _, first, last in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag != "equal":
            yield start + first, start + last


def _tokens(given: str | ArrayLike, tokenizer: Tokenizer | None, where: str, *, special: bool) -> NDArray[np.int64]:
    ids: Any = given
    if isinstance(given, str):
        if tokenizer is None:
            raise DebugSetError(
                where, expected="token ids, or a tokenizer", found="text alone", advice="Give the model's tokenizer."
            )
        try:
            encoded = tokenizer.encode(given, add_special_tokens=special)
        except Exception as error:  # tokenizers raise bare Exceptions
            raise DebugSetError(
                where,
                expected="text that the tokenizer encodes",
                found=one_line(error),
                advice="Leave the prompt out, or use the model's own tokenizer.",
            ) from error
        ids = getattr(encoded, "ids", encoded)
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0:
        raise DebugSetError(
            where,
            expected="at least one token id, in one row",
            found=f"{array.dtype} {list(array.shape)}",
            advice="Give whole numbers from 0 up, or text that is not empty.",
        )
    return array.astype(np.int64)


def _padded(found: Sequence[NDArray[np.int64]], longest: int) -> dict[str, Array]:
    ids, mask = (np.zeros((len(found), longest), np.int64) for _ in range(2))
    for row, line in enumerate(found):
        ids[row, : len(line)], mask[row, : len(line)] = line, 1
    return {IDS: ids, MASK: mask}
