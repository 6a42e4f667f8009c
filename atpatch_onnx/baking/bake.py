"""Put a patch into a model's graph.

The steps, each on a copy of the base, the base itself left alone:

    patches composed to one  ->  refuse what cannot be baked  ->  hidden units edited, layer by layer
    ->  read, detect, replace, site by site  ->  monitoring outputs  ->  what the file says of itself
    ->  the invariants of every patched graph

Flags are carried along a token axis: a site's flags are its own or those of the earlier patched sites of its axis.

A file of two graphs, a decoder's for prompts and for steps, gets the same nodes in both: see `graph.branches`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.edits import bake_edits
from atpatch_onnx.baking.invariants import require_invariants
from atpatch_onnx.baking.metadata import PatchedLayer, PatchedSite, describe, is_patched
from atpatch_onnx.baking.monitor import add_monitors, add_site_flags
from atpatch_onnx.baking.targets import require_target, target_named
from atpatch_onnx.baking.transfer import transfer
from atpatch_onnx.baking.write import Written, always_flags, constants, write
from atpatch_onnx.errors import BakeError, PatchMismatchError
from atpatch_onnx.graph.branches import Branches
from atpatch_onnx.graph.names import ENTRY, PREFIX
from atpatch_onnx.graph.parts import require_opset
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.compose import compose
from atpatch_onnx.patches.patch import Patch, SitePatch
from atpatch_onnx.running.slots import has_cache


def bake(
    model: ir.Model,
    patch: Patch | Sequence[Patch],
    *,
    target: str = "cpu",
    conditional: bool | None = None,
    monitor: bool = True,
    site_flags: bool = False,
) -> ir.Model:
    """A copy of `model` with `patch` in its graph. The weights are shared with `model`, not copied.

    Args:
        model: The base, the very model that the patch was fitted on.
        patch: The fix, or several in their order: see `compose`.
        target: Where it will run, a key of `TARGETS`.
        conditional: Whether replacements stand in an `If`; None: as the target has it, but never in half precision,
            where onnxruntime's CPU kernels round at an `If` what they otherwise hand on unrounded, nor behind a cache,
            where a step reads one token, and an `If` takes longer than replacing it. A patch that is always on has
            none: it replaces tokens of every input.
        monitor: Whether to add the outputs `atpatch/flagged` (bool `[batch, 1]`) and `atpatch/score` (float
            `[batch, 1]`).
        site_flags: Whether to add an output `atpatch/<site>/flags` (bool `[batch, tokens]`) for every patched site.

    Raises:
        BakeError: The target is unknown or does not take the model, the model is patched already, or its opset is too
            old.
        PatchMismatchError: The patch was fitted on another model, or several do not go together.
    """
    patch = compose([patch] if isinstance(patch, Patch) else patch)
    if conditional is None and has_cache(model):
        conditional = False
    how = _How(target, conditional, monitor, site_flags)
    _require_unpatched(model)
    _require_base(model, patch)
    two = graphs.branches(model)
    return _bake(model, patch, how) if two is None else _bake_both(model, two, patch, how)


@dataclass(frozen=True)
class _How:
    """The options of `bake`."""

    target: str
    conditional: bool | None
    monitor: bool
    site_flags: bool


def _bake_both(model: ir.Model, two: Branches, patch: Patch, how: _How) -> ir.Model:
    """Into both graphs of a model of two, and what the first says of itself said of the file."""
    first, second = (graphs.branch(model, name) for name in two)
    own = replace(patch, base=graphs.fingerprint(first))
    baked = _bake(first, own, how), _bake(second, transfer(own, first, second), how)
    patched = graphs.joined(model, dict(zip(two, baked, strict=True)))
    patched.metadata_props.update(baked[0].metadata_props)
    patched.metadata_props.update({f"{ENTRY}base": patch.base, f"{ENTRY}patch": patch.id})
    return patched


def _bake(model: ir.Model, patch: Patch, how: _How) -> ir.Model:
    wanted, conditional = target_named(how.target), how.conditional
    entries = _patched_sites(model, patch)
    if conditional is None:
        half = any(site.dtype in _HALVES for site, _ in entries)
        conditional = wanted.conditional and not half
    conditional = conditional and not (entries and always_flags(entries))
    patched = graphs.copy(model)
    layers = bake_edits(patched, patch.edits)
    written = write(patched, entries, constants, conditional=conditional)
    monitors = add_monitors(patched, written) if how.monitor and written else []
    if how.site_flags:
        monitors += add_site_flags(patched, written)
    edited = {edit.layer: len(edit.units) for edit in patch.edits}
    entry = describe(
        patch,
        patched,
        conditional=conditional,
        sites=[_patched_site(step) for step in written],
        layers=[PatchedLayer(layer.name, layer.value, edited[layer.name]) for layer in layers],
        monitors=monitors,
    )
    patched.metadata_props.update(entry)
    require_target(patched, how.target)
    require_invariants(patched)
    return patched


_HALVES = ("FLOAT16", "BFLOAT16")


def _patched_site(step: Written) -> PatchedSite:
    """What the file says of one site."""
    return PatchedSite(
        site=step.site.name,
        threshold=None if step.entry.detector is None else step.entry.detector.threshold,
        redistributes=step.entry.neutral is not None,
        key=step.site.key.value,
        value=step.site.value.value,
        margin=str(step.margin.name),
        own=None if step.own is None else step.own.name,
    )


def _require_unpatched(model: ir.Model) -> None:
    if is_patched(model):
        raise BakeError(
            "the model",
            expected="a base model",
            found="one that is patched already",
            advice="Unbake it first.",
        )
    taken = sorted(name for name in graphs.all_names(model) if name.startswith(PREFIX))
    if taken:
        raise BakeError(
            "the model",
            expected=f"no names under {PREFIX!r}",
            found=repr(taken[0]),
            advice="Rename these nodes and values, or unbake the model if it was patched.",
        )
    require_opset(model)


def _require_base(model: ir.Model, patch: Patch) -> None:
    found = graphs.fingerprint(model)
    if patch.base != found:
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected=f"the model it was fitted on, {patch.base}",
            found=f"a model with the fingerprint {found}",
            advice="Bake it into the model it was fitted on, or fit a patch for this one.",
        )


def _patched_sites(model: ir.Model, patch: Patch) -> list[tuple[AttentionSite, SitePatch]]:
    """The patch's sites in the model, or the reason why they cannot be patched."""
    chosen = [entry.site for entry in patch.sites]
    if not (chosen or patch.edits) or len(set(chosen)) < len(chosen):
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected="at least one site or neuron edit, and each site once",
            found=f"the sites {', '.join(chosen) or 'none'}",
            advice="Fit the patch again.",
        )
    by_name = {site.name: site for site in find_sites(model)} if chosen else {}
    missing = [entry.site for entry in patch.sites if entry.site not in by_name]
    if missing:
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected=f"the attention site {missing[0]!r}",
            found=f"the sites {', '.join(by_name) or 'none'}",
            advice="Use the version of atpatch-onnx that fitted the patch, or fit it again.",
        )
    return sorted(((by_name[entry.site], entry) for entry in patch.sites), key=lambda pair: pair[0].index)
