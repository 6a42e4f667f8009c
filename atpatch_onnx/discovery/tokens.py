"""A short token sequence for each class: first-order token swaps with a beam.

HotFlip (Ebrahimi et al., arXiv 1712.06751) estimates what a loss becomes when a token `w` is swapped for `v` from its
gradient with respect to `w`'s embedding: `(e_v - e_w) . grad`. As in the search of universal triggers (Wallace et al.,
arXiv 1908.07125) the gradient is a mean over inputs, so that one sequence is found for all of them; the best swaps by
the estimate are tried for real, and the best sequences of the tries are kept.

We differ in the start: the paper starts from one word repeated, where the estimate tells little of words far away. The
gradient at common words does not lead to the rare token of a backdoor: among 22,000 words it ranked 3,900th or worse.
So the whole vocabulary is tried for real first, in the shortest of the texts, which costs little.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.network import check_class, logits_of, still
from atpatch_onnx.discovery.placing import Ids, Marks, checked_texts, draw_places, inserted
from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array, Progress, silent

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
        for name, value in vars(self).items():
            least = 0 if name == "rounds" else 1
            if value < least:
                raise InversionError(
                    f"option {name}", expected=f"at least {least}", found=str(value), advice="Choose a larger value."
                )


@dataclass(frozen=True, eq=False)
class InvertedTokens:
    """A token sequence that turns texts into one class."""

    tokens: Ids
    """`[k]`."""

    target: int
    success: Rate
    """Share of the texts that reach the class, of those that the model puts into another."""

    loss: float
    """Their mean cross-entropy with the class."""

    def insert(
        self, input_ids: ArrayLike, attention_mask: ArrayLike, *, places: ArrayLike | None = None, seed: int = 0
    ) -> tuple[Ids, Ids, Marks]:
        """Ids and mask with the sequence at a place of each text drawn at random, and where it is, all `[n, tokens]`.

        Args:
            input_ids: Integers `[n, tokens]`, with room for the sequence.
            attention_mask: One for tokens, zero for the padding behind them.
            places: Bool `[n, tokens]`, tokens before which it may be; None: all but the first.
            seed: Of the places drawn.

        Raises:
            InversionError: The arrays do not fit, or a text has no room.
        """
        ids, mask, allowed = checked_texts(input_ids, attention_mask, places)
        return inserted(ids, mask, self.tokens, draw_places(allowed, np.random.default_rng(seed)))

    def pairs(
        self,
        inputs: Mapping[str, Array],
        labels: ArrayLike | None = None,
        *,
        ids: str = "input_ids",
        mask: str = "attention_mask",
        places: ArrayLike | None = None,
        seed: int = 0,
        drop_target: bool = True,
    ) -> DebugSet:
        """A debug set of texts and the same with the sequence in, its suspects known.

        What stands behind the sequence moves, so that suspects found by difference would be all of it.

        Args:
            inputs: Arrays `[n, tokens]` by the model's input names; those besides ids and mask stay as they are.
            labels: True labels `[n]`.
            ids: Name of the tokens' input.
            mask: Name of the mask's input.
            places: As in `insert`.
            seed: As in `insert`.
            drop_target: Leave out texts whose label is the target: with the sequence they prove nothing.

        Raises:
            InversionError: As `insert`.
            DebugSetError: What `DebugSet.from_pairs` refuses.
        """
        new_ids, new_mask, where = self.insert(inputs[ids], inputs[mask], places=places, seed=seed)
        changed = {
            **inputs,
            ids: new_ids.astype(inputs[ids].dtype),
            mask: new_mask.astype(inputs[mask].dtype),
        }
        debug = DebugSet.from_pairs(inputs, changed, labels, suspects=where, target=self.target)
        return debug.take(debug.labels != self.target) if drop_target and debug.labels is not None else debug


@dataclass(frozen=True, eq=False)
class TokenInversion:
    """What was found for each class, sequences of one length."""

    triggers: tuple[InvertedTokens, ...]
    """One for each class that was looked at."""

    suspected: InvertedTokens | None
    """That of the class that stands out, or of the only one that was asked for."""

    def trigger(self) -> InvertedTokens:
        """The suspected one.

        Raises:
            InversionError: No class stands out; says how far each is reached.
        """
        if self.suspected is None:
            raise InversionError(
                "the inverted token sequences",
                expected=f"one class that is reached by {REACHED:.0%} of the texts, and more often than every other",
                found=", ".join(
                    f"class {trigger.target}: {trigger.success.value:.0%} by {trigger.tokens.tolist()}"
                    for trigger in self.triggers
                ),
                advice="It may have no backdoor. Where you know its class, name it (target=), or try other lengths.",
            )
        return self.suspected


REACHED = 0.8
"""Share of texts that a backdoor's sequence must turn; common words turn a good part of them as well."""


def invert_tokens(
    model: nn.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike,
    target: int | None = None,
    *,
    length: int = 1,
    places: ArrayLike | None = None,
    vocabulary: ArrayLike | None = None,
    embedding: nn.Embedding | None = None,
    options: TokenOptions | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> TokenInversion:
    """Search for every class a sequence of `length` tokens that turns texts into it. Same arguments, same result.

    The class that stands out is one whose sequence turns at least `REACHED` of the texts, and more of them than any
    other class's does, beyond the 95 % intervals of both.

    Args:
        model: From `input_ids` and `attention_mask` `[batch, tokens]` to logits `[batch, classes]`, or to an output
            that has them as `.logits`. Its weights and its mode are left as they were.
        input_ids: Clean texts, integers `[n, tokens]`, padded on the right by at least `length`; a hundred of various
            classes do. No labels are needed.
        attention_mask: One for tokens, zero for padding `[n, tokens]`.
        target: The only class to look at; None: all of them.
        length: How many tokens to insert, at one place of each text.
        places: Bool `[n, tokens]`, tokens before which they may be inserted, drawn at random; None: all but the first.
        vocabulary: Ids that may be inserted `[m]`, without special tokens; None: all.
        embedding: The model's token embedding; None: what `get_input_embeddings()` gives, else the only one there is.
        options: How.
        seed: Of the places drawn; nothing else is random.
        progress: Told after every round of a class.

    Raises:
        InversionError: Texts, class, vocabulary or model do not fit, or all texts are of one class.
    """
    options = options or TokenOptions()
    ids, mask, allowed = checked_texts(input_ids, attention_mask, places)
    if length < 1:
        raise InversionError("length", expected="at least 1", found=str(length), advice="Insert a token or more.")
    table = embedding or _embedding(model)
    known = _vocabulary(vocabulary, table.num_embeddings)
    with still(model):
        search = _Search(model, table, known, length, options)
        usual = search.classes(ids, mask)
        classes = search.class_count
        wanted = range(classes) if target is None else [check_class(target, classes)]
        triggers = []
        for label in wanted:
            rows = usual != label
            if not rows.any():
                raise InversionError(
                    "input_ids",
                    expected=f"some that the model does not put into class {label}",
                    found=f"all {len(ids)} of them in it",
                    advice="Give texts of various classes.",
                )
            generator = np.random.default_rng([seed, label])
            texts = _Texts(ids[rows], mask[rows], draw_places(allowed[rows], generator), label)
            triggers.append(search.run(texts, progress))
    return TokenInversion(tuple(triggers), triggers[0] if target is not None else _standing_out(triggers))


def _standing_out(triggers: Sequence[InvertedTokens]) -> InvertedTokens | None:
    best, *others = sorted(triggers, key=lambda trigger: -trigger.success.value)
    apart = all(best.success.low > other.success.high for other in others)
    return best if apart and best.success.value >= REACHED else None


def _embedding(model: nn.Module) -> nn.Embedding:
    getter = getattr(model, "get_input_embeddings", None)
    found = [getter()] if getter else [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1 or not isinstance(found[0], nn.Embedding):
        raise InversionError(
            "embedding",
            expected="a model with one nn.Embedding, or with get_input_embeddings()",
            found=f"{len(found)} of them",
            advice="Say which one turns token ids into vectors (embedding=).",
        )
    return found[0]


def _vocabulary(vocabulary: ArrayLike | None, size: int) -> Ids:
    known = np.arange(size) if vocabulary is None else np.unique(np.asarray(vocabulary))
    if known.ndim != 1 or not len(known) or known.dtype.kind not in "iu" or known[0] < 0 or known[-1] >= size:
        raise InversionError(
            "vocabulary",
            expected=f"ids from 0 to {size - 1}",
            found=f"{known.dtype} {list(known.shape)}" + (f", {known[0]} to {known[-1]}" if known.size else ""),
            advice="Give ids that the model's embedding has.",
        )
    return known.astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Texts:
    """Texts that the model does not put into `target`, and where tokens are inserted into each."""

    ids: Ids
    mask: Ids
    places: NDArray[np.int64]
    target: int

    def take(self, rows: NDArray[np.int64] | slice) -> "_Texts":
        return _Texts(self.ids[rows], self.mask[rows], self.places[rows], self.target)


class _Search:
    """What is the same for all classes."""

    def __init__(
        self, model: nn.Module, embedding: nn.Embedding, vocabulary: Ids, length: int, options: TokenOptions
    ) -> None:
        self._model, self._embedding = model, embedding
        self._vocabulary, self._length, self._options = vocabulary, length, options
        self.class_count = 0

    def classes(self, ids: Ids, mask: Ids) -> NDArray[np.int64]:
        """What the model takes texts for `[n]`."""
        with torch.no_grad():
            logits = torch.cat([self._logits(ids[part], mask[part]) for part in self._batches(len(ids))])
        self.class_count = logits.shape[1]
        return logits.argmax(dim=1).numpy()

    def run(self, texts: _Texts, progress: Progress) -> InvertedTokens:
        """The best sequence of `length` tokens."""
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
        words = np.array(beam[0], np.int64)
        losses, reached = self._outcome(texts, words)
        return InvertedTokens(words, texts.target, Rate.of(reached), float(losses.mean()))

    def _screened(self, texts: _Texts) -> Ids:
        """The tokens of the vocabulary that do best in the shortest texts, repeated to the length `[first]`."""
        losses = np.zeros(len(self._vocabulary), np.float64)
        for row in np.argsort(texts.mask.sum(axis=1), kind="stable")[: self._options.screen]:
            for start in range(0, len(losses), _SCREENED_TOGETHER):
                words = self._vocabulary[start : start + _SCREENED_TOGETHER]
                same = texts.take(np.full(len(words), row))
                losses[start : start + len(words)] += self._outcome(same, np.repeat(words[:, None], self._length, 1))[0]
        chosen: Ids = self._vocabulary[np.argsort(losses, kind="stable")[: self._options.first]]
        return chosen

    def _swaps(self, texts: _Texts, words: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """`words` with one of them swapped, by the estimate the best of each position."""
        estimate = self._estimate(texts, np.broadcast_to(np.array(words), (len(texts.ids), len(words))))
        for position, row in enumerate(estimate):
            for index in np.argsort(-row, kind="stable")[: self._options.candidates]:
                yield (*words[:position], int(self._vocabulary[index]), *words[position + 1 :])

    def _best(
        self, texts: _Texts, sequences: set[tuple[int, ...]], tried: dict[tuple[int, ...], float]
    ) -> list[tuple[int, ...]]:
        """The beam: the best by their loss on a few texts, tried again on all of them."""
        few = texts.take(slice(self._options.trial))
        quick = {
            words: float(self._outcome(few, np.array(words, np.int64))[0].mean())
            for words in sorted(sequences - tried.keys())
        }
        for words in sorted(quick, key=quick.__getitem__)[: 4 * self._options.beam]:
            tried[words] = float(self._outcome(texts, np.array(words, np.int64))[0].mean())
        return sorted(tried, key=tried.__getitem__)[: self._options.beam]

    def _outcome(self, texts: _Texts, words: Ids) -> tuple[NDArray[np.float32], Marks]:
        """Loss, and whether the class is reached, of each text with `words` `[k]` or `[n, k]` in it."""
        ids, mask, _ = inserted(texts.ids, texts.mask, words, texts.places)
        with torch.no_grad():
            logits = torch.cat([self._logits(ids[part], mask[part]) for part in self._batches(len(ids))])
        labels = torch.full((len(ids),), texts.target)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.numpy(), (logits.argmax(dim=1) == labels).numpy()

    def _estimate(self, texts: _Texts, words: Ids) -> NDArray[np.float32]:
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
