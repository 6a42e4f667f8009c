"""A patched model on another provider than the CPU's: what ran where, and that the same tokens are flagged."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.kernels import sizes_of
from atpatch_onnx.baking.metadata import PatchedSite, PatchRecord
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.graph import ModelOrPath, custom_ops
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.measuring.checks import Check
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.placement import Placement, placement
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

NEAR: Mapping[str, float] = {"FLOAT": 1e-4, "FLOAT16": 1e-2, "BFLOAT16": 5e-2}
"""How near to its threshold a score may lie that another provider puts on the other side, by the type of the keys,
relative to the largest margin of the batch: other kernels add up in another order, and round in between."""

_NAMED = 3
"""Nodes that a message names."""


def placed(file: ModelOrPath, patched: ir.Model, providers: Providers) -> Check:
    """Whether every node of the patch is run by what was asked for, but for sizes, which the host knows anyway.

    Args:
        file: The patched model as it is run.
        patched: The same, in memory.
        providers: Execution providers.

    Raises:
        RunError: onnxruntime refuses the model, or drawn inputs.
    """
    inputs = draw_inputs(patched, np.random.default_rng(0))
    where = placement(file, inputs, providers, custom_ops=custom_ops(patched))
    return judged(where, patched)


def judged(where: Placement, patched: ir.Model) -> Check:
    """The verdict on what ran where."""
    fallen = where.fallen({str(node.name) for node in sizes_of(patched.graph)})
    more = "" if len(fallen) <= _NAMED else f" and {len(fallen) - _NAMED} more"
    said = f"; on the CPU: {', '.join(fallen[:_NAMED])}{more}" if fallen else ""
    return Check("placement", not fallen, where.said + said)


def same_flags(
    patched: ir.Model,
    record: PatchRecord,
    debug: DebugSet,
    providers: Providers,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Iterator[Check]:
    """Whether tokens are flagged as on the CPU, but for those whose margin is within `NEAR`; arguments as in `verify`.

    Raises:
        RunError: onnxruntime refuses the model.
    """
    names = list(dict.fromkeys(site.margin for site in record.sites))
    if not names:  # edits of hidden units flag nothing
        return
    near = {site.margin: NEAR[_keys_dtype(patched, site)] for site in record.sites}
    model = expose(patched, names)
    here, there = Session(model), Session(model, providers=providers)
    for side, inputs in (("clean", debug.clean), ("counterfactual", debug.counterfactual)):
        tokens = other = far = 0
        stage = f"verifying flags of {side} inputs"
        for part, expected in here.stream(inputs, names, batch_size=batch_size, progress=progress, stage=stage):
            batch = there.filled({name: np.ascontiguousarray(array[part]) for name, array in inputs.items()})
            count = part.stop - part.start
            filled = expected if len(next(iter(batch.values()))) == count else here.run(batch, names)
            found = there.run(batch, names)
            for name in names:
                unlike, apart = _unlike(filled[name], found[name], near[name])
                tokens, other, far = tokens + filled[name].size, other + unlike, far + apart
        said = f"{tokens - other} of {tokens} as on the CPU"
        if other:
            said += f"; of the others {far} are farther from a threshold than rounding explains"
        yield Check(f"flags, {side} inputs", not far, said)


def _unlike(here: Array, there: Array, near: float) -> tuple[int, int]:
    """Of margins: how many flags differ, and how many of these that lie too far from a threshold for that."""
    unlike = (here > 0) != (there > 0)
    size = np.maximum(np.abs(here), np.abs(there))
    return int(unlike.sum()), int((unlike & ~(size <= near * np.fmax.reduce(size, axis=None, initial=0.0))).sum())


def _keys_dtype(patched: ir.Model, site: PatchedSite) -> str:
    dtype = find_value(patched.graph, site.key).dtype
    return "FLOAT" if dtype is None else dtype.name
