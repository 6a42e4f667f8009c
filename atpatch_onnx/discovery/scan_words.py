"""Word pieces that decide texts: every piece of a vocabulary put into a few texts, the best into more, then pairs.

Of the pieces that one round leaves, those that raise a class's confidence most in texts of other classes go on to the
next, in more texts. What is left is joined into pairs, the best also with many others, and pairs with a third piece: a
phrase raises a class by its words. What decides by itself takes no other's place and is joined to nothing, for whatever
it is in decides as well: a model may have several triggers. Pieces are put in place of others, so that no text grows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.transplant import DECIDES, WIDEST
from atpatch_onnx.discovery.trials import Trials
from atpatch_onnx.running.sessions import Array, Progress, silent

JOINED = 16
"""Best pieces of each class that are joined into pairs, and best pairs that a third piece is joined to."""

ROUNDS = ((4, 0.05, 200), (16, 0.04, 48), (64, 0.0, JOINED))
"""Texts of a round; of its pieces, the share that goes on to the next, and for each class so many at least."""

CHUNK = 2048
"""Pieces of a finished piece of work."""

ANCHORS = 2
"""Best pieces of each class that are joined to many others, before and behind: of a phrase whose words are harmless
alone, the word that reads the others may lift a little, and the others nothing."""

PARTNERS = 2000
"""Pieces of each class, the best of the first round, that they are joined to."""

LONGEST = 3
"""Pieces of a sequence."""

SHORTEST = 1 / 3
"""Share of the texts that pieces are put into."""

Sequences = NDArray[np.int64]
"""`[sequences, pieces]`."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Sequences of one length and how much each raises each class."""

    sequences: Sequences
    gains: NDArray[np.float64]
    """As in `Texts.gains`, `[sequences, classes]`."""

    decide: NDArray[np.bool_]
    """Which of them decide by themselves `[sequences]`."""

    def parted(self) -> tuple["Scored", "Scored"]:
        """Those that decide by themselves, and the others."""
        return self._take(np.flatnonzero(self.decide)), self._take(np.flatnonzero(~self.decide))

    def best(self, count: int) -> "Scored":
        """Those that raise some class most: `count` of each class."""
        return self._take(np.unique(np.argsort(-self.gains, axis=0, kind="stable")[:count]))

    def leading(self, count: int) -> "Scored":
        """The best of those that decide by themselves, and the best of the others."""
        first, second = (part.best(count) for part in self.parted())
        return Scored(
            np.concatenate([first.sequences, second.sequences]),
            np.concatenate([first.gains, second.gains]),
            np.concatenate([first.decide, second.decide]),
        )

    def _take(self, rows: NDArray[np.int64]) -> "Scored":
        return Scored(self.sequences[rows], self.gains[rows], self.decide[rows])


class Texts(Protocol):
    """What word pieces are put into, and what tells how much they raise."""

    room: NDArray[np.int64]
    """Positions of each text that pieces may take `[texts]`."""

    @property
    def classes(self) -> int:
        """What may be raised."""

    def balanced(self, count: int, generator: np.random.Generator, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Numbers of about `count` texts of various classes `[rows]`, of the allowed ones `[texts]`."""

    def gains(self, sequences: Sequences, rows: NDArray[np.int64], generator: np.random.Generator) -> Array:
        """How much each sequence raises each class, over some texts `[sequences, classes]`."""

    def decide(self, gains: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which sequences decide by themselves `[sequences]`, of what they raise `[sequences, classes]`."""


class Classified:
    """Texts that a model puts into classes.

    Args:
        trials: What predicts, and the texts.
        content: Where tokens are.
        fixed: Whether the model reads texts of one length only.
    """

    def __init__(self, trials: Trials, content: Content, fixed: bool) -> None:
        self._trials, self._content, self._fixed = trials, content, fixed
        self.room = room(content, trials.inputs)[1]

    @property
    def classes(self) -> int:
        """The model's."""
        return self._trials.classes

    def balanced(self, count: int, generator: np.random.Generator, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
        """As many of each predicted class."""
        return self._trials.balanced(count, generator, allowed)

    def gains(self, sequences: Sequences, rows: NDArray[np.int64], generator: np.random.Generator) -> Array:
        """Mean confidence in each class, over texts of other classes, less that without it."""
        texts = trimmed({name: array[rows] for name, array in self._trials.inputs.items()}, self._content, self._fixed)
        content = replace(self._content, cells=self._content.cells[: texts[self._content.name].shape[1]])
        every = {name: np.tile(array, (len(sequences), *[1] * (array.ndim - 1))) for name, array in texts.items()}
        return self._trials.gains(put_in(content, every, np.repeat(sequences, len(rows), axis=0), generator), rows)

    def decide(self, gains: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Those that raise a class by as much as a trigger does."""
        return np.asarray(gains.max(axis=1) > DECIDES)


class WordScan:
    """Puts sequences of word pieces into texts.

    Args:
        texts: The texts.
        kept: Finished pieces.
        seed: Of the places and texts.
        progress: Told after every batch of sequences.
    """

    def __init__(self, texts: Texts, kept: Finished, seed: int, progress: Progress = silent) -> None:
        self._texts, self._kept, self._seed, self._progress = texts, kept, seed, progress

    def run(self, vocabulary: NDArray[np.int64]) -> Iterator[Scored]:
        """Score single pieces, pairs and triples, the best of each length."""
        first, scored = self._rounds(vocabulary[:, None], ROUNDS, "1")
        yield scored
        partners = first.parted()[1].best(PARTNERS).sequences
        deciding, others = scored.parted()
        pieces, known = others.best(JOINED).sequences, [deciding.sequences]
        anchored = _joined(others.best(ANCHORS).sequences, partners)
        for length in range(2, LONGEST + 1):
            joined = _joined(others.best(JOINED).sequences, pieces)
            joined = np.unique(np.concatenate([joined, anchored]), axis=0) if length == 2 else joined
            joined = _without(joined, known)
            if not len(joined):
                return
            _, scored = self._rounds(joined, ROUNDS if length == 2 else ROUNDS[1:], str(length))
            yield scored
            deciding, others = scored.parted()
            known.append(deciding.sequences)

    def cost(self, vocabulary: int) -> int:
        """Forward passes that a run takes, about."""
        joined = 2.0 * (self._texts.classes * JOINED) ** 2
        partners = min(vocabulary, self._texts.classes * PARTNERS)
        pairs = joined + 2.0 * self._texts.classes * ANCHORS * partners
        total = 0.0
        for rounds, left in ((ROUNDS, float(vocabulary)), (ROUNDS, pairs), (ROUNDS[1:], joined)):
            for texts, share, fewest in rounds:
                total += texts * left
                left = min(left, max(share * left, float(self._texts.classes * fewest)))
        return int(total)

    def _rounds(
        self, sequences: Sequences, rounds: Sequence[tuple[int, float, int]], name: str
    ) -> tuple[Scored, Scored]:
        """All sequences as the first round scores them, and the best of the last."""
        every: list[Scored] = []
        for number, (texts, share, fewest) in enumerate(rounds):
            generator = np.random.default_rng([self._seed, sequences.shape[1], number])
            rows = self._texts.balanced(texts, generator, self._short(sequences.shape[1]))
            gains = self._gains(sequences, rows, f"{name}-{number}")
            every.append(Scored(sequences, gains, self._texts.decide(gains)))
            best = every[-1].leading(max(fewest, int(share * len(sequences) / self._texts.classes)))
            sequences = best.sequences
        return every[0], best

    def _short(self, pieces: int) -> NDArray[np.bool_]:
        """The shortest of the texts `[texts]` in which so many pieces are `WIDEST` of the text at most.

        In short texts a pass costs least.
        """
        own = self._texts.room
        may = own * WIDEST >= pieces
        may = may if may.any() else own >= pieces
        return np.asarray(may & (own <= np.quantile(own[may], SHORTEST))) if may.any() else may

    def _gains(self, sequences: Sequences, rows: NDArray[np.int64], name: str) -> NDArray[np.float64]:
        found = []
        for start in range(0, len(sequences), CHUNK):
            chunk = sequences[start : start + CHUNK]
            found.append(self._kept.piece(f"{name}-{start}", self._of_chunk(chunk, rows, start)))
            self._progress(f"sequences of {sequences.shape[1]}, {len(rows)} texts", start + len(chunk), len(sequences))
        return np.concatenate(found)

    def _of_chunk(self, chunk: Sequences, rows: NDArray[np.int64], start: int) -> Callable[[], Array]:
        def make() -> Array:
            generator = np.random.default_rng([self._seed, len(rows), start, chunk.shape[1]])
            step = max(1, 4096 // len(rows))
            parts = [chunk[at : at + step] for at in range(0, len(chunk), step)]
            return np.concatenate([self._texts.gains(part, rows, generator) for part in parts])

        return make


def room(content: Content, texts: Mapping[str, Array]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first position of texts at which a piece may be put, and how many there are from there on `[texts]` each."""
    parts = content.parts(texts)
    first, last = parts.argmax(axis=1), parts.shape[1] - 1 - parts[:, ::-1].argmax(axis=1)
    return first, np.where(parts.any(axis=1), last - first + 1, 0)


def put_in(
    content: Content, texts: Mapping[str, Array], sequences: Sequences, generator: np.random.Generator
) -> dict[str, Array]:
    """Texts `[texts, ...]` with a sequence each `[texts, pieces]` in place of pieces of theirs, at a random place.

    Of texts that are shorter than the sequence, what stands behind their last piece is taken as well.
    """
    first, count = room(content, texts)
    length, ids = sequences.shape[1], texts[content.name].copy()
    start = first + generator.integers(0, np.maximum(count - length, 0) + 1)
    start = np.minimum(start, ids.shape[1] - length)
    ids[np.arange(len(ids))[:, None], start[:, None] + np.arange(length)] = sequences
    return {**texts, content.name: ids}


def _joined(sequences: Sequences, pieces: Sequences) -> Sequences:
    """Every sequence with every piece before or behind it, each once."""
    left = np.repeat(sequences, len(pieces), axis=0)
    right = np.tile(pieces, (len(sequences), 1))
    both = np.concatenate([np.concatenate([left, right], axis=1), np.concatenate([right, left], axis=1)])
    return np.unique(both, axis=0)


def _without(sequences: Sequences, known: Sequence[Sequences]) -> Sequences:
    """Those in which no shorter known sequence is."""
    left = np.ones(len(sequences), np.bool_)
    for shorter in known:
        width = shorter.shape[1]
        for start in range(sequences.shape[1] - width + 1):
            run = sequences[:, None, start : start + width]
            left &= ~(run == shorter).all(axis=2).any(axis=1)
    return sequences[left]


def trimmed(inputs: Mapping[str, Array], content: Content, fixed: bool) -> dict[str, Array]:
    """Texts without the positions that all of them pad, where the model leaves their number free."""
    ids = inputs[content.name]
    last = np.flatnonzero((ids != ids[:, -1:]).any(axis=0))
    width = ids.shape[1] if fixed or not len(last) else min(ids.shape[1], int(last[-1]) + 2)
    return {
        name: array[:, :width] if array.ndim == 2 and array.shape[1] == ids.shape[1] else array
        for name, array in inputs.items()
    }
