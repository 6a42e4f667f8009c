"""A short token sequence for each class, found by swapping tokens (`swaps`), and the class that stands out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.network import check_class, outside, still
from atpatch_onnx.discovery.placing import Ids, Marks, checked_texts, draw_places, inserted
from atpatch_onnx.discovery.swaps import SwapSearch, Texts, TokenOptions
from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array, Progress, silent


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
        changed = {**inputs, ids: new_ids.astype(inputs[ids].dtype), mask: new_mask.astype(inputs[mask].dtype)}
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
        search = SwapSearch(model, table, known, length, options)
        logits = search.logits(ids, mask)
        usual, classes = logits.argmax(dim=1).numpy(), logits.shape[1]
        wanted = range(classes) if target is None else [check_class(target, classes)]
        triggers = []
        for label in wanted:
            rows = outside(usual, label, "input_ids")
            generator = np.random.default_rng([seed, label])
            texts = Texts(ids[rows], mask[rows], draw_places(allowed[rows], generator), label)
            words = search.run(texts, progress)
            losses, reached = search.outcome(texts, words)
            triggers.append(InvertedTokens(words, label, Rate.of(reached), float(losses.mean())))
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
