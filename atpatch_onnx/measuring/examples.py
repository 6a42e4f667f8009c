"""A few pairs looked at closely, for the report: predictions, flags, and attention before and after redistribution.

    scan the first pairs -> choose -> run the chosen few with their attention maps

The scan runs outputs and flags only, and stops as soon as there is enough to choose from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.maps import map_outputs, mean_maps, with_maps
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.collect import anomalous_columns, input_specs
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.inspect import last_margin, with_columns
from atpatch_onnx.running.bits import same_samples
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.predictions import classes, confidences, prediction_output
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

SCAN = 256
"""Pairs looked at, at most, to choose from."""

CHUNK = 64
"""Pairs looked at before asking whether there is enough."""

Flags = NDArray[np.bool_]


class Story(StrEnum):
    """Why a pair was chosen."""

    REPAIRED = "repaired"
    """The base's prediction changes with the counterfactual, the patched model's does not."""

    MISSED = "missed"
    """The patched model's prediction still changes as the base's does, or changes where the base's does not."""

    FALSE_ALARM = "false alarm"
    """A benign column of the clean input is flagged."""

    UNTOUCHED = "untouched"
    """Nothing on the clean input is flagged, and its outputs are the base's bit for bit."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input."""

    label: int
    confidence: float


@dataclass(frozen=True, eq=False)
class SiteView:
    """One redistributing site and one input: the attention map, mean over the heads."""

    site: str
    before: NDArray[np.float32]
    """`P` `[queries, keys]`."""

    after: NDArray[np.float32]
    """The map of the patched model `[queries, keys]`."""

    @property
    def visible(self) -> Flags:
        """Keys `[keys]` that some query sees; the others are padding."""
        return np.asarray((self.before > 0).any(axis=0))

    @property
    def received_before(self) -> NDArray[np.float32]:
        """Share of the attention that each key receives `[keys]`: the mean over the queries that are no padding."""
        return self._received(self.before)

    @property
    def received_after(self) -> NDArray[np.float32]:
        """The same after redistribution."""
        return self._received(self.after)

    def _received(self, map_: NDArray[np.float32]) -> NDArray[np.float32]:
        queries, keys = map_.shape
        rows = self.visible if queries == keys and self.visible.any() else np.ones(queries, np.bool_)
        return np.asarray(map_[rows].mean(axis=0), np.float32)


@dataclass(frozen=True, eq=False)
class ExampleSide:
    """One side of a pair."""

    inputs: Mapping[str, Array]
    """One sample, by input name, without the batch axis."""

    base: Prediction
    patched: Prediction

    flags: Flags
    """`[tokens]`, of all sites together."""

    anomalous: Flags
    """`[tokens]`: the positions that should be flagged."""

    identical: bool
    """Whether base and patched logits are equal bit for bit."""

    sites: tuple[SiteView, ...]
    """Every redistributing site, in the order of the graph."""


@dataclass(frozen=True, eq=False)
class Example:
    """One pair."""

    pair: int
    """Row of the debug set."""

    story: Story
    label: int | None
    """The true label, where known."""

    clean: ExampleSide
    counterfactual: ExampleSide


@dataclass(frozen=True, eq=False)
class _Scan:
    """What the scanned pairs show, each `[pairs]`."""

    repaired: Flags
    """The base's prediction changes, the patched model's does not."""

    still: Flags
    """The patched model's prediction changes, to what the base's changes to, or where the base's does not."""

    alarm: Flags
    untouched: Flags
    right: Flags
    """The base is right on the clean side, as far as labels tell."""

    label: NDArray[np.int64]
    """The base's prediction on the clean side."""


def gather_examples(
    base: ModelOrPath,
    patched: ModelOrPath,
    debug: DebugSet,
    *,
    count: int = 4,
    output: str | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> tuple[Example, ...]:
    """Choose pairs that tell what the patch does, the same ones every time, and look at them closely.

    None where the patch edits hidden units alone. At most one pair each is a miss, a false alarm, and a clean input
    that was left untouched; the others are repaired, of different classes where there are several.

    Args:
        base: The model before.
        patched: The model after.
        debug: Pairs to choose from; the first `SCAN` at most.
        count: How many pairs, at most.
        output: Output that predictions are read from; None: the first float output `[batch, classes]`.
        batch_size: Inputs at a time.
        progress: Told after every batch.

    Raises:
        DebugSetError: The debug set does not fit the model.
        UnbakeError: `patched` is not patched.
        RunError: onnxruntime refuses a model or an input.
    """
    base, patched = as_model(base), as_model(patched)
    debug.check_inputs(input_specs(base))
    if not read_record(patched).sites:
        return ()
    closeup = _Closeup(base, patched, prediction_output(base, output, batching(base)), batch_size, progress)
    debug = debug.take(np.arange(min(len(debug), SCAN)))
    debug = with_columns(base, patched, read_record(patched), debug, batch_size=batch_size, progress=progress)
    scanned: list[_Scan] = []
    for start in range(0, len(debug), CHUNK):
        scanned.append(closeup.scan(debug.take(np.arange(start, min(start + CHUNK, len(debug))))))
        chosen = _choose(scanned, count)
        if len(chosen) >= count and sum(story is Story.REPAIRED for _, story in chosen) >= count - 1:
            break
    if not chosen:
        return ()
    rows = np.array([row for row, _ in chosen])
    return closeup.examples(debug.take(rows), rows, [story for _, story in chosen])


def _choose(scanned: list[_Scan], count: int) -> list[tuple[int, Story]]:
    """Rows and why: the repaired first, then at most one each of the others."""
    whole = {field.name: np.concatenate([getattr(scan, field.name) for scan in scanned]) for field in fields(_Scan)}
    order = np.argsort(~whole["right"], kind="stable")  # those that the base is right about tell most
    repaired, still, alarm, untouched = (
        order[whole[name][order]] for name in ("repaired", "still", "alarm", "untouched")
    )
    _, firsts = np.unique(whole["label"][repaired], return_index=True)
    varied = [*repaired[np.sort(firsts)], *np.delete(repaired, firsts)]
    special: list[tuple[int, Story]] = []
    taken = set(varied[:count])
    for story, rows in ((Story.MISSED, still), (Story.FALSE_ALARM, alarm), (Story.UNTOUCHED, untouched)):
        row = next((row for row in rows if row not in taken), None)
        if row is not None:
            taken.add(row)
            special.append((int(row), story))
    special = special[: max(0, count - 1) if varied else count]
    return [(int(row), Story.REPAIRED) for row in varied[: count - len(special)]] + special


class _Closeup:
    """Sessions of the base and of the patched model with their maps."""

    def __init__(self, base: ir.Model, patched: ir.Model, output: str, batch_size: int, progress: Progress) -> None:
        record = read_record(patched)
        chosen = {site.site for site in record.sites if site.redistributes}
        self._output, self._batch_size, self._progress = output, batch_size, progress
        self._margin = last_margin(record.sites)
        self._sites = [site for site in find_sites(base) if site.name in chosen]
        self._maps = map_outputs(self._sites)
        where = batching(base)
        self._base = Session(with_maps(base, self._sites, []), batching=where)
        self._patched = Session(with_maps(patched, self._sites, [self._margin]), batching=where)

    def _run(
        self, inputs: Mapping[str, Array], stage: str, *, maps: bool = False
    ) -> tuple[dict[str, Array], dict[str, Array], Flags]:
        """Logits and maps of base and patched model, and the flags `[inputs, tokens]`."""
        names = [self._output, *(self._maps.values() if maps else ())]
        before = self._base.collect(inputs, names, batch_size=self._batch_size)
        after = self._patched.collect(
            inputs, [*names, self._margin], batch_size=self._batch_size, progress=self._progress, stage=stage
        )
        samples = len(before[self._output])
        return before, after, np.asarray(after[self._margin] > 0).reshape(samples, -1)

    def scan(self, debug: DebugSet) -> _Scan:
        before, after, flags = self._run(debug.clean, "choosing examples, clean inputs")
        other_before, other_after, _ = self._run(debug.counterfactual, "choosing examples, counterfactuals")
        own, other = classes(before[self._output]), classes(other_before[self._output])
        followed = classes(other_after[self._output])
        flips, changes = own != other, classes(after[self._output]) != followed
        return _Scan(
            still=changes & (~flips | (followed == other)),
            repaired=flips & ~changes,
            alarm=np.any(flags & ~anomalous_columns(debug)[0], axis=1),
            untouched=~np.any(flags, axis=1) & same_samples(before[self._output], after[self._output]),
            right=np.ones(len(flips), np.bool_) if debug.labels is None else own == debug.labels,
            label=own,
        )

    def examples(self, debug: DebugSet, rows: NDArray[np.int64], stories: list[Story]) -> tuple[Example, ...]:
        anomalous = anomalous_columns(debug)
        clean = self._sides(debug.clean, anomalous[0])
        counterfactual = self._sides(debug.counterfactual, anomalous[1])
        return tuple(
            Example(
                pair=int(row),
                story=story,
                label=None if debug.labels is None else int(debug.labels[number]),
                clean=clean[number],
                counterfactual=counterfactual[number],
            )
            for number, (row, story) in enumerate(zip(rows, stories, strict=True))
        )

    def _sides(self, inputs: Mapping[str, Array], anomalous: Flags) -> list[ExampleSide]:
        before, after, flags = self._run(inputs, "looking at examples", maps=True)
        logits = before[self._output], after[self._output]
        same = same_samples(*logits)
        views = [self._views(site, before, after) for site in self._sites if site.name in self._maps]
        return [
            ExampleSide(
                inputs={name: array[number] for name, array in inputs.items()},
                base=_prediction(logits[0][number]),
                patched=_prediction(logits[1][number]),
                flags=flags[number],
                anomalous=anomalous[number],
                identical=bool(same[number]),
                sites=tuple(view[number] for view in views),
            )
            for number in range(len(flags))
        ]

    def _views(self, site: AttentionSite, before: Mapping[str, Array], after: Mapping[str, Array]) -> list[SiteView]:
        samples, name = len(before[self._output]), self._maps[site.name]
        maps = (mean_maps(side[name], site, samples) for side in (before, after))
        return [SiteView(site.name, *pair) for pair in zip(*maps, strict=True)]


def _prediction(logits: Array) -> Prediction:
    label = int(classes(logits[None])[0])
    return Prediction(label, float(confidences(logits[None])[0, label]))
