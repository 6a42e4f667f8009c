"""What must hold of a patched model: unfired, fired and unbaked."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import AtPatchError, RunError
from atpatch_onnx.graph.names import FLAGGED
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.inspect import value_names
from atpatch_onnx.measuring.rehearse_base import Inside, Level, same_bits
from atpatch_onnx.measuring.rehearse_drawing import NEVER
from atpatch_onnx.measuring.rehearse_measures import site_numbers
from atpatch_onnx.measuring.rehearse_result import SiteNumbers
from atpatch_onnx.measuring.rehearse_samples import flagged_samples, keeps_unflagged
from atpatch_onnx.measuring.rehearse_trial import control
from atpatch_onnx.measuring.verify import Check
from atpatch_onnx.running.sessions import Array, Session


def silenced(patched: ir.Model) -> ir.Model:
    """A copy that never fires: the same graph with other thresholds."""
    quiet = graphs.copy(patched)
    for site in read_record(patched).sites:
        weight = quiet.graph.initializers[control(site.site, "threshold")]
        weight.const_value = ir.tensor(np.array([NEVER], np.float32), name=weight.name)
    return quiet


def unfired(
    patched: ir.Model, emission: Emission, level: Level, inputs: Mapping[str, Array], threads: int | None
) -> Iterator[Check]:
    """Nothing fires: all outputs keep their bits."""
    where = f"{emission}, {level}"
    try:
        found = Session(patched, optimize=level.optimize, threads=threads).run(inputs)
    except RunError as error:
        yield Check(f"nothing fires, {where}", False, str(error))
        return
    changed = [name for name, array in level.outputs.items() if not same_bits(array, found[name])]
    detail = f"outputs that changed: {', '.join(changed)}" if changed else "all outputs bit-identical to the base's"
    if found[FLAGGED].any():
        detail = "columns were flagged"
    yield Check(f"nothing fires, {where}", not changed and not found[FLAGGED].any(), detail)


def fired(
    patched: ir.Model,
    sites: Sequence[AttentionSite],
    emission: Emission,
    level: Level,
    own: Inside,
    inputs: Mapping[str, Array],
    mixing: Collection[str],
    threads: int | None,
) -> tuple[list[Check], list[SiteNumbers]]:
    """Some columns fire: every site is what the reference says, and samples without a flag keep their bits.

    Outputs that mix samples are left out of the latter.
    """
    where = f"{emission}, {level}"
    record = read_record(patched)
    names = [name for site in record.sites for name in value_names(site)]
    try:
        found = Session(patched, optimize=level.optimize, threads=threads).run(inputs)
        inner = Session(expose(patched, names), optimize=level.optimize, threads=threads).run(inputs, names)
    except RunError as error:
        return [Check(f"some columns fire, {where}", False, str(error))], []
    numbers = list(site_numbers(patched, record, inner, emission, level, own))
    count = sum(of_site.flagged > 0 for of_site in numbers)
    checks = [Check(f"sites fire, {where}", count == len(numbers), f"{count} of {len(numbers)} have flagged columns")]
    failed = [of_site for of_site in numbers if not of_site.passed]
    worst = max(numbers, key=lambda of_site: max(of_site.difference, of_site.product) / of_site.allowed)
    detail = (
        f"{len(numbers) - len(failed)} of {len(numbers)} sites as the numpy reference, largest difference"
        f" {worst.difference:.2e}, of P V from the base's output {worst.product:.2e} (allowed {worst.allowed:.2e})"
    )
    if failed:
        others = ", ".join(of_site.site for of_site in failed if of_site.untouched is False)
        detail += f"; failed: {', '.join(of_site.site for of_site in failed)}"
        detail += f"; map or values not the base's own at {others}" if others else ""
    checks.append(Check(f"reference, {where}", not failed, detail))
    flagged = flagged_samples(sites, [inner[site.flags] for site in record.sites])
    checks.append(_unflagged(level.outputs, found, flagged, mixing, where))
    return checks, numbers


def _unflagged(
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    flagged: NDArray[np.bool_],
    mixing: Collection[str],
    where: str,
) -> Check:
    """Samples without a flag keep every output that has the samples on its first axis, and does not mix them."""
    changed = [
        name
        for name, array in expected.items()
        if name not in mixing and not keeps_unflagged(array, found[name], flagged)
    ]
    detail = f"{int((~flagged).sum())} of {len(flagged)} without a flag"
    detail += f"; changed in {', '.join(changed)}" if changed else ""
    detail += f"; {', '.join(mixing)} left out, which mix samples" if mixing else ""
    return Check(f"samples without a flag, {where}", not changed, detail)


def unbaked(patched: ir.Model, emission: Emission) -> Check:
    """Unbaking gives the base back."""
    try:
        unbake(patched)
    except AtPatchError as error:
        return Check(f"unbake, {emission}", False, str(error))
    return Check(f"unbake, {emission}", True, "gives the base back")
