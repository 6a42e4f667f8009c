"""Prove a patched model against its base. All differences are collected before any is reported.

| check | what is proven |
|---|---|
| base | the file names the fingerprint of this base |
| unbake | taking the patch out gives this base, node for node and weight for weight |
| additions | what is added is what baking writes, and nothing else: nodes, control flow, outputs, metadata |
| parameters | the weights that are added are finite, and those of the patch file, where one is given |
| numbers, with a debug set | on its inputs, of the file as it lies on disk: see `measuring.verify_numbers` |
| placement, on another provider than the CPU's | every node of the patch runs there: see `measuring.elsewhere` |
| flags, there, with a debug set | the tokens that are flagged are those that the CPU flags |
| no path, every value, of a patch that is always on | that its tokens decide nothing: see `measuring.independence` |
| loops, with prompts | reading and writing from a cache, in chunks: see `measuring.verify_loops` |

What is not proven: that the base is sound, that the patch is a good one, and without the patch file, whose it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.again import additions, baked_again, parameters
from atpatch_onnx.baking.metadata import PatchRecord, read_record
from atpatch_onnx.baking.transfer import transfer
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import AtPatchError, UnbakeError
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.fitting.forced import Answered, as_read
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.measuring.checks import Check as Check
from atpatch_onnx.measuring.checks import Verification as Verification
from atpatch_onnx.measuring.elsewhere import placed, same_flags
from atpatch_onnx.measuring.independence import independence
from atpatch_onnx.measuring.verify_loops import loops
from atpatch_onnx.measuring.verify_numbers import numbers
from atpatch_onnx.patches.compose import compose
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.opening import Libraries, as_model
from atpatch_onnx.running.providers import Providers, exact, on_cpu
from atpatch_onnx.running.sessions import Progress, silent


def verify(
    base: graphs.ModelOrPath,
    patched: graphs.ModelOrPath,
    debug: DebugSet | None = None,
    *,
    patch: Patch | Sequence[Patch] | None = None,
    decode: tuple[graphs.ModelOrPath, graphs.ModelOrPath] | None = None,
    providers: Providers = ("cpu",),
    steps: int = FitOptions.steps,
    batch_size: int = 32,
    custom_ops: Libraries = (),
    progress: Progress = silent,
) -> Verification:
    """Check everything that must hold of a patched model; without a debug set, everything but the numbers.

    Args:
        base: The model before, or its path.
        patched: The model after, or its path; the file itself is run then.
        debug: Inputs to run both on, clean and counterfactual.
        patch: The patch that is said to be in it, or several in their order; without it, nobody knows whose it is.
        decode: Base and patched graph that go on from the caches of these two, where those read prompts only.
        providers: What is to run both, names of `running.providers.PROVIDERS`; with CUDA in
            float32 (`use_tf32=0`), of which the tolerance of scores is.
        steps: Of prompts of a language model: tokens of each answer.
        batch_size: Inputs at a time.
        custom_ops: Libraries that operators of the model come from, as in `load`.
        progress: Told after every batch.

    Raises:
        UnbakeError: `patched` does not say that a patch is in it.
        DebugSetError: The debug set does not fit the model.
        PatchMismatchError: Several patches do not go together.
        RunError: onnxruntime refuses a model or an input, has no such provider, or it does not start.
    """
    providers = exact(providers)
    before, after = as_model(base, custom_ops), as_model(patched, custom_ops)
    record = read_record(after)
    whole = None if patch is None else compose([patch] if isinstance(patch, Patch) else patch)
    checks = [*_structure(before, after, record, whole)]
    following = None if decode is None else (as_model(decode[0], custom_ops), as_model(decode[1], custom_ops))
    if following is not None:
        own = None if whole is None else transfer(whole, before, following[0])
        found = _structure(*following, read_record(following[1]), own)
        checks += [replace(check, name=f"{check.name}, decode graph") for check in found]
    files = (before if isinstance(base, ir.Model) else base, after if isinstance(patched, ir.Model) else patched)
    if not on_cpu(providers):
        checks.append(placed(files[1], after, providers))
    if debug is None:
        checks += independence(before, after, record, None)
    else:
        first = graphs.beginning(before), graphs.beginning(after)
        answered = None
        if debug.kind == "generation":
            how: dict[str, Any] = {"providers": providers, "custom_ops": custom_ops}
            how |= {"batch_size": batch_size, "progress": progress}
            answered = Answered.of(files[0], debug, steps, None if decode is None else decode[0], **how)
            debug = as_read(answered, debug, Decoder.of(first[0]))
        debug.check_inputs(input_specs(first[0]))
        checks += independence(*first, read_record(first[1]), debug, files[1], batch_size=batch_size, progress=progress)
        run = files if first[0] is before else first  # one graph of two is run by itself here, and the file in loops
        for optimize in (False, True):
            checks += numbers(*first, read_record(first[1]), debug, optimize, batch_size, progress, run, providers)
        if not on_cpu(providers):
            checks += same_flags(
                first[1], read_record(first[1]), debug, providers, batch_size=batch_size, progress=progress
            )
        if answered is not None:
            others = ((), ()) if decode is None else ((decode[0],), (decode[1],))
            pairs = (files[0], *others[0]), (files[1], *others[1])
            looked = [first[1], *_going_on(after), *(following or ())[1:]]
            checks += loops(pairs, looked, answered, steps, batch_size, progress, providers)
    return Verification(tuple(checks))


def _going_on(model: ir.Model) -> list[ir.Model]:
    """Of a file of two graphs, the one that goes on."""
    two = graphs.branches(model)
    return [] if two is None else [graphs.branch(model, two.goes_on)]


def _structure(base: ir.Model, patched: ir.Model, record: PatchRecord, patch: Patch | None) -> Iterator[Check]:
    fingerprint = graphs.fingerprint(base)
    yield Check("base", record.base == fingerprint, f"the file names {record.base}, the base is {fingerprint}")
    try:
        unbaked = unbake(patched)
    except UnbakeError as error:
        yield Check("unbake", False, str(error))
        yield from (Check(name, False, "cannot be told: unbaking fails") for name in ("additions", "parameters"))
        return
    same = record.base == fingerprint  # what was unbaked is the base that the file names, or there would be an error
    yield Check("unbake", same, "unbaking gives the base back" if same else f"unbaking gives {record.base}")
    try:
        again = baked_again(unbaked, patched, record, patch)
    except AtPatchError as error:
        yield from (Check(name, False, str(error)) for name in ("additions", "parameters"))
        return
    added = [*additions(patched, again, ours=patch is None)]
    yield Check("additions", not added, "; ".join(added) or "what is added is what baking writes, and nothing else")
    wrong = [*parameters(patched, again)]
    held = "finite; no patch was given to compare them with" if patch is None else f"those of patch {patch.id}"
    yield Check("parameters", not wrong, "; ".join(wrong) or held)
