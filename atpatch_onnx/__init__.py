"""Bakes a hot-fix for backdoored or unfair transformers into the model's own ONNX graph.

    import atpatch_onnx as atp

    model = atp.load("model.onnx")
    debug = atp.DebugSet.from_pairs(clean, triggered, labels=y)
    patch = atp.fit(model, debug)
    patched = atp.bake(model, patch, target="cpu")
    atp.save(patched, "patched.onnx")
    atp.verify("model.onnx", "patched.onnx", debug).raise_if_failed()

Each verb is a function here and a module of the same name: `atpatch_onnx.fit` is the function, and
`from atpatch_onnx.fit import FitOptions` reads from the module.
"""

from atpatch_onnx.bake import TARGETS, bake
from atpatch_onnx.debugset import DebugSet, Split
from atpatch_onnx.emission import Emission
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.evaluate import Evaluation, evaluate
from atpatch_onnx.fit import FitOptions, fit
from atpatch_onnx.goal import Goal, Outcome
from atpatch_onnx.graph import fingerprint, load, save
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.patch import Patch
from atpatch_onnx.sites import AttentionSite, Matches, NearMiss
from atpatch_onnx.strip import strip
from atpatch_onnx.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "AtPatchError",
    "AttentionSite",
    "DebugSet",
    "Emission",
    "Evaluation",
    "FitOptions",
    "Goal",
    "Matches",
    "NearMiss",
    "Outcome",
    "Patch",
    "Split",
    "Verification",
    "bake",
    "evaluate",
    "explain",
    "find_sites",
    "fingerprint",
    "fit",
    "load",
    "save",
    "strip",
    "verify",
]
