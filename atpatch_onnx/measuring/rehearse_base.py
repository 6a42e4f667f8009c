"""Run the base, with given inputs or drawn ones; which of its outputs mix samples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import RunError
from atpatch_onnx.matching import batching
from atpatch_onnx.running.batching import Batching
from atpatch_onnx.running.bits import by_sample, keeps_unflagged, without_flagged
from atpatch_onnx.running.drawing import draw_inputs, input_shapes
from atpatch_onnx.running.sessions import Array, Session

LENGTHS = (16, 32, 64, 224, 1024, 8, 4)
"""Sizes that free axes are tried with, one after the other, until the base runs; the last for few learned positions."""

MAX_VALUES = 2**24
"""Larger inputs are not tried."""

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


@dataclass(frozen=True, eq=False)
class Level:
    """The base at one level of optimization."""

    optimize: bool
    outputs: Mapping[str, Array]

    def __str__(self) -> str:
        return "default optimization" if self.optimize else "no optimization"


@dataclass(frozen=True, eq=False)
class BaseRuns:
    """The base at all levels at which it runs."""

    inputs: Mapping[str, Array]
    levels: tuple[Level, ...]
    reason: str
    """What onnxruntime says where it does not run it."""

    batching: Batching
    """Where the model has the samples; inputs are as it takes them, outputs have samples first."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs, by name."""
        return {name: array.shape for name, array in self.inputs.items()}


def seeded(model: ir.Model) -> ir.Model:
    """A copy whose random operators, if there are any, draw the same in every session."""
    model = graphs.copy(model)
    for number, node in enumerate(model.graph.all_nodes()):
        if node.op_type in _RANDOM and "seed" not in node.attributes:
            node.attributes["seed"] = ir.AttrFloat32("seed", float(number))
    return model


def run_base(
    base: ir.Model,
    inputs: Mapping[str, Array] | None,
    rng: np.random.Generator,
    samples: int,
    optimize: Sequence[bool],
    threads: int | None,
    lengths: Sequence[int] = (),
) -> BaseRuns:
    """Run the base; drawn inputs are drawn anew with other sizes, `lengths` at last, while it refuses them."""
    where = batching(base)
    chosen: Mapping[str, Array] = inputs or {}
    levels: list[Level] = []
    reasons = []
    for level in optimize:
        candidates = [chosen] if inputs is not None or levels else _drawn(base, rng, samples, where, lengths)
        try:
            session: Session | None = Session(base, optimize=level, threads=threads)
        except RunError as error:
            reasons.append(f"{Level(level, {})}: {error}")
            continue
        refusals = []
        for candidate in candidates:
            try:
                session = session or Session(base, optimize=level, threads=threads)
                levels.append(Level(level, where.taken(session.run(candidate))))
                chosen = candidate
                break
            except RunError as error:
                refusals.append(str(error))
                session = None  # random operators would go on where the last run left them
        else:
            reasons.append(f"{Level(level, {})}: {refusals[0]}")
    return BaseRuns(chosen, tuple(levels), "; ".join(reasons), where)


def _drawn(
    base: ir.Model, rng: np.random.Generator, samples: int, where: Batching, lengths: Sequence[int]
) -> Iterator[Mapping[str, Array]]:
    """Inputs of growing sizes, as far as sizes are free."""
    seen: list[dict[str, tuple[int, ...]]] = []
    for length in (*LENGTHS, *lengths):
        shapes = input_shapes(base, samples=samples, length=length, batching=where)
        values = sum(math.prod(shape) for shape in shapes.values())
        if not seen or (shapes != seen[-1] and values <= MAX_VALUES):
            yield draw_inputs(base, rng, samples=samples, length=length, batching=where)
        seen.append(shapes)


def mixing_outputs(base: ir.Model, runs: BaseRuns, flagged: NDArray[np.bool_], threads: int | None) -> tuple[str, ...]:
    """Outputs of the base in which samples without a flag change when one of them stands in for those with a flag.

    There, no sample keeps its bits when another changes, patched or not: the logits of CLIP compare every image with
    every text, a router with limited places has samples compete for them, and dynamic quantization takes its scale
    from the whole batch.
    """
    if flagged.all() or not flagged.any():
        return ()
    inputs = {name: without_flagged(array, flagged, runs.batching.axis(name)) for name, array in runs.inputs.items()}
    level = runs.levels[0]
    try:
        found = runs.batching.taken(Session(base, optimize=level.optimize, threads=threads).run(inputs))
    except RunError:  # nothing is known to mix, and nothing is excused
        return ()
    return tuple(
        name
        for name, array in level.outputs.items()
        if by_sample(array, len(flagged)) and not keeps_unflagged(array, found[name], flagged)
    )
