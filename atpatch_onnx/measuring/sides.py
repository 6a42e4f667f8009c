"""What base and patched model make of both sides of a debug set: what an evaluation counts, a batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.collect import anomalous_columns
from atpatch_onnx.matching import batching
from atpatch_onnx.measuring.inspect import last_margin
from atpatch_onnx.running.bits import same_samples
from atpatch_onnx.running.counted import Counts, ScoreCounter
from atpatch_onnx.running.executors import LOCAL, Executor, Kept
from atpatch_onnx.running.predictions import classes, confidences
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Progress, Session, silent
from atpatch_onnx.running.shards import Groups, Models, Opening, stream

SIDES = ("clean", "counterfactual")


@dataclass(frozen=True, eq=False)
class Side:
    """What both models make of one side."""

    base: NDArray[np.int64]
    """Predicted classes `[inputs]`."""

    patched: NDArray[np.int64]
    same: NDArray[np.bool_]
    """Whether all logits are equal bit for bit `[inputs]`."""

    flags: NDArray[np.bool_]
    """`[inputs, tokens]`; no tokens where the patch does not detect."""

    largest: NDArray[np.float64]
    """Largest margin of an input's tokens over all detecting sites `[inputs]`."""


@dataclass(frozen=True, eq=False)
class Sides:
    """Both sides."""

    clean: Side
    other: Side
    gaps: tuple[NDArray[np.float64], NDArray[np.float64]] | None
    """Of a protected attribute: largest change of a class's confidence within each pair `[pairs]`, of the base and of
    the patched model."""

    scores: Counts
    """Of all tokens of both sides, by whether they should be flagged."""


def run_sides(
    base: ir.Model,
    patched: ir.Model,
    record: PatchRecord,
    debug: DebugSet,
    output: str,
    *,
    providers: Providers = ("cpu",),
    batch_size: int = 32,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> Sides:
    """Run both sides through both models.

    Args:
        base: The model before.
        patched: The model after.
        record: What the latter says of its patch.
        debug: With its suspects, where the patch detects.
        output: Name of the output that predictions are read from.
        providers: What is to run both.
        batch_size: Pairs at a time.
        executor: Who runs both.
        progress: Told after every batch.
    """
    margin = last_margin(record.sites) if record.detects else None
    exposed = expose(patched, [] if margin is None else [margin])
    models = tuple(Opening(model, batching(base), providers) for model in (base, exposed))
    anomalous = anomalous_columns(debug) if margin is not None else (np.zeros((len(debug), 0), np.bool_),) * 2
    groups: Groups = {"clean": debug.clean, "counterfactual": debug.counterfactual}
    run: dict[str, Any] = {"batch_size": models[0].batch_size(tuple(debug.clean), batch_size), "progress": progress}
    parts: dict[str, list[Array]] = {}
    counter = ScoreCounter()
    team, work = executor.team(Models(models)), _Judging(output, margin, debug.kind == "attribute")
    for rows, kept in stream(team, work, groups, stage="evaluating", **run):
        for side, wanted in zip(SIDES, anomalous, strict=True):
            counter.add(kept[f"{side}/scores"], wanted[rows])
        for name, array in kept.items():
            if not name.endswith("/scores"):
                parts.setdefault(name, []).append(array)
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    clean, other = (
        Side(**{name.partition("/")[2]: array for name, array in found.items() if name.startswith(f"{side}/")})
        for side in SIDES
    )
    gaps = (found["gap/base"], found["gap/patched"]) if work.gaps else None
    return Sides(clean, other, gaps, counter.counts())


@dataclass(frozen=True)
class _Judging:
    """What an evaluation counts of a batch of pairs."""

    output: str
    margin: str | None
    gaps: bool

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        found: dict[str, Array] = {}
        logits: dict[str, list[Array]] = {"base": [], "patched": []}
        names = [self.output] if self.margin is None else [self.output, self.margin]
        for side in SIDES:
            before = sessions[0].batch(batch[side], [self.output])[self.output]
            inner = sessions[1].batch(batch[side], names)
            after, count = inner[self.output], len(before)
            # neuron edits detect nothing
            scores = inner[self.margin].reshape(count, -1) if self.margin is not None else np.zeros((count, 0))
            found |= {
                f"{side}/base": classes(before),
                f"{side}/patched": classes(after),
                f"{side}/same": same_samples(before, after),
                f"{side}/flags": scores > 0,
                f"{side}/largest": scores.max(axis=1, initial=-np.inf).astype(np.float64),
                f"{side}/scores": scores,
            }
            logits["base"].append(before)
            logits["patched"].append(after)
        for name, (one, another) in logits.items() if self.gaps else ():
            found[f"gap/{name}"] = np.abs(confidences(one) - confidences(another)).max(axis=1)
        return found
