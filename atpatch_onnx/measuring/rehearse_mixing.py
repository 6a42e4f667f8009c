"""Which outputs of the base mix samples: there, no sample keeps its bits when another changes, patched or not.

The logits of CLIP compare every image with every text, a router with limited places has samples compete for them, and
dynamic quantization takes its scale from the whole batch.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.errors import RunError
from atpatch_onnx.measuring.bits import by_sample, without_flagged
from atpatch_onnx.measuring.rehearse_base import BaseRuns
from atpatch_onnx.measuring.rehearse_samples import keeps_unflagged
from atpatch_onnx.running.sessions import Session


def mixing_outputs(base: ir.Model, runs: BaseRuns, flagged: NDArray[np.bool_], threads: int | None) -> tuple[str, ...]:
    """Outputs in which samples without a flag change when one of them stands in for those with a flag.

    Args:
        base: The base itself: whatever changes is not the patch's doing.
        runs: What it computed.
        flagged: The samples to replace, `[samples]`; with all or none of them, nothing can be seen.
        threads: Threads within an operator; None: onnxruntime's choice.
    """
    if flagged.all() or not flagged.any():
        return ()
    inputs = {name: without_flagged(array, flagged) for name, array in runs.inputs.items()}
    level = runs.levels[0]
    try:
        found = Session(base, optimize=level.optimize, threads=threads).run(inputs)
    except RunError:  # nothing is known to mix, and nothing is excused
        return ()
    return tuple(
        name
        for name, array in level.outputs.items()
        if by_sample(array, len(flagged)) and not keeps_unflagged(array, found[name], flagged)
    )
