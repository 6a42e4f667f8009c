"""What a hunt gathers of each input, whatever other inputs there are: its prediction, and the small part that decides.

Whether parts recur is asked of many inputs together (`hunting`). So inputs are gathered once, and traffics that are
drawn from them are judged one by one. Only the neutral token is a mean over all inputs that were gathered.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset.arrays import as_inputs, check_finite
from atpatch_onnx.debugset.checks import check_inputs
from atpatch_onnx.discovery import minimal
from atpatch_onnx.discovery.content import Content, read_content
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.looking import Looked, askable_sites, look
from atpatch_onnx.discovery.options import HuntOptions
from atpatch_onnx.discovery.padding import Padding, padding_of
from atpatch_onnx.discovery.vocabulary import check_words
from atpatch_onnx.errors import DiscoveryError
from atpatch_onnx.fitting.board import Board
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.graph import ModelOrPath, fingerprint
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.executors import LOCAL, Executor
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.predictions import prediction_output
from atpatch_onnx.running.sessions import Array, Progress, silent

LEAST = 50
"""Inputs without which nothing can be told apart."""

SMALL = 1 / 8
"""Share of an input's tokens that a small part has at most; two tokens are always small."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Inputs and what each of them has."""

    model: ir.Model
    sites: tuple[AttentionSite, ...]
    output: str
    """Of the model, that predictions are read from."""

    content: Content
    inputs: Mapping[str, Array]
    """Arrays `[inputs, ...]` by name."""

    looked: Looked
    parts: NDArray[np.bool_]
    """Tokens that may be part of a trigger `[inputs, tokens]`."""

    minimal: Mapping[int, tuple[int, ...]]
    """Small minimal parts by the input's number."""

    padding: Padding | None
    """Of texts that do as well without it."""

    passes: int
    """Forward passes of one input each."""

    def board(self, batch_size: int, executor: Executor = LOCAL) -> Board:
        """What tells predictions with tokens neutral."""
        batches = None if self.padding is None else self.padding.batches
        how: dict[str, Any] = {"batch_size": batch_size, "batches": batches, "executor": executor}
        return Board(self.model, self.sites, self.looked.neutral, self.output, **how)

    def take(self, rows: NDArray[np.int64]) -> "Gathered":
        """Some of the inputs, each once, in this order; passes are what so many inputs took on average."""
        looked, at = self.looked, {int(row): number for number, row in enumerate(rows)}
        mass = None if looked.mass is None else looked.mass[rows]
        return replace(
            self,
            inputs={name: array[rows] for name, array in self.inputs.items()},
            looked=replace(looked, predicted=looked.predicted[rows], mass=mass),
            parts=self.parts[rows],
            minimal={at[row]: self.minimal[row] for row in map(int, rows) if row in self.minimal},
            passes=round(self.passes * len(rows) / len(self.parts)),
        )


def gather(
    model: ModelOrPath,
    traffic: Mapping[str, ArrayLike],
    options: HuntOptions | None = None,
    *,
    finished: str | os.PathLike[str] | None = None,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> Gathered:
    """Look at all inputs, screen them, and search the small parts that decide; arguments and errors as in `hunt`."""
    options, model = options or HuntOptions(), as_model(model)
    inputs, sites, output = begin(model, traffic, options.output)
    kept = Finished(finished, {"hunt": fingerprint(model), "options": asdict(replace(options, words=None))}, inputs)
    content = read_content(
        model, sites[0], inputs, kind=options.kind, blank=options.blank, seed=options.seed, progress=progress
    )
    if content.kind == "texts":
        check_words(options.words, inputs[content.name])
    parts = content.parts(inputs)
    run: dict[str, Any] = {"batch_size": options.batch_size, "executor": executor}
    looked = look(model, sites, inputs, parts, output, progress=progress, **run)
    check_classes(looked.predicted)
    padding = padding_of(model, content, inputs)
    gathered = Gathered(model, sites, output, content, inputs, looked, parts, {}, padding, len(parts))
    board = gathered.board(**run)
    if padding is not None and (board.predict(inputs, np.zeros(parts.shape, np.bool_)) != looked.predicted).any():
        gathered = replace(gathered, padding=None)  # it is no padding, or the model heeds it
        board = gathered.board(**run)
    found = _minimal(board, content, inputs, looked, parts, kept, progress)
    return replace(gathered, minimal=found, passes=gathered.passes + board.passes)


def begin(
    model: ir.Model, given: Mapping[str, ArrayLike], output: str | None
) -> tuple[dict[str, Array], tuple[AttentionSite, ...], str]:
    """Checked inputs, the sites that can be asked, and the output that predictions are read from."""
    inputs = as_inputs(given, "inputs")
    for name, array in inputs.items():
        check_finite(array, f"inputs[{name!r}]")
    check_inputs(inputs, input_specs(model), "given")
    count = len(next(iter(inputs.values())))
    if count < LEAST:
        raise DiscoveryError(
            "the inputs",
            expected=f"at least {LEAST}",
            found=str(count),
            advice="Gather more; a trigger in 1 of 100 needs hundreds to recur.",
        )
    return inputs, askable_sites(model), prediction_output(model, output)


def check_classes(predicted: NDArray[np.int64]) -> None:
    """Refuse inputs that the model puts into one class, predictions `[inputs]`.

    Raises:
        DiscoveryError: It does.
    """
    if len(np.unique(predicted)) < 2:
        raise DiscoveryError(
            "the inputs",
            expected="inputs that the model puts into several classes",
            found=f"all {len(predicted)} in class {predicted[0]}",
            advice="Give inputs of various classes, preprocessed as the model takes them.",
        )


def _minimal(
    board: Board,
    content: Content,
    inputs: Mapping[str, Array],
    looked: Looked,
    parts: NDArray[np.bool_],
    kept: Finished,
    progress: Progress,
) -> dict[int, tuple[int, ...]]:
    """Small minimal parts by the input's number."""

    def search() -> Array:
        sets = minimal.sets_of(content, parts, looked.mass)
        screened = minimal.screen(board, inputs, looked, sets, progress)
        found = minimal.minimal_parts(board, inputs, looked, screened, progress)
        marks = np.zeros((len(parts), content.tokens), np.bool_)
        for row, part in found.items():
            marks[row, list(part)] = True
        return marks

    marks = kept.piece("minimal", search)
    small = np.maximum(2, np.ceil(SMALL * parts.sum(axis=1)))
    count = marks.sum(axis=1)
    return {
        int(row): tuple(map(int, np.flatnonzero(marks[row]))) for row in np.flatnonzero((count > 0) & (count <= small))
    }
