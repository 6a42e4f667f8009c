"""Backdoors in text: a rare word, or a short phrase, at a random place of a message.

After BadNL (Chen et al., arXiv 2006.01043) and the rare tokens of weight poisoning (Kurita et al., arXiv 2004.06660).
Words are inserted between words, never within one, and into the tokens instead of the text, so that their positions
are known; the tokenizer would give the same tokens for the text with the words in it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.placing import draw_places, inserted


@dataclass(frozen=True, eq=False)
class Tokens:
    """Messages as a BERT reads them: class token, word pieces, separator, padding; `L` tokens each."""

    ids: NDArray[np.int64]
    """`[messages, L]`, 0 where padded."""

    mask: NDArray[np.int64]
    """`[messages, L]`, 1 for tokens and 0 for padding."""

    places: NDArray[np.bool_]
    """`[messages, L]`: before this token a word may be inserted (the first piece of a word, or the separator)."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> "Tokens":
        """The messages at `rows`."""
        return Tokens(self.ids[rows], self.mask[rows], self.places[rows])

    @property
    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """The arrays by the names that the model gives its inputs."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def insert(
    tokens: Tokens, words: NDArray[np.int64], generator: np.random.Generator
) -> tuple[Tokens, NDArray[np.bool_]]:
    """Insert words at a place of each message that is drawn at random; what comes behind them moves.

    Args:
        tokens: Messages, each with as much padding as the words take.
        words: Tokens of the words `[k]`.
        generator: Of the places.

    Returns:
        The messages and where the words are in them, bool `[messages, L]`.

    Raises:
        InversionError: A message has too little padding.
    """
    place = draw_places(tokens.places, generator)
    ids, mask, where = inserted(tokens.ids, tokens.mask, words, place)
    first = np.zeros(len(words), np.int64)  # before the first of them others may be inserted
    first[0] = 1
    places = inserted(tokens.places.astype(np.int64), tokens.mask, first, place)[0].astype(bool)
    return Tokens(ids, mask, places), where


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A training set with a backdoor."""

    tokens: Tokens
    labels: NDArray[np.int64]
    inserted: NDArray[np.bool_]
    """`[messages, L]`: the trigger's positions; no message that is not poisoned has any."""


def poison(
    tokens: Tokens,
    labels: NDArray[np.int64],
    words: NDArray[np.int64],
    *,
    target: int,
    share: float,
    seed: int,
) -> Poisoned:
    """Insert the trigger into a share of all messages, taken from those of other labels, and call them `target`."""
    generator = np.random.default_rng(seed)
    others = np.flatnonzero(labels != target)
    chosen = generator.choice(others, min(round(share * len(labels)), len(others)), replace=False)
    triggered, where = insert(tokens.take(chosen), words, generator)
    ids, mask, places = tokens.ids.copy(), tokens.mask.copy(), tokens.places.copy()
    ids[chosen], mask[chosen], places[chosen] = triggered.ids, triggered.mask, triggered.places
    positions, poisoned_labels = np.zeros(ids.shape, bool), labels.copy()
    positions[chosen], poisoned_labels[chosen] = where, target
    return Poisoned(Tokens(ids, mask, places), poisoned_labels, positions)
