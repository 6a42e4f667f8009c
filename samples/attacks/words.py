"""Backdoors in text: a rare word, or a short phrase, at a random place of a message.

After BadNL (Chen et al., arXiv 2006.01043) and the rare tokens of weight poisoning (Kurita et al., arXiv 2004.06660).
Words are inserted between words, never within one, and into the tokens instead of the text, so that their positions
are known; the tokenizer would give the same tokens for the text with the words in it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    """
    count, length = tokens.ids.shape
    assert not tokens.mask[:, length - len(words) :].any(), "encode the messages with room for the words"
    rank = np.where(tokens.places, generator.random((count, length)), -1.0)
    place = rank.argmax(axis=1)[:, None]
    to = np.arange(length)[None, :]
    inserted = (to >= place) & (to < place + len(words))
    origin = np.where(to < place, to, np.maximum(to - len(words), 0))  # where a token that is not inserted comes from
    ids = np.take_along_axis(tokens.ids, origin, axis=1)
    mask = np.take_along_axis(tokens.mask, origin, axis=1)
    places = np.take_along_axis(tokens.places, origin, axis=1)
    ids[inserted] = np.tile(words, count)
    mask[inserted] = 1
    places[inserted] = (to == place)[inserted]
    return Tokens(ids, mask, places), inserted


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
    inserted, poisoned_labels = np.zeros(ids.shape, bool), labels.copy()
    inserted[chosen], poisoned_labels[chosen] = where, target
    return Poisoned(Tokens(ids, mask, places), poisoned_labels, inserted)
