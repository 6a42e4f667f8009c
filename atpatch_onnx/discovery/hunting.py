"""Hunt for a trigger in traffic: unlabelled inputs, of which some may have it.

    screen  ->  minimal parts  ->  groups that look alike  ->  parts put into other inputs  ->  test  ->  pairs

A trigger is a small part of an input that decides the prediction, and recurs. All of it is asked by forward passes of
one graph (`fitting.board`). The first two steps are of each input by itself (`gathering`), the others of all together.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from atpatch_onnx.discovery import hunted
from atpatch_onnx.discovery.alike import FEWEST, Group, directions, groups_of
from atpatch_onnx.discovery.content import read_content
from atpatch_onnx.discovery.evidence import corrected
from atpatch_onnx.discovery.gathering import Gathered, begin, check_classes, gather
from atpatch_onnx.discovery.looking import look
from atpatch_onnx.discovery.options import HuntOptions
from atpatch_onnx.discovery.padding import padding_of
from atpatch_onnx.discovery.transplant import DECIDES, Surgery, Transplant
from atpatch_onnx.discovery.verdict import Search
from atpatch_onnx.errors import require
from atpatch_onnx.fitting.board import Board
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.running.executors import LOCAL, Executor, executing
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.sessions import Progress, silent


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
        how: dict[str, Any] = {"executor": runs, "progress": progress}
        return judge(gather(model, traffic, options, finished=finished, **how), options, **how)


def judge(
    found: Gathered,
    options: HuntOptions | None = None,
    *,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> Search:
    """Whether small parts of inputs that were gathered recur, look alike, and decide other inputs as well.

    Args:
        found: Of the model and the inputs.
        options: Those that inputs were gathered with; the seed may be another.
        executor: Who runs the model.
        progress: Told of long work.

    Raises:
        DiscoveryError: All predictions are of one class.
    """
    options, looked = options or HuntOptions(), found.looked
    check_classes(looked.predicted)
    groups = _groups(found, options, progress)
    board = found.board(options.batch_size, executor)
    surgery = Surgery(board, found.content, found.inputs, looked, found.parts, options.seed)
    tested = _tested(surgery, groups, found.minimal, progress)
    passes = found.passes + len(found.minimal) + board.passes
    seen = hunted.Seen(
        found.inputs, looked, found.content, surgery, found.minimal, tuple(groups), passes, options.words
    )
    return hunted.concluded(seen, tested, options.false_alarms, options.pairs, options.seed)


def cost(
    model: ModelOrPath, traffic: Mapping[str, ArrayLike], options: HuntOptions | None = None
) -> tuple[int, int, float]:
    """What a hunt costs: inputs, forward passes expected, and seconds that so many would take, of a few timed now.

    Raises:
        DiscoveryError: As in `hunt`.
    """
    from time import perf_counter

    options, model = options or HuntOptions(), as_model(model)
    inputs, sites, output = begin(model, traffic, options.output)
    few = {name: array[: options.batch_size] for name, array in inputs.items()}
    content = read_content(model, sites[0], few, kind=options.kind, blank=options.blank, seed=options.seed)
    parts = content.parts(few)
    looked = look(model, sites, few, parts, output, batch_size=options.batch_size)
    padding = padding_of(model, content, few)
    batches = None if padding is None else padding.batches
    board = Board(model, sites, looked.neutral, output, batch_size=options.batch_size, batches=batches)
    board.predict(few, np.zeros(parts.shape, np.bool_))
    started = perf_counter()
    board.predict(few, np.zeros(parts.shape, np.bool_))
    seconds = (perf_counter() - started) / len(parts)
    count = len(next(iter(inputs.values())))
    return count, EXPECTED * count, EXPECTED * count * seconds


EXPECTED = 15
"""Forward passes of an input, on average; it was measured to be less (docs/evidence/hunting.md)."""


def _groups(found: Gathered, options: HuntOptions, progress: Progress) -> list[Group]:
    if len(found.minimal) < FEWEST:
        return []
    towards = directions(
        found.model,
        found.sites,
        found.inputs,
        found.minimal,
        found.looked,
        batch_size=options.batch_size,
        progress=progress,
    )
    rows, first = list(found.minimal), found.sites[0].name
    targets = found.looked.predicted[rows]
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
    tested = [surgery.confirm(one, found) if one.explored >= DECIDES else one for one in tried]
    chances = corrected([one.chance for one in tested])
    tested = [replace(one, chance=float(chance)) for one, chance in zip(tested, chances, strict=True)]
    return sorted(tested, key=lambda one: (one.chance, -one.explored, -len(one.group.members)))
