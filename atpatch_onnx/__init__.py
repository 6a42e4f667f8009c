"""Bakes a hot-fix for backdoored or unfair transformers into the model's own ONNX graph.

    import atpatch_onnx as atp

    model = atp.load("model.onnx")
    debug = atp.DebugSet.from_pairs(clean, triggered, labels=y)
    patch = atp.fit(model, debug)
    patched = atp.bake(model, patch, target="cpu")
    atp.save(patched, "patched.onnx")
    atp.verify("model.onnx", "patched.onnx", debug).raise_if_failed()

Each verb is a function here and a module of the same name: `atpatch_onnx.fit` is the function, and
`from atpatch_onnx.evaluate import Curve` reads from the module. A module is imported when a name of it is first used:
listing a model's sites takes neither onnxscript nor onnxruntime, which together take longer to import than it does.
"""

import sys
import typing
from importlib import import_module
from types import ModuleType

if typing.TYPE_CHECKING:
    from atpatch_onnx.bake import bake
    from atpatch_onnx.benchmark import Benchmark, benchmark
    from atpatch_onnx.composition import compose
    from atpatch_onnx.debug import Ladder, compare, debug
    from atpatch_onnx.debugset import DebugSet, Split
    from atpatch_onnx.discrimination import Attribute, discriminatory_pairs
    from atpatch_onnx.emission import Emission
    from atpatch_onnx.errors import AtPatchError
    from atpatch_onnx.evaluate import Evaluation, evaluate
    from atpatch_onnx.fit import fit
    from atpatch_onnx.goal import Goal, Outcome
    from atpatch_onnx.graph import fingerprint, load, save
    from atpatch_onnx.hidden import HiddenLayer, find_hidden_layers
    from atpatch_onnx.inversion import invert_tokens, invert_trigger
    from atpatch_onnx.matching import explain, find_sites
    from atpatch_onnx.neurons import IsolationOptions, RepairOptions, isolate, repair
    from atpatch_onnx.options import FitOptions
    from atpatch_onnx.patch import LayerEdit, Patch
    from atpatch_onnx.quantization import quantize, quantizer_settings, rebind
    from atpatch_onnx.rehearsal import Rehearsal, rehearse
    from atpatch_onnx.serving import PatchedSession
    from atpatch_onnx.sites import AttentionSite, Matches, NearMiss
    from atpatch_onnx.strip import strip
    from atpatch_onnx.targets import TARGETS
    from atpatch_onnx.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "AtPatchError",
    "AttentionSite",
    "Attribute",
    "Benchmark",
    "DebugSet",
    "Emission",
    "Evaluation",
    "FitOptions",
    "Goal",
    "HiddenLayer",
    "IsolationOptions",
    "Ladder",
    "LayerEdit",
    "Matches",
    "NearMiss",
    "Outcome",
    "Patch",
    "PatchedSession",
    "Rehearsal",
    "RepairOptions",
    "Split",
    "Verification",
    "bake",
    "benchmark",
    "compare",
    "compose",
    "debug",
    "discriminatory_pairs",
    "evaluate",
    "explain",
    "find_hidden_layers",
    "find_sites",
    "fingerprint",
    "fit",
    "invert_tokens",
    "invert_trigger",
    "isolate",
    "load",
    "quantize",
    "quantizer_settings",
    "rebind",
    "rehearse",
    "repair",
    "save",
    "strip",
    "verify",
]

_HOMES = {
    "AtPatchError": "errors",
    "AttentionSite": "sites",
    "Attribute": "discrimination",
    "Benchmark": "benchmark",
    "DebugSet": "debugset",
    "Emission": "emission",
    "Evaluation": "evaluate",
    "FitOptions": "options",
    "Goal": "goal",
    "HiddenLayer": "hidden",
    "IsolationOptions": "neurons",
    "Ladder": "debug",
    "LayerEdit": "patch",
    "Matches": "sites",
    "NearMiss": "sites",
    "Outcome": "goal",
    "Patch": "patch",
    "PatchedSession": "serving",
    "Rehearsal": "rehearsal",
    "RepairOptions": "neurons",
    "Split": "debugset",
    "TARGETS": "targets",
    "Verification": "verify",
    "bake": "bake",
    "benchmark": "benchmark",
    "compare": "debug",
    "compose": "composition",
    "debug": "debug",
    "discriminatory_pairs": "discrimination",
    "evaluate": "evaluate",
    "explain": "matching",
    "find_hidden_layers": "hidden",
    "find_sites": "matching",
    "fingerprint": "graph",
    "fit": "fit",
    "invert_tokens": "inversion",
    "invert_trigger": "inversion",
    "isolate": "neurons",
    "load": "graph",
    "quantize": "quantization",
    "quantizer_settings": "quantization",
    "rebind": "quantization",
    "rehearse": "rehearsal",
    "repair": "neurons",
    "save": "graph",
    "strip": "strip",
    "verify": "verify",
}
"""The module of each public name."""


class _Package(ModuleType):
    """The package, whose public names are looked up when they are first used."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found: object = getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        # Python binds a module that it has imported to its package; a verb of the same name stays the function.
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *_HOMES})


sys.modules[__name__].__class__ = _Package
