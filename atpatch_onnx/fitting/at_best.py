"""What a fit could come to at best: with flags that name each anomalous token, at every site, and no other token.

Where that misses the goal, better detectors alone do not reach it: what is wrong is not handed over by these tokens
alone, or the inputs cannot do without them. Where it meets the goal, detectors are what is missing.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from atpatch_onnx.fitting.board import Board
from atpatch_onnx.fitting.collect import anomalous_columns
from atpatch_onnx.fitting.goal import Outcome, judge
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.preparation import Prepared
from atpatch_onnx.matching import batching
from atpatch_onnx.patches.patch import Neutral
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Progress, Session


def at_best(
    model: ir.Model, prepared: Prepared, neutral: Mapping[str, Neutral], options: FitOptions, progress: Progress
) -> Outcome | None:
    """The outcome on the validation part; None where it is not known, as a sample has several maps at a site."""
    if any(site.parts != 1 or not site.self_attention for site in prepared.sites):
        return None
    part, output, where = prepared.parts.validation, prepared.output, batching(model)
    run: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    base = classes(
        Session(model, batching=where).collect(part.clean, [output], stage="what is possible, base", **run)[output]
    )
    board = Board(model, prepared.sites, neutral, output, batch_size=options.batch_size, batching=where)
    flags = anomalous_columns(part)
    clean, other = (
        board.predict(side, marks, progress=progress, stage="what is possible")
        for side, marks in zip((part.clean, part.counterfactual), flags, strict=True)
    )
    return judge(part, base, (clean, flags[0]), (other, flags[1]), flags)
