"""Hunt for a trigger in traffic: unlabelled inputs, of which some may have it.

    screen  ->  minimal parts  ->  groups that look alike  ->  parts put into other inputs  ->  test  ->  pairs

A trigger is a small part of an input that decides the prediction, and recurs. All of it is asked by forward passes of
one graph (`fitting.board`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset.arrays import as_inputs, check_finite
from atpatch_onnx.debugset.checks import check_inputs
from atpatch_onnx.discovery import hunted, minimal
from atpatch_onnx.discovery.alike import FEWEST, Group, directions, groups_of
from atpatch_onnx.discovery.content import Content, read_content
from atpatch_onnx.discovery.evidence import corrected
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.looking import Looked, askable_sites, look
from atpatch_onnx.discovery.options import HuntOptions
from atpatch_onnx.discovery.transplant import DECIDES, Surgery, Transplant
from atpatch_onnx.discovery.verdict import Search
from atpatch_onnx.discovery.vocabulary import check_words
from atpatch_onnx.errors import DiscoveryError, require
from atpatch_onnx.fitting.board import Board
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.graph import ModelOrPath, fingerprint
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.executors import LOCAL, Executor, executing
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.predictions import prediction_output
from atpatch_onnx.running.sessions import Array, Progress, silent

LEAST = 50
"""Inputs without which nothing can be told apart."""

SMALL = 1 / 8
"""Share of an input's tokens that a small part has at most; two tokens are always small."""


def hunt(
    model: ModelOrPath,
    traffic: Mapping[str, ArrayLike],
    options: HuntOptions | None = None,
    *,
    finished: str | os.PathLike[str] | None = None,
    executor: Executor | str = LOCAL,
    progress: Progress = silent,
) -> Search:
    """Search a trigger in unlabelled inputs. Same arguments, same result.

    Args:
        model: The model, or its path.
        traffic: Arrays `[inputs, ...]` by the model's input names, from before any fix.
        options: How.
        finished: A folder for finished pieces; a hunt that was stopped goes on where it was.
        executor: Who runs the model: `local`, `ray`, `ray://HOST:PORT`, or an executor (see `running.executors`).
        progress: Told of long work.

    Raises:
        DiscoveryError: Too few inputs, all predictions are of one class, no input that tokens read, or a folder of
            other pieces.
        DebugSetError: The inputs do not fit the model.
        NoSiteError: The model has no attention site that can be asked.
        MissingExtraError: scipy is not installed.
    """
    require("scipy", "discover", "hunting for a trigger")
    with executing(executor) as runs:
        return _hunt(as_model(model), traffic, options or HuntOptions(), finished, runs, progress)


def _hunt(
    model: ir.Model,
    traffic: Mapping[str, ArrayLike],
    options: HuntOptions,
    finished: str | os.PathLike[str] | None,
    executor: Executor,
    progress: Progress,
) -> Search:
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
    board = Board(model, sites, looked.neutral, output, **run)
    found = _minimal(board, content, inputs, looked, parts, kept, progress)
    groups = _groups(model, sites, inputs, looked, found, parts, options, progress)
    surgery = Surgery(board, content, inputs, looked, parts, options.seed)
    tested = _tested(surgery, groups, found, progress)
    passes = board.passes + len(parts) + len(found)
    seen = hunted.Seen(inputs, looked, content, surgery, found, tuple(groups), passes, options.words)
    return hunted.concluded(seen, tested, options.false_alarms, options.pairs, options.seed)


def cost(
    model: ModelOrPath, traffic: Mapping[str, ArrayLike], options: HuntOptions | None = None
) -> tuple[int, int, float]:
    """What a hunt costs: inputs, forward passes expected, and seconds that so many would take, of a few timed now.

    Raises:
        DiscoveryError: As of `hunt`.
    """
    from time import perf_counter

    options, model = options or HuntOptions(), as_model(model)
    inputs, sites, output = begin(model, traffic, options.output)
    few = {name: array[: options.batch_size] for name, array in inputs.items()}
    content = read_content(model, sites[0], few, kind=options.kind, blank=options.blank, seed=options.seed)
    parts = content.parts(few)
    looked = look(model, sites, few, parts, output, batch_size=options.batch_size)
    board = Board(model, sites, looked.neutral, output, batch_size=options.batch_size)
    board.predict(few, np.zeros(parts.shape, np.bool_))
    started = perf_counter()
    board.predict(few, np.zeros(parts.shape, np.bool_))
    seconds = (perf_counter() - started) / len(parts)
    count = len(next(iter(inputs.values())))
    return count, EXPECTED * count, EXPECTED * count * seconds


EXPECTED = 15
"""Forward passes of an input, on average; it was measured to be less (docs/evidence/hunting.md)."""


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


def _groups(
    model: ir.Model,
    sites: Sequence[AttentionSite],
    inputs: Mapping[str, Array],
    looked: Looked,
    found: Mapping[int, tuple[int, ...]],
    parts: NDArray[np.bool_],
    options: HuntOptions,
    progress: Progress,
) -> list[Group]:
    if len(found) < FEWEST:
        return []
    towards = directions(model, sites, inputs, found, looked, batch_size=options.batch_size, progress=progress)
    rows, first = list(found), sites[0].name
    targets = looked.predicted[rows]
    every = [*groups_of({first: towards[first]}, rows, targets), *groups_of(towards, rows, targets)]
    return list({(group.target, frozenset(group.members)): group for group in every}.values())


def _tested(
    surgery: Surgery, groups: Sequence[Group], found: Mapping[int, tuple[int, ...]], progress: Progress
) -> list[Transplant]:
    """What every group's part does in other inputs, its p-value corrected for all groups, the most certain first."""
    tried = []
    for number, group in enumerate(groups, 1):
        tried.append(surgery.try_out(group, found))
        progress("putting parts into other inputs", number, len(groups))
    tested = [surgery.confirm(one) if one.explored >= DECIDES else one for one in tried]
    chances = corrected([one.chance for one in tested])
    tested = [replace(one, chance=float(chance)) for one, chance in zip(tested, chances, strict=True)]
    return sorted(tested, key=lambda one: (one.chance, -one.explored, -len(one.group.members)))
