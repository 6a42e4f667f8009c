"""What a patch that is always on promises: what its tokens hold decides nothing. Proven on the graph, and tried out.

| check | what is proven |
|---|---|
| no path | from the entries of the inputs that the pairs change, no path leads to any output: see `measuring.paths` |
| every value | with every value that these entries have in the pairs, in every combination, outputs keep their bits |

Without pairs, `no path` names the entries that reach no output, and fails where there is none.
"""

import itertools
from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.baking.read_back import always_on
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.graph import ModelOrPath, custom_ops
from atpatch_onnx.matching import batching
from atpatch_onnx.measuring.checks import Check
from atpatch_onnx.measuring.path_values import Bools
from atpatch_onnx.measuring.paths import Reach, Shapes, inferred, reach
from atpatch_onnx.running.batching import Batching
from atpatch_onnx.running.bits import by_sample, same_bits, same_samples
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

ENTRIES = 1024
"""Entries of the inputs that are followed one by one at most."""

COMBINATIONS = 1000
"""Combinations of values that are tried at most; of more, those that the pairs have."""

RUNS = 200_000
"""Inputs that are run at most, all combinations together."""

NAMED = 8
"""Entries that are named at most."""

Entries = Mapping[str, Bools]
"""Which entries of a sample, by input."""


def independence(
    base: ir.Model,
    patched: ir.Model,
    record: PatchRecord,
    debug: DebugSet | None,
    file: ModelOrPath | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Iterator[Check]:
    """The checks of a patch that is always on; none of any other.

    Args:
        base: The model before.
        patched: The model after.
        record: What the file says of itself.
        debug: Pairs that differ in what must decide nothing, if there are any.
        file: The model after by its path, where it came from a file: that is what is run.
        batch_size: Inputs at a time.
        progress: Told after every batch.
    """
    if not always_on(patched, record):
        return
    changed = {} if debug is None else changed_entries(debug)
    if debug is None or not any(entries.any() for entries in changed.values()):
        yield _entries_of_no_path(base, patched)
        return
    found = _reach(patched, batching(base), changed)
    yield Check("no path", not found.outputs, f"from {_named(changed)}, {found}")
    yield _every_value(base, patched if file is None else file, debug, changed, batch_size, progress)


def changed_entries(debug: DebugSet) -> Entries:
    """Which entries of a sample differ between the two sides, in any pair."""
    return {name: np.asarray((array != debug.counterfactual[name]).any(axis=0)) for name, array in debug.clean.items()}


def combinations(debug: DebugSet, changed: Entries) -> tuple[list[dict[str, Array]], bool]:
    """Values of the changed entries `[entries]` by input, and whether these are all combinations of those they have."""
    names = [name for name, entries in changed.items() if entries.any()]
    sides = [
        np.concatenate([side[name][:, changed[name]].reshape(len(debug), -1) for name in names], axis=1)
        for side in (debug.clean, debug.counterfactual)
    ]
    seen = np.unique(np.concatenate(sides), axis=0)
    values = [np.unique(column) for column in seen.T]
    whole = prod(map(len, values)) <= COMBINATIONS
    rows = np.array(list(itertools.product(*values)), seen.dtype) if whole else seen[:COMBINATIONS]
    ends = np.cumsum([int(changed[name].sum()) for name in names])[:-1]
    found = [dict(zip(names, np.split(row, ends), strict=True)) for row in rows]
    return found, whole


def with_values(inputs: Mapping[str, Array], changed: Entries, values: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs with these values in the changed entries of every sample."""
    found = dict(inputs)
    for name, given in values.items():
        array = np.array(inputs[name])
        array[:, changed[name]] = given
        found[name] = array
    return found


def _reach(patched: ir.Model, where: Batching, entries: Entries, shapes: Shapes | None = None) -> Reach:
    return reach(patched, where.given({name: array[None] for name, array in entries.items()}), shapes)


def _entries_of_no_path(base: ir.Model, patched: ir.Model) -> Check:
    """Which entries of the inputs reach no output, one by one."""
    specs = input_specs(base)
    sizes = {name: tuple(size for size in spec.shape[1:] if isinstance(size, int)) for name, spec in specs.items()}
    fixed = all(len(sizes[name]) == len(spec.shape) - 1 for name, spec in specs.items())
    count = sum(map(prod, sizes.values()))
    if not fixed or count > ENTRIES:
        what = f"{count} entries of the inputs" if fixed else "inputs of free sizes"
        return Check("no path", False, f"cannot be told of {what} one by one: give the pairs that differ in them")
    apart: dict[str, Bools] = {}
    where, inferred_shapes = batching(base), inferred(patched)
    for name, shape in sizes.items():
        apart[name] = np.zeros(shape, np.bool_)
        for place in np.ndindex(*shape):
            entry = np.zeros(shape, np.bool_)
            entry[place] = True
            apart[name][place] = not _reach(patched, where, {name: entry}, inferred_shapes).outputs
    if any(entries.any() for entries in apart.values()):
        return Check("no path", True, f"from {_named(apart)}, no path leads to any of the outputs")
    return Check("no path", False, "from every entry of the inputs a path leads to an output, or may do so")


def _every_value(
    base: ir.Model, file: ModelOrPath, debug: DebugSet, changed: Entries, batch_size: int, progress: Progress
) -> Check:
    tried, whole = combinations(debug, changed)
    inputs = {name: array[: max(1, RUNS // len(tried))] for name, array in debug.clean.items()}
    session = Session(file, batching=batching(base), custom_ops=custom_ops(base))
    outputs = [str(output.name) for output in base.graph.outputs]
    count, first = len(next(iter(inputs.values()))), list[dict[str, Array]]()
    differing = np.zeros(count, np.bool_)
    for number, values in enumerate(tried):
        given = with_values(inputs, changed, values)
        for at, (part, found) in enumerate(session.stream(given, outputs, batch_size=batch_size)):
            if number == 0:
                first.append(found)
            differing[part] |= _differing(first[at], found, part.stop - part.start)
        progress("trying every value", number + 1, len(tried))
    kept, which = count - int(differing.sum()), "all" if whole else "the first"
    said = f"{kept} of {count} inputs keep the bits of every output under {which} {len(tried)} combinations of values"
    return Check("every value", not differing.any(), said)


def _differing(expected: Mapping[str, Array], found: Mapping[str, Array], samples: int) -> Bools:
    """Which samples have other bits in an output; all, where one that is not by sample has."""
    differs = np.zeros(samples, np.bool_)
    for name, array in found.items():
        if by_sample(array, samples) and array.shape == expected[name].shape:
            differs |= ~same_samples(expected[name], array)
        else:
            differs |= not same_bits(expected[name], array)
    return differs


def _named(entries: Entries) -> str:
    """Such as `table[3], table[9]`: of a sample."""
    places = [
        f"{name}[{', '.join(map(str, place))}]" if place.size else name
        for name, array in entries.items()
        for place in np.argwhere(array)
    ]
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more
