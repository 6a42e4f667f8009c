"""Bakes a hot-fix for backdoored or unfair transformers into the model's own ONNX graph.

    import atpatch_onnx as atp

    model = atp.load("model.onnx")
    pairs = atp.DebugSet.from_pairs(clean, triggered, labels=y)
    patch = atp.fit(model, pairs)
    patched = atp.bake(model, patch, target="cpu")
    atp.save(patched, "patched.onnx")
    atp.verify("model.onnx", "patched.onnx", pairs).raise_if_failed()

These names are what most people need; the rest is imported from the rooms, such as `atpatch_onnx.neurons`. A module is
imported when a name of it is first used: listing a model's sites takes neither onnxruntime nor torch, which take longer
to import than it does.
"""

import typing
from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "TARGETS": "baking.targets",
    "AtPatchError": "errors",
    "DebugSet": "debugset",
    "FitOptions": "fitting.options",
    "Goal": "fitting.goal",
    "Patch": "patches.patch",
    "PatchedSession": "serving",
    "bake": "baking.bake",
    "benchmark": "measuring.benchmark",
    "compare": "measuring.compare",
    "compose": "patches.compose",
    "evaluate": "measuring.evaluate",
    "evaluate_prompts": "measuring.evaluate_prompts",
    "explain": "matching",
    "find_sites": "matching",
    "fingerprint": "graph",
    "fit": "fitting.fit",
    "hunt": "discovery",
    "invert_trigger": "discovery",
    "load": "running.opening",
    "rehearse": "measuring.rehearse",
    "save": "graph",
    "scan": "discovery",
    "unbake": "baking.unbake",
    "verify": "measuring.verify",
}
"""The room and module of each public name."""

__all__ = list(_HOMES)

if typing.TYPE_CHECKING:  # the same names, for those who read types
    from atpatch_onnx.baking.bake import bake as bake
    from atpatch_onnx.baking.targets import TARGETS as TARGETS
    from atpatch_onnx.baking.unbake import unbake as unbake
    from atpatch_onnx.debugset import DebugSet as DebugSet
    from atpatch_onnx.discovery import hunt as hunt
    from atpatch_onnx.discovery import invert_trigger as invert_trigger
    from atpatch_onnx.discovery import scan as scan
    from atpatch_onnx.errors import AtPatchError as AtPatchError
    from atpatch_onnx.fitting.fit import fit as fit
    from atpatch_onnx.fitting.goal import Goal as Goal
    from atpatch_onnx.fitting.options import FitOptions as FitOptions
    from atpatch_onnx.graph import fingerprint as fingerprint
    from atpatch_onnx.graph import save as save
    from atpatch_onnx.matching import explain as explain
    from atpatch_onnx.matching import find_sites as find_sites
    from atpatch_onnx.measuring.benchmark import benchmark as benchmark
    from atpatch_onnx.measuring.compare import compare as compare
    from atpatch_onnx.measuring.evaluate import evaluate as evaluate
    from atpatch_onnx.measuring.evaluate_prompts import evaluate_prompts as evaluate_prompts
    from atpatch_onnx.measuring.rehearse import rehearse as rehearse
    from atpatch_onnx.measuring.verify import verify as verify
    from atpatch_onnx.patches.compose import compose as compose
    from atpatch_onnx.patches.patch import Patch as Patch
    from atpatch_onnx.running.opening import load as load
    from atpatch_onnx.serving import PatchedSession as PatchedSession
else:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
