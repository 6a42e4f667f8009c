"""What must hold of a patched model: unfired, fired and unbaked."""

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from atpatch_onnx.baking.again import require_as_baked
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.errors import AtPatchError, RunError
from atpatch_onnx.graph.names import FLAGGED
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.driven import Driven, Replaced, replaced_in
from atpatch_onnx.measuring.rehearse_base import BaseRuns, Level
from atpatch_onnx.measuring.rehearse_result import SiteResult
from atpatch_onnx.measuring.verify import Check
from atpatch_onnx.running.bits import keeps_unflagged, same_bits
from atpatch_onnx.running.sessions import Array, Session


def unfired(patched: ir.Model, form: str, level: Level, runs: BaseRuns, threads: int | None) -> Check:
    """Nothing fires: all outputs keep their bits."""
    name = f"nothing fires, {form}, {level}"
    try:
        found = runs.batching.taken(Session(patched, optimize=level.optimize, threads=threads).run(runs.inputs))
    except RunError as error:
        return Check(name, False, str(error))
    changed = [name for name, array in level.outputs.items() if not same_bits(array, found[name])]
    detail = f"outputs that changed: {', '.join(changed)}" if changed else "all outputs bit-identical to the base's"
    if found[FLAGGED].any():
        detail = "tokens were flagged"
    return Check(name, not changed and not found[FLAGGED].any(), detail)


def fired(
    base: ir.Model,
    patched: ir.Model,
    sites: Sequence[AttentionSite],
    form: str,
    level: Level,
    runs: BaseRuns,
    flagged: Array,
    mixing: Collection[str],
    threads: int | None,
) -> tuple[list[Check], list[SiteResult]]:
    """Some tokens fire: they are neutral at every site, and the rest is the base's.

    Samples without a flag keep their bits, but for outputs that mix samples. What stands within is looked at without
    optimization, which may give a value's name to what it has moved there.
    """
    where = f"{form}, {level}"
    record, replaced = read_record(patched), replaced_in(patched, sites)
    names = [name for one in replaced for name in (one.value, one.result)]
    names = list(dict.fromkeys([*(site.margin for site in record.sites), *names]))
    try:
        found = Session(patched, optimize=level.optimize, threads=threads).run(runs.inputs)
        inner = Session(expose(patched, names), optimize=False, threads=threads).run(runs.inputs)
    except RunError as error:
        return [Check(f"some tokens fire, {where}", False, str(error))], []
    margins = {site.site: inner[site.margin] for site in record.sites}
    holds: dict[str, bool] = {}
    for one in replaced:
        kept = one.holds(inner[one.value], inner[one.result], margins[one.site])
        holds[one.site] = holds.get(one.site, True) and kept
    results = [
        SiteResult(name, form, level.optimize, margin.size, int((margin > 0).sum()), holds.get(name, False))
        for name, margin in margins.items()
    ]
    silent = [one.site for one in results if not one.flagged]
    wrong = [one.site for one in results if not one.exact]
    checks = [
        Check(
            f"sites fire, {where}", not silent, f"{len(results) - len(silent)} of {len(results)} have flagged tokens"
        ),
        Check(
            f"replaced, {where}",
            not wrong,
            f"{len(results) - len(wrong)} of {len(results)} sites neutral where flagged, else the base's bit for bit"
            + (f"; not {', '.join(wrong)}" if wrong else ""),
        ),
    ]
    if not level.optimize:
        checks.append(_driven(base, replaced, runs.inputs, inner, found, where))
    found = runs.batching.taken(found)
    changed = [
        name
        for name, array in level.outputs.items()
        if name not in mixing and not keeps_unflagged(array, found[name], flagged)
    ]
    detail = f"{int((~flagged).sum())} of {len(flagged)} without a flag"
    detail += f"; changed in {', '.join(changed)}" if changed else ""
    detail += f"; {', '.join(mixing)} left out, which mix samples" if mixing else ""
    return [*checks, Check(f"samples without a flag, {where}", not changed, detail)], results


def _driven(
    base: ir.Model,
    replaced: Sequence[Replaced],
    inputs: Mapping[str, Array],
    inner: Mapping[str, Array],
    found: Mapping[str, Array],
    where: str,
) -> Check:
    name = f"driven, {where}"
    try:
        expected = Driven(base, replaced).run(inputs, inner)
    except RunError as error:
        return Check(name, False, str(error))
    unlike = [output for output, array in expected.items() if not same_bits(array, found[output])]
    said = f"outputs unlike the base's that is given these keys and values: {', '.join(unlike)}"
    return Check(name, not unlike, said if unlike else "the base's, given these keys and values, bit for bit")


def unbaked(patched: ir.Model, form: str) -> Check:
    """Unbaking gives the base back, and baking again the file."""
    try:
        require_as_baked(patched)
    except AtPatchError as error:
        return Check(f"unbake, {form}", False, str(error))
    return Check(f"unbake, {form}", True, "gives the base back, and baking again this file")
