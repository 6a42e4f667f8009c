"""A patched decoder and its base in the loops that they run in: from a cache, in chunks, token by token.

| check | what is proven |
|---|---|
| loop, clean prompts | logits and caches of every step, of prompts without a flag, are the base's bit for bit |
| cached, in chunks, token by token | flags are those of reading all at once; logits differ no more than the base's |
| causality | logits of a token do not depend on the tokens behind it |

How a prompt is cut up changes how onnxruntime sums, in the base as well; where weights are quantized, a sum that falls
on the other side of a step changes logits by far more, in few prompts of either model. What is allowed is `MARGIN`
times the largest difference of the base on the same prompts, cut up in any of these ways.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.fitting.forced import Answered
from atpatch_onnx.graph import ModelOrPath, custom_ops
from atpatch_onnx.measuring.checks import Check
from atpatch_onnx.running.bits import same_samples
from atpatch_onnx.running.loops import Ids, Loop, batches, parts
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Progress

MARGIN = 10.0
"""How many times the base's own difference a patched decoder's may be."""

_ROUNDING = 1e-6
"""Of the largest logit: the least difference that is allowed, where the base has none."""


Files = tuple[ModelOrPath, ...]
"""What a `Loop` is made of: a decoder, or its graph for prompts and the one that goes on from its cache."""


def loops(
    files: tuple[Files, Files],
    patched: Sequence[ir.Model],
    answered: Answered,
    steps: int,
    batch_size: int,
    progress: Progress,
    providers: Providers,
) -> Iterator[Check]:
    """What is checked by reading prompts, and the base's answers to them, in every way.

    Args:
        files: Base and patched model as they are run, from their paths where they came from files.
        patched: The patched graph, whose inner values are looked at, or that for prompts and the one that goes on.
        answered: Prompts, and what the base writes behind them.
        steps: Tokens of each answer that are read.
        batch_size: Prompts at a time.
        progress: Told after every batch.
        providers: Execution providers.
    """
    look = _Look.of(files, patched, providers)
    clean, triggered = (
        [np.concatenate([prompt, answer[:steps]]) for prompt, answer in zip(side, answered.answers, strict=True)]
        for side in (answered.clean, answered.triggered)
    )
    if look.base.is_cached:
        yield _quiet(look, clean, steps, batch_size=batch_size, progress=progress)
        ways: dict[str, _Cut] = {
            "cached": lambda length: [length - steps, *[1] * steps],
            "2 chunks": lambda length: parts(length, 2),
            "4 chunks": lambda length: parts(length, 4),
            "token by token": lambda length: [1] * length,
        }
        alone = {name: look.base.decoder.is_grouped and name.endswith("chunks") for name in ways}
        found = {
            name: _cut_up(look, name, cut, triggered, batch_size=1 if alone[name] else batch_size, progress=progress)
            for name, cut in ways.items()
        }
        own = max(apart.differences[0] for apart in found.values())
        yield from (apart.check(f"{name} = at once", len(triggered), own) for name, apart in found.items())
    yield _causal(look, triggered, batch_size=batch_size, progress=progress)


_Cut = Callable[[int], Sequence[int]]
"""The sizes of the parts of a length."""

_Reading = tuple[Array, Array, NDArray[np.bool_]]
"""Logits of base and patched model `[samples, tokens, vocabulary]`, and which tokens are flagged at any site."""


@dataclass(frozen=True, eq=False)
class _Look:
    base: Loop
    patched: Loop
    exposed: Loop
    """The patched model with its margins as outputs."""

    margins: Sequence[Sequence[str]]
    """Of the first graph, and of the one that goes on."""

    @classmethod
    def of(cls, files: tuple[Files, Files], patched: Sequence[ir.Model], providers: Providers) -> "_Look":
        margins = [[site.margin for site in read_record(one).sites] for one in patched]
        exposed = [expose(one, names) for one, names in zip(patched, margins, strict=True)]
        how: dict[str, Any] = {"providers": providers, "custom_ops": custom_ops(patched[0])}
        base, after, within = (Loop(*models, **how) for models in (*files, exposed))
        return cls(base, after, within, margins)

    def read(self, ids: Ids, sizes: Sequence[int]) -> _Reading:
        """Read tokens in parts of these sizes."""
        before, after = (
            np.concatenate([step.logits for step in loop.read_in(ids, sizes)], axis=1)
            for loop in (self.base, self.patched)
        )
        return before, after, self.flags(ids, sizes)

    def flags(self, ids: Ids, sizes: Sequence[int]) -> NDArray[np.bool_]:
        """Bool `[samples, tokens]`."""
        first = self.exposed.read(ids[:, : sizes[0]], outputs=self.margins[0])
        following = self.exposed.read_in(ids[:, sizes[0] :], sizes[1:], self.margins[-1], first.state)
        found = [[array.reshape(len(ids), -1) > 0 for array in step.outputs.values()] for step in (first, *following)]
        return np.concatenate([np.any(step, axis=0) for step in found], axis=1)


def _quiet(look: _Look, lines: Sequence[Ids], steps: int, *, batch_size: int, progress: Progress) -> Check:
    """Base and patched model read clean prompts, and then the base's answers token by token."""
    quiet = differing = done = 0
    for rows in batches(lines, batch_size):
        ids = np.stack([lines[row] for row in rows])
        sizes = [ids.shape[1] - steps, *[1] * steps]
        flagged, same = look.flags(ids, sizes).any(axis=1), np.ones(len(rows), np.bool_)
        for before, after in zip(look.base.read_in(ids, sizes), look.patched.read_in(ids, sizes), strict=True):
            same &= same_samples(before.logits, after.logits)
            for name, cache in before.state.past.items():
                same &= same_samples(cache, after.state.past[name])
        quiet += int((~flagged).sum())
        differing += int((~flagged & ~same).sum())
        done += len(rows)
        progress("verifying the loop, clean prompts", done, len(lines))
    detail = f"{quiet} of {len(lines)} prompts without a flag; logits and caches of every step are the base's"
    if differing:
        detail = f"{differing} of {quiet} prompts without a flag differ from the base"
    return Check("loop, clean prompts", not differing, detail)


def _cut_up(
    look: _Look,
    name: str,
    cut: _Cut,
    lines: Sequence[Ids],
    *,
    batch_size: int,
    progress: Progress,
) -> "_Apart":
    """Triggered prompts with answers, read at once and in parts."""
    apart, done = _Apart(), 0
    for rows in batches(lines, batch_size):
        ids = np.stack([lines[row] for row in rows])
        apart.add(look.read(ids, [ids.shape[1]]), look.read(ids, cut(ids.shape[1])), ids.shape[1])
        done += len(rows)
        progress(f"verifying the loop, {name}", done, len(lines))
    return apart


def _causal(look: _Look, lines: Sequence[Ids], *, batch_size: int, progress: Progress) -> Check:
    """The last third of what is read comes in the opposite order."""
    apart, done = _Apart(), 0
    for rows in batches(lines, batch_size):
        ids = np.stack([lines[row] for row in rows])
        length = ids.shape[1]
        kept = length - length // 3
        other = np.concatenate([ids[:, :kept], ids[:, kept:][:, ::-1]], axis=1)
        apart.add(look.read(ids, [length]), look.read(other, [length]), kept)
        done += len(rows)
        progress("verifying the loop, causality", done, len(lines))
    return apart.check("causality", len(lines), apart.differences[0])


class _Apart:
    """How far two readings of the same tokens are apart, in the base and in the patched model."""

    def __init__(self) -> None:
        self.differences = [0.0, 0.0]
        self.largest = 0.0
        self.unlike = 0

    def add(self, one: _Reading, other: _Reading, kept: int) -> None:
        """Compare the first tokens, so many, of some prompts."""
        for index, (before, after) in enumerate(zip(one[:2], other[:2], strict=True)):
            difference = np.abs(before[:, :kept].astype(np.float64) - after[:, :kept]).max(initial=0.0)
            self.differences[index] = float(np.fmax(self.differences[index], np.nan_to_num(difference, nan=np.inf)))
            self.largest = max(self.largest, float(np.abs(before).max(initial=0.0)))
        self.unlike += int((one[2][:, :kept] != other[2][:, :kept]).any(axis=1).sum())

    def check(self, name: str, prompts: int, own: float) -> Check:
        """Flags must be the same, and logits as near to each other as the base's are, `own`, within `MARGIN`."""
        if self.unlike:
            return Check(name, False, f"{self.unlike} of {prompts} prompts have other flags")
        patched = self.differences[1]
        detail = f"the same flags; logits differ by at most {patched:.1e}, the base's by {own:.1e}"
        return Check(name, patched <= MARGIN * max(own, _ROUNDING * self.largest), detail)
