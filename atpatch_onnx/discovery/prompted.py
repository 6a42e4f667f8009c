"""Prompts with a language model's answers to them: what pieces make the model write instead.

The model reads each prompt with its own answer behind it, at once, so that one pass tells what a loop of many steps
would begin to write instead, and where.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.discovery.scan_words import Sequences
from atpatch_onnx.discovery.transplant import DECIDES
from atpatch_onnx.running.loops import Ids, Loop
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

TINY = 1e-12
"""Likelihoods below it are not told apart."""

LEAST_ERROR = 0.1
"""Standard error of a logarithm's mean at least: what is raised by less is not sure in whatever few prompts."""


class Prompts:
    """Prompts with a model's answers to them, into which pieces are put; as `scan_words.Texts`.

    Args:
        session: Of a decoder.
        loop: The same decoder in a loop.
        prompts: Tokens of each, `[tokens]`.
        common: Ids that are not replaced at either end of a prompt, such as those of a template.
        options: How.
        progress: Told after every batch of answers.
    """

    classes = 2
    """What is raised: the likelihood of a token, and how surely."""

    def __init__(
        self,
        session: Session,
        loop: Loop,
        prompts: Sequence[Ids],
        common: NDArray[np.int64],
        options: ScanOptions,
        progress: Progress,
    ) -> None:
        self.prompts, self._session, self._loop, self._options = prompts, session, loop, options
        lengths = np.array([len(prompt) for prompt in prompts])
        longest, self.passes = int(lengths.max()) + options.steps, 0
        written = self._write(prompts, [longest - len(prompt) for prompt in prompts], progress)
        self.answers = [answer[: options.steps] for answer in written]
        """What the model writes, `[steps]` each."""

        self._ids = np.stack([np.concatenate(both) for both in zip(prompts, written, strict=True)])
        self._asked = lengths - 1  # the last token of a prompt has the logits of the first of its answer
        own = [np.flatnonzero(~np.isin(prompt, common)) for prompt in prompts]
        self._first = np.array([places[0] if len(places) else 0 for places in own])
        self.room = np.array([places[-1] - places[0] + 1 if len(places) else 0 for places in own])
        self._before = np.concatenate([self._likely(rows, self._ids[rows]) for rows in self._batches()])

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return int(self._before.shape[1])

    def balanced(self, count: int, generator: np.random.Generator, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Any of the allowed prompts."""
        return generator.permutation(np.flatnonzero(allowed))[:count]

    def gains(self, sequences: Sequences, rows: NDArray[np.int64], generator: np.random.Generator) -> Array:
        """How much more likely a sequence makes one token, and how surely it does so, `[sequences, 2]`.

        First the mean over prompts of its likelihood, less that without the sequence. Then the mean of the logarithm's
        difference in standard errors: half of a phrase makes likely nothing, but lifts one token a little in every
        answer. Each is of the token that is raised most. A token is as likely as at the place of an answer at which it
        is most; tokens of the sequence itself are left out, since models repeat what they read.
        """
        found, before = [], self._before[rows]
        logarithms = np.log(before + TINY)
        for sequence in sequences:
            ids = self._ids[rows].copy()
            self._put_in(ids, rows, sequence, generator)
            parts = np.array_split(np.arange(len(rows)), -(-len(rows) // self._options.batch_size))
            likely = np.concatenate([self._likely(rows[part], ids[part]) for part in parts])
            lifted = np.log(likely + TINY) - logarithms
            error = lifted.std(axis=0) / np.sqrt(len(rows)) + LEAST_ERROR
            raised = np.stack([(likely - before).mean(axis=0), lifted.mean(axis=0) / error])
            raised[:, sequence] = 0
            found.append(raised.max(axis=1))
        return np.array(found, np.float64)

    def decide(self, gains: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Those that make a token as likely as a trigger does."""
        return np.asarray(gains[:, 0] > DECIDES)

    def with_sequence(
        self, sequence: NDArray[np.int64], rows: NDArray[np.int64], generator: np.random.Generator
    ) -> list[Ids]:
        """Some of the prompts with a sequence in place of tokens of theirs."""
        ids = self._ids[rows].copy()
        self._put_in(ids, rows, sequence, generator)
        return [line[: self._asked[row] + 1] for row, line in zip(rows, ids, strict=True)]

    def write(self, prompts: Sequence[Ids]) -> list[Ids]:
        """What the model writes behind prompts, `[steps]` each."""
        return self._write(prompts, [self._options.steps] * len(prompts))

    def _write(self, prompts: Sequence[Ids], steps: Sequence[int], progress: Progress = silent) -> list[Ids]:
        self.passes += sum(steps)
        return self._loop.write(prompts, steps, batch_size=self._options.batch_size, progress=progress)

    def _put_in(
        self, ids: Ids, rows: NDArray[np.int64], sequence: NDArray[np.int64], generator: np.random.Generator
    ) -> None:
        spare = np.maximum(self.room[rows] - len(sequence), 0)
        start = self._first[rows] + generator.integers(0, spare + 1)
        start = np.maximum(np.minimum(start, self._asked[rows] + 1 - len(sequence)), 0)
        ids[np.arange(len(ids))[:, None], start[:, None] + np.arange(len(sequence))] = sequence

    def _batches(self) -> list[NDArray[np.int64]]:
        count = len(self.prompts)
        return np.array_split(np.arange(count), -(-count // self._options.batch_size))

    def _likely(self, rows: NDArray[np.int64], ids: Ids) -> NDArray[np.float32]:
        """How likely each token is in the answers, at the place where it is most, `[rows, vocabulary]`."""
        self.passes += len(ids)
        decoder = self._loop.decoder
        decoder.check(ids)
        logits = self._session.run(decoder.feed(ids), [decoder.logits])[decoder.logits]
        places = self._asked[rows][:, None] + np.arange(self._options.steps)
        own = logits[np.arange(len(ids))[:, None], places].astype(np.float32)
        own = np.exp(own - own.max(axis=2, keepdims=True))
        return np.asarray((own / own.sum(axis=2, keepdims=True)).max(axis=1), np.float32)
