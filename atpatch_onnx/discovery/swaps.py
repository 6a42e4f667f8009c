"""A token sequence that turns texts into one class: first-order token swaps with a beam.

HotFlip (Ebrahimi et al., arXiv 1712.06751) estimates what a loss becomes when a token `w` is swapped for `v` from its
gradient with respect to `w`'s embedding: `(e_v - e_w) . grad`. As in the search of universal triggers (Wallace et al.,
arXiv 1908.07125) the gradient is a mean over inputs, so that one sequence is found for all of them; the best swaps by
the estimate are tried for real, and the best sequences of the tries are kept.

We differ in the start: the paper starts from one word repeated, where the estimate tells little of words far away. The
gradient at common words does not lead to the rare token of a backdoor: among 22,000 words it ranked 3,900th or worse.
So the whole vocabulary is tried for real first, in the shortest of the texts, which costs little.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.discovery.network import logits_of
from atpatch_onnx.discovery.placing import Ids, Marks, inserted
from atpatch_onnx.errors import InversionError, check_at_least
from atpatch_onnx.running.sessions import Progress

_SCREENED_TOGETHER = 256
"""Tokens of the vocabulary that are tried in one batch."""


@dataclass(frozen=True)
class TokenOptions:
    """How a token sequence is searched for."""

    candidates: int = 40
    """Swaps tried for real at each position of each sequence of the beam, best by the estimate."""

    screen: int = 1
    """Texts, the shortest ones, that every token of the vocabulary is tried in at the start."""

    first: int = 200
    """Tokens that go on from there, repeated to the length."""

    beam: int = 3
    """Sequences kept after each round."""

    rounds: int = 2
    """Times that every position is gone through at most, after the start."""

    trial: int = 16
    """Texts that every swap is tried on; the best are tried again on all."""

    batch_size: int = 64
    """Texts at a time."""

    def __post_init__(self) -> None:
        check_at_least(self, InversionError, **{name: 0 if name == "rounds" else 1 for name in vars(self)})


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts that the model does not put into `target`, and where tokens are inserted into each."""

    ids: Ids
    mask: Ids
    places: NDArray[np.int64]
    target: int

    def take(self, rows: NDArray[np.int64] | slice) -> "Texts":
        """Some of them."""
        return Texts(self.ids[rows], self.mask[rows], self.places[rows], self.target)


class SwapSearch:
    """The search for one sequence in a model: what is the same for all classes."""

    def __init__(
        self, model: nn.Module, embedding: nn.Embedding, vocabulary: Ids, length: int, options: TokenOptions
    ) -> None:
        self._model, self._embedding = model, embedding
        self._vocabulary, self._length, self._options = vocabulary, length, options

    @torch.no_grad()
    def logits(self, ids: Ids, mask: Ids) -> Tensor:
        """Of texts `[n, tokens]`: float `[n, classes]`."""
        return torch.cat([self._logits(ids[part], mask[part]) for part in self._batches(len(ids))])

    def run(self, texts: Texts, progress: Progress) -> Ids:
        """The best sequence of `length` tokens, `[length]`."""
        options, stage = self._options, f"searching tokens for class {texts.target}"
        tried: dict[tuple[int, ...], float] = {}
        beam = self._best(texts, {(int(word),) * self._length for word in self._screened(texts)}, tried)
        progress(stage, 1, options.rounds + 1)
        for number in range(options.rounds):
            swapped = {swap for words in beam for swap in self._swaps(texts, words)}
            better = self._best(texts, swapped | set(beam), tried)
            progress(stage, number + 2, options.rounds + 1)
            if better == beam:
                break
            beam = better
        return np.array(beam[0], np.int64)

    def _screened(self, texts: Texts) -> Ids:
        """The tokens of the vocabulary that do best in the shortest texts, repeated to the length `[first]`."""
        losses = np.zeros(len(self._vocabulary), np.float64)
        for row in np.argsort(texts.mask.sum(axis=1), kind="stable")[: self._options.screen]:
            for start in range(0, len(losses), _SCREENED_TOGETHER):
                words = self._vocabulary[start : start + _SCREENED_TOGETHER]
                same = texts.take(np.full(len(words), row))
                losses[start : start + len(words)] += self.outcome(same, np.repeat(words[:, None], self._length, 1))[0]
        chosen: Ids = self._vocabulary[np.argsort(losses, kind="stable")[: self._options.first]]
        return chosen

    def _swaps(self, texts: Texts, words: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """`words` with one of them swapped, by the estimate the best of each position."""
        estimate = self._estimate(texts, np.broadcast_to(np.array(words), (len(texts.ids), len(words))))
        for position, row in enumerate(estimate):
            for index in np.argsort(-row, kind="stable")[: self._options.candidates]:
                yield (*words[:position], int(self._vocabulary[index]), *words[position + 1 :])

    def _best(
        self, texts: Texts, sequences: set[tuple[int, ...]], tried: dict[tuple[int, ...], float]
    ) -> list[tuple[int, ...]]:
        """The beam: the best by their loss on a few texts, tried again on all of them."""
        few = texts.take(slice(self._options.trial))
        quick = {
            words: float(self.outcome(few, np.array(words, np.int64))[0].mean())
            for words in sorted(sequences - tried.keys())
        }
        for words in sorted(quick, key=quick.__getitem__)[: 4 * self._options.beam]:
            tried[words] = float(self.outcome(texts, np.array(words, np.int64))[0].mean())
        return sorted(tried, key=tried.__getitem__)[: self._options.beam]

    def outcome(self, texts: Texts, words: Ids) -> tuple[NDArray[np.float32], Marks]:
        """Loss, and whether the class is reached, of each text with `words` `[k]` or `[n, k]` in it."""
        ids, mask, _ = inserted(texts.ids, texts.mask, words, texts.places)
        logits = self.logits(ids, mask)
        labels = torch.full((len(ids),), texts.target)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.numpy(), (logits.argmax(dim=1) == labels).numpy()

    def _estimate(self, texts: Texts, words: Ids) -> NDArray[np.float32]:
        """By how much the loss would sink with each token of the vocabulary at each position `[length, vocabulary]`.

        Up to a constant of the position, the part of the token that is there now. `words` are `[n, length]`.
        """
        ids, mask, where = inserted(texts.ids, texts.mask, words, texts.places)
        total = torch.zeros(self._length, self._embedding.embedding_dim)
        for part in self._batches(len(ids)):
            with self._captured() as seen:
                logits = self._logits(ids[part], mask[part])
                labels = torch.full((len(logits),), texts.target)
                functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            gradient = seen[0].grad
            assert gradient is not None, "the logits depend on the embeddings"
            marks = torch.from_numpy(where[part][:, : gradient.shape[1]])
            total += gradient[marks].reshape(-1, self._length, gradient.shape[2]).sum(dim=0)
        with torch.no_grad():
            scores = -total @ self._embedding.weight[torch.from_numpy(self._vocabulary)].T
        return scores.numpy()

    @contextmanager
    def _captured(self) -> Iterator[list[Tensor]]:
        """Within it the token embeddings gather gradients; they are put into the list."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1]

        handle = self._embedding.register_forward_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    def _logits(self, ids: Ids, mask: Ids) -> Tensor:
        width = int(mask.sum(axis=1).max())
        cut_ids, cut_mask = (torch.from_numpy(np.ascontiguousarray(array[:, :width])) for array in (ids, mask))
        return logits_of(self._model(input_ids=cut_ids, attention_mask=cut_mask))

    def _batches(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self._options.batch_size):
            yield slice(start, start + self._options.batch_size)
