"""Decode loops: a prompt is read, whole or in chunks, and a decoder writes on, token by token, from its cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.opening import Libraries, as_model
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class State:
    """What a loop has read so far, of samples of one length."""

    ids: Ids
    """`[samples, tokens]`."""

    past: dict[str, Array] = field(default_factory=dict)
    """Caches by the names of their inputs; none where the model has none."""

    def rewound(self, tokens: int) -> "State":
        """What it was after the first so many tokens: another continuation may be read from there."""
        return State(self.ids[:, :tokens], {name: cache[:, :, :tokens] for name, cache in self.past.items()})


@dataclass(frozen=True, eq=False)
class Step:
    """What came of reading some more tokens."""

    state: State
    logits: Array
    """Of these tokens, `[samples, tokens, vocabulary]`."""

    outputs: dict[str, Array]
    """What else was asked for, as the model gives it."""


class Loop:
    """A decoder that reads and writes. One without a cache reads everything again with every token.

    Args:
        model: A decoder, with or without a cache.
        decode: What goes on from the caches that `model` returns, where that reads prompts only.
        cached: Whether to use the cache, where there is one.
        optimize: As in `Session`.
        providers: As in `Session`.
        custom_ops: Libraries with operators of both, as in `load`.

    Raises:
        RunError: A model is no decoder, or onnxruntime refuses it.
    """

    def __init__(
        self,
        model: graphs.ModelOrPath,
        decode: graphs.ModelOrPath | None = None,
        *,
        cached: bool = True,
        optimize: bool = True,
        providers: Providers = ("cpu",),
        custom_ops: Libraries = (),
    ) -> None:
        loaded = as_model(model, custom_ops)
        self.decoder = Decoder.of(loaded)
        self.is_cached = cached and (self.decoder.is_cached or decode is not None)
        """Whether what was read is not read again."""

        how: dict[str, Any] = {"optimize": optimize, "providers": providers, "custom_ops": custom_ops}
        # A file is run as it lies there.
        self._session = Session(loaded if isinstance(model, ir.Model) else model, **how)
        self._next = Loop(decode, **how) if decode is not None and cached else None
        if self._next is not None:
            self.decoder.check_followed_by(self._next.decoder)

    def read(self, ids: Ids, state: State | None = None, outputs: Sequence[str] = ()) -> Step:
        """Read tokens `[samples, tokens]` behind those of `state`.

        Raises:
            RunError: onnxruntime refuses them, or the model takes another number of tokens.
        """
        if state is not None and self._next is not None:
            return self._next.read(ids, state, outputs)
        earlier = state is not None and not self.is_cached
        whole = ids if state is None else np.concatenate([state.ids, ids], axis=1)
        read = whole if earlier else ids
        self.decoder.check(read)
        caches = self._handed_out() if self.is_cached else {}
        wanted = [self.decoder.logits, *caches, *(name for name in outputs if name != self.decoder.logits)]
        fed = self.decoder.feed(read, None if state is None or earlier else state.past)
        results = self._session.run(fed, list(dict.fromkeys(wanted)))
        past = {name: results[output] for output, name in caches.items()}
        logits = results[self.decoder.logits][:, read.shape[1] - ids.shape[1] :]
        return Step(State(whole, past), logits, {name: results[name] for name in outputs})

    def read_in(
        self, ids: Ids, sizes: Sequence[int], outputs: Sequence[str] = (), state: State | None = None
    ) -> list[Step]:
        """Read tokens `[samples, tokens]`, in parts of these sizes, which make up all of them; arguments as in `read`.

        Raises:
            RunError: See `read`.
        """
        assert sum(sizes) == ids.shape[1], "parts make up the whole"
        steps: list[Step] = []
        start = 0
        for size in sizes:
            step = self.read(ids[:, start : start + size], state, outputs)
            steps.append(step)
            start, state = start + size, step.state
        return steps

    def write(
        self,
        prompts: Sequence[Ids],
        steps: int | Sequence[int],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        chunks: int = 1,
        batch_size: int = 32,
        progress: Progress = silent,
        stage: str = "writing",
    ) -> list[Ids]:
        """What the model writes behind each prompt, int64 `[steps]`.

        Args:
            prompts: Tokens `[tokens]` of each, of any lengths; those of one length are read together, so that there is
                no padding.
            steps: How many tokens to write, behind all or behind each.
            temperature: 0 takes the most likely token, more samples.
            seed: Of the samples; each prompt has its own numbers, whatever else is written.
            chunks: In how many parts a prompt is read.
            batch_size: Prompts at a time.
            progress: Told after every batch.
            stage: What to tell it.
        """
        counts = [steps] * len(prompts) if isinstance(steps, int) else list(steps)
        found: dict[int, Ids] = {}
        for rows in batches(prompts, 1 if chunks > 1 and self.decoder.is_grouped else batch_size, counts):
            ids = np.stack([prompts[row] for row in rows])
            draws = [np.random.default_rng((seed, row)) for row in rows]
            written = self._written(ids, max(counts[row] for row in rows), temperature, draws, chunks)
            found |= {row: line[: counts[row]] for row, line in zip(rows, written, strict=True)}
            progress(stage, len(found), len(prompts))
        return [found[row] for row in range(len(prompts))]

    def _written(
        self, ids: Ids, steps: int, temperature: float, draws: Sequence[np.random.Generator], chunks: int
    ) -> Ids:
        step = self.read_in(ids, parts(ids.shape[1], chunks))[-1]
        written = np.zeros((len(ids), 0), np.int64)
        while written.shape[1] < steps:
            following = _chosen(step.logits[:, -1], temperature, draws)[:, None]
            written = np.concatenate([written, following], axis=1)
            if written.shape[1] < steps:
                step = self.read(following, step.state)
        return written

    def _handed_out(self) -> dict[str, str]:
        """Outputs with caches, and what the inputs are called that take them next."""
        if self._next is None:
            return {cache.present: cache.past.name for cache in self.decoder.caches if cache.past is not None}
        following = {cache.layer: cache.past.name for cache in self._next.decoder.caches if cache.past is not None}
        return {cache.present: following[cache.layer] for cache in self.decoder.caches if cache.layer in following}


def parts(length: int, count: int) -> list[int]:
    """The sizes of so many parts of a length, as equal as they can be, none empty."""
    return [len(part) for part in np.array_split(np.arange(length), min(count, length))]


def batches(prompts: Sequence[Ids], size: int, steps: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Rows of prompts of one length, so many at a time, those with the same number of steps next to each other."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), 0 if steps is None else steps[row], row))
    batch: list[int] = []
    for row in order:
        if batch and (len(prompts[row]) != len(prompts[batch[0]]) or len(batch) == size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _chosen(logits: Array, temperature: float, draws: Sequence[np.random.Generator]) -> Ids:
    """The next token of each sample, of logits `[samples, vocabulary]`; sampled by the Gumbel trick."""
    if temperature == 0:
        return np.asarray(logits.argmax(axis=1), np.int64)
    noise = np.stack([draw.gumbel(size=logits.shape[1]) for draw in draws])
    return np.asarray((logits.astype(np.float64) / temperature + noise).argmax(axis=1), np.int64)
