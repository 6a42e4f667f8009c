"""Debug sets: pairs (clean, counterfactual) with the token positions that make the difference."""

from atpatch_onnx.debugset.builders import Trigger
from atpatch_onnx.debugset.checks import InputSpec
from atpatch_onnx.debugset.pairs import DebugSet, Kind, Split

__all__ = ["DebugSet", "InputSpec", "Kind", "Split", "Trigger"]
