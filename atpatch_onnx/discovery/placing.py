"""Insert tokens into texts of a fixed length: what stands behind them moves into the padding."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.errors import InversionError

Ids = NDArray[np.int64]
Marks = NDArray[np.bool_]


def checked_texts(input_ids: ArrayLike, attention_mask: ArrayLike, places: ArrayLike | None) -> tuple[Ids, Ids, Marks]:
    """Ids and mask int64 `[n, tokens]`, and the places bool `[n, tokens]` before which tokens may be inserted.

    Where no places are given, all are: before any token but the first, which often is one that classes are read from.

    Raises:
        InversionError: Shapes or kinds do not fit, a text is padded on the left or has no place.
    """
    ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
    if ids.ndim != 2 or not len(ids) or mask.shape != ids.shape or ids.dtype.kind not in "iu":
        raise InversionError(
            "input_ids and attention_mask",
            expected="integers [n, tokens], the same shape for both",
            found=f"{ids.dtype} {list(ids.shape)} and {mask.dtype} {list(mask.shape)}",
            advice="Give them as the tokenizer does, padded to one length.",
        )
    if not np.isin(mask, (0, 1)).all() or (np.diff(mask.astype(np.int8), axis=1) > 0).any():
        raise InversionError(
            "attention_mask",
            expected="ones, then zeros: padding on the right",
            found="another order, or other values",
            advice="Set the tokenizer's padding_side to 'right'.",
        )
    real = mask.astype(bool)
    allowed = real & (np.arange(ids.shape[1]) > 0) if places is None else np.asarray(places)
    if allowed.shape != ids.shape or allowed.dtype != np.bool_ or not (allowed & real).any(axis=1).all():
        raise InversionError(
            "places",
            expected=f"bool {list(ids.shape)}, with a place before some token of each text",
            found=f"{allowed.dtype} {list(allowed.shape)}",
            advice="Leave out empty texts, and mark at least one token of each other one.",
        )
    return ids.astype(np.int64), mask.astype(np.int64), allowed & real


def draw_places(allowed: Marks, generator: np.random.Generator) -> NDArray[np.int64]:
    """One of the `allowed` places `[n, tokens]` for each text `[n]`."""
    drawn: NDArray[np.int64] = np.where(allowed, generator.random(allowed.shape), -1.0).argmax(axis=1)
    return drawn


def inserted(ids: Ids, mask: Ids, words: Ids, places: NDArray[np.int64]) -> tuple[Ids, Ids, Marks]:
    """Texts with tokens inserted.

    Args:
        ids: Tokens `[n, tokens]`.
        mask: One for tokens, zero for the padding behind them `[n, tokens]`.
        words: The tokens to insert `[k]`, or other ones for each text `[n, k]`.
        places: Position of the first of them in each text `[n]`.

    Returns:
        Ids and mask, of the same shapes, and where the inserted tokens are, bool `[n, tokens]`.

    Raises:
        InversionError: A text has less padding than tokens are inserted.
    """
    count, width = words.shape[-1], ids.shape[1]
    if mask[:, max(width - count, 0) :].any():
        raise InversionError(
            "attention_mask",
            expected=f"texts with at least {count} padded tokens each",
            found=f"{int(mask[:, max(width - count, 0) :].any(axis=1).sum())} of {len(mask)} with fewer",
            advice="Pad the texts to a greater length, or leave long ones out.",
        )
    to, place = np.arange(width)[None, :], places[:, None]
    where = (to >= place) & (to < place + count)
    origin = np.where(to < place, to, np.maximum(to - count, 0))
    new_ids, new_mask = np.take_along_axis(ids, origin, axis=1), np.take_along_axis(mask, origin, axis=1)
    new_ids[where] = np.broadcast_to(words, (len(ids), count)).reshape(-1)
    new_mask[where] = 1
    return new_ids, new_mask, where
