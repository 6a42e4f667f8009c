"""Matching and patching beside other tools: optimizers and a quantizer; writes the tables of docs/evidence/tools.md.

    python -m samples.after_tools                       # fresh exports of tiny models
    python -m samples.after_tools --graphs DIR          # every .onnx file of a folder instead

Each tool treats each graph twice: before it is patched (are the same sites found, does the same patch raise the same
flags?) and after (does the patched graph raise the same flags, and do inputs without a flag keep the outputs of the
base that was treated in the same way?). The patch is drawn at random; its threshold lies between the scores of the
inputs, so that some of them are flagged. An input is run in a batch of its own copies: onnxruntime's dynamic
quantization has one scale for a whole batch. `--fast` takes two exports only.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import atpatch_onnx as atp
from atpatch_onnx.errors import AtPatchError, BakeError, UnbakeError
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.drawn import draw_detector, draw_neutral
from atpatch_onnx.measuring.rehearse import FORMS
from atpatch_onnx.patches.patch import Patch, SitePatch
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Session
from samples.other_tools import INT8, TOOLS, Tool, fresh_exports

DOCUMENT = Path(__file__).parents[1] / "docs" / "evidence" / "tools.md"
BEGIN, END = "<!-- written by samples.after_tools -->", "<!-- end -->"

INPUTS = 6
"""How many inputs each graph is run on."""


# Patching


Results = Sequence[Mapping[str, np.ndarray]]
"""Outputs by name, for each input."""


@dataclass(frozen=True, eq=False)
class Case:
    """A base, what it is run on, and a patch that fires on some of it."""

    name: str
    model: ir.Model
    sites: Sequence[AttentionSite]
    inputs: Sequence[Mapping[str, np.ndarray]]
    patch: Patch
    patched: Results
    """What the patched base says of the inputs."""

    @classmethod
    def of(cls, name: str, model: ir.Model) -> "Case":
        """Draw inputs and a patch: the first site detects, and all sites of its token axis redistribute."""
        rng = np.random.default_rng(0)
        inputs = [
            {key: np.repeat(array[:1], len(array), 0) if array.ndim else array for key, array in drawn.items()}
            for drawn in (draw_inputs(model, rng) for _ in range(INPUTS))
        ]
        found = atp.find_sites(model)
        if not found:
            raise BakeError("the model", expected="attention sites", found="none", advice="Leave it out.")
        entries: list[SitePatch] = []
        for site in found:
            shares = bool(entries) and site.key.value == found[0].key.value  # tools may put it first
            if site.token_axis != found[0].token_axis or shares:
                continue
            detector = None if entries else draw_detector(site.key, rng, threshold=0.0)
            entries.append(SitePatch(site.name, detector, draw_neutral(site, rng)))
        patch = Patch(atp.fingerprint(model), tuple(entries), {"drawn": 0})
        scores = np.sort([result["atpatch/score"].max() for result in run(patched(model, patch), inputs)])
        gaps = np.diff(scores)
        gap = int(gaps.argmax())
        threshold = float(np.float32((scores[gap] + scores[gap + 1]) / 2))
        assert entries[0].detector is not None
        first = replace(entries[0], detector=replace(entries[0].detector, threshold=threshold))
        patch = replace(patch, sites=(first, *entries[1:]))
        return cls(name, model, found, inputs, patch, run(patched(model, patch), inputs))


def patched(model: ir.Model, patch: Patch, **options: Any) -> ir.Model:
    """The patched graph with the flags of every site."""
    return atp.bake(model, patch, **{"conditional": False, **options}, site_flags=True)


def moved(case: "Case", base: ir.Model, found: Sequence[AttentionSite]) -> Patch:
    """The patch for the base as a tool left it: sites are the same by output, else by name, else by order."""
    for key in ("output", "name", "index"):
        new = {getattr(site, key): site.name for site in found}
        if new.keys() == {getattr(site, key) for site in case.sites}:
            names = {site.name: new[getattr(site, key)] for site in case.sites}
            entries = tuple(replace(entry, site=names[entry.site]) for entry in case.patch.sites)
            return replace(case.patch, base=atp.fingerprint(base), sites=entries)
    raise ValueError(f"{len(case.sites)} sites before, {len(found)} after")


def run(model: ir.Model, inputs: Sequence[Mapping[str, np.ndarray]], *, optimize: bool = True) -> Results:
    """Every input in a separate batch."""
    session = Session(model, threads=1, optimize=optimize)
    return [session.run(dict(feed)) for feed in inputs]


# What comes out


@dataclass(frozen=True)
class Finding:
    """One tool on one graph, with one form of the patch. Flags and bits are counted by input."""

    graph: str
    tool: str
    form: str
    """`with If` or `without If`."""

    before: int
    """Attention sites of the base."""

    after: int | None = None
    """Attention sites of the treated base."""

    told: bool = False
    """Whether the same is said of them, names aside."""

    inputs: int = 0
    moved_flags: int = 0
    """Flags of the patch in the treated base as in the base."""

    flags: int = 0
    """Flags of the patched graph, treated, as before."""

    either_order: int = 0
    """Flags of the patched graph, treated, as those of the treated base, patched."""

    quiet: int = 0
    """Inputs without a flag in the patched graph, treated."""

    bits: int = 0
    """Those of them with the outputs of the treated base, bit for bit."""

    off: float = 0.0
    """Their largest difference from it, relative to the largest value."""

    difference: float = 0.0
    """The largest difference of flagged inputs between the two orders, relative to the largest value."""

    unbaked: bool = False
    """Whether `unbake` still gives the base back."""

    trouble: str = ""

    @property
    def sound(self) -> bool:
        """Whether all is as it was; with int8, whatever does not hang by a rounding."""
        same = self.after == self.before and self.told and self.bits == self.quiet and not self.trouble
        return same and (self.tool == INT8 or self.flags == self.moved_flags == self.inputs)


def examine(case: Case, name: str, tool: Tool) -> Iterator[Finding]:
    """Treat the base and the patched graph, and compare: one finding for each form of the patch."""
    sites, want = case.sites, case.patched
    blank = Finding(case.name, name, "", len(sites), inputs=len(case.inputs))
    try:
        base = tool(case.model)
        found = atp.find_sites(base)
        patch = moved(case, base, found)
        before = run(base, case.inputs, optimize=tool.optimize)
    except Exception as error:  # whatever other people's tools raise
        yield replace(blank, trouble=f"base: {_short(error)}")
        return
    names = dict(zip((entry.site for entry in case.patch.sites), (entry.site for entry in patch.sites), strict=True))
    own = {site: site for site in names}
    for conditional, form in FORMS.items():
        finding = replace(blank, form=form, after=len(found), told=_told(sites) == _told(found))
        try:
            after = run(patched(base, patch, conditional=conditional), case.inputs, optimize=tool.optimize)
            treated = tool(patched(case.model, case.patch, conditional=conditional))
            got = run(treated, case.inputs, optimize=tool.optimize)
        except Exception as error:
            yield replace(finding, trouble=f"patched: {_short(error)}")
            continue
        quiet = [number for number, result in enumerate(got) if not result["atpatch/flagged"].any()]
        loud = [number for number in range(len(got)) if number not in quiet]
        off = [_distance(before[number], got[number]) for number in quiet]
        yield replace(
            finding,
            moved_flags=sum(_same_flags(one, other, names) for one, other in zip(want, after, strict=True)),
            flags=sum(_same_flags(one, other, own) for one, other in zip(want, got, strict=True)),
            either_order=sum(_same_flags(one, other, names) for one, other in zip(got, after, strict=True)),
            quiet=len(quiet),
            bits=sum(_same_bits(before[number], got[number]) for number in quiet),
            off=max(off, default=0.0),
            difference=max((_distance(after[number], got[number]) for number in loud), default=0.0),
            unbaked=_unbakes(treated),
        )


def _told(sites: Sequence[AttentionSite]) -> Counter[tuple[object, ...]]:
    """What is said of the sites besides names, symbols and order."""
    return Counter(
        (site.form, site.map_layout, site.heads, site.key.heads, site.key.depth, site.value.depth, site.self_attention)
        for site in sites
    )


def _same_flags(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], names: Mapping[str, str]) -> bool:
    return all(
        np.array_equal(one[f"atpatch/{site}/flags"], other[f"atpatch/{renamed}/flags"])
        for site, renamed in names.items()
    )


def _same_bits(base: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(array.tobytes() == other[name].tobytes() for name, array in base.items())


def _distance(base: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """The largest difference between the model's own outputs, relative to the largest value of each."""
    distances = []
    for name, array in base.items():
        if not name.startswith("atpatch/") and array.dtype.kind == "f" and array.size:
            one, two = array.astype(np.float64), other[name].astype(np.float64)
            distances.append(float(np.abs(one - two).max() / max(np.abs(one).max(), 1e-30)))
    return max(distances, default=0.0)


def _unbakes(model: ir.Model) -> bool:
    try:
        atp.unbake(model)
    except UnbakeError:
        return False
    return True


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# The tables


def rows(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for each tool, then what did not go well."""
    heads = ("tool", "sites", "patched after", "patched before", "either order", "same bits", "flagged", "unbake")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name in TOOLS:
        own = [finding for finding in findings if finding.tool == name]
        ran = [finding for finding in own if not finding.trouble]
        if not own:
            continue
        by_graph = {finding.graph: finding for finding in own}.values()
        inputs = sum(finding.inputs for finding in ran)
        quiet = sum(finding.quiet for finding in ran)
        off = max((finding.off for finding in ran), default=0.0)
        cells = (
            name,
            f"{sum(finding.after or 0 for finding in by_graph)}/{sum(finding.before for finding in by_graph)}",
            f"{sum(finding.moved_flags for finding in ran)}/{inputs}",
            f"{sum(finding.flags for finding in ran)}/{inputs}",
            f"{sum(finding.either_order for finding in ran)}/{inputs}",
            f"{sum(finding.bits for finding in ran)}/{quiet}" + (f" (else {off:.0e})" if off else ""),
            f"{max((finding.difference for finding in ran), default=0.0):.1g}",
            f"{sum(finding.unbaked for finding in ran)}/{len(ran)}",
        )
        yield f"| {' | '.join(cells)} |"
    odd = [finding for finding in findings if not finding.sound]
    if odd:
        yield from ("", "What is not as it was:", "")
    for finding in odd:
        yield f"- {finding.graph}, {', '.join(filter(None, (finding.tool, finding.form)))}: {_oddity(finding)}"


def _oddity(finding: Finding) -> str:
    if finding.trouble:
        return finding.trouble
    parts = []
    if finding.after != finding.before or not finding.told:
        parts.append(f"{finding.before} sites before and {finding.after} after, or other ones")
    if finding.bits < finding.quiet:
        parts.append(
            f"{finding.quiet - finding.bits} of {finding.quiet} inputs without a flag differ by {finding.off:.0e}"
        )
    if finding.flags < finding.inputs or finding.moved_flags < finding.inputs:
        parts.append(f"flags as before: {finding.moved_flags} and {finding.flags} of {finding.inputs}")
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, and write the tables; 1 if something is not as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path, help="folder of .onnx files, instead of fresh exports")
    parser.add_argument("--out", type=Path, help=f"the document whose tables are written, as {DOCUMENT.name}")
    parser.add_argument("--fast", action="store_true", help="two exports only")
    options = parser.parse_args(arguments)
    document = options.out.read_text() if options.out else ""  # before the work: it may not be there
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of every constant that they do not fold
    found: list[Finding] = []
    names = []
    given = ((path.stem, atp.load(path)) for path in sorted(options.graphs.glob("*.onnx"))) if options.graphs else None
    for name, model in given or fresh_exports(options.fast):
        try:
            case = Case.of(name, model)
        except AtPatchError as error:
            print(f"{name}: left out, {_short(error)}", file=sys.stderr)
            continue
        names.append(name)
        for tool in TOOLS:
            for finding in examine(case, tool, TOOLS[tool]):
                found.append(finding)
                print(f"{name}, {tool}, {finding.form}: {_oddity(finding) or 'as before'}", flush=True)
    text = "\n".join((f"{len(names)} graphs: {', '.join(names)}.", "", *rows(found)))
    print(text)
    if options.out:
        start, end = document.index(BEGIN) + len(BEGIN), document.index(END)
        options.out.write_text(f"{document[:start]}\n{text}\n{document[end:]}")
    return 0 if all(finding.sound for finding in found) else 1


if __name__ == "__main__":
    sys.exit(main())
