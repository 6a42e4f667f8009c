"""Edits of hidden units: find the guilty ones, and freeze them (IDNN) or scale them (CARE).

units, trial, activations -> measures -> subject -> isolation (IDNN), causality (CARE) -> a `Patch` with edits
"""

from atpatch_onnx.neurons.activations import Activations, measure_activations, most_different
from atpatch_onnx.neurons.causality import causal_effects, repair
from atpatch_onnx.neurons.isolation import Isolated, isolate
from atpatch_onnx.neurons.options import IsolationOptions, NeuronOptions, RepairOptions
from atpatch_onnx.neurons.trial import NeuronTrial
from atpatch_onnx.neurons.units import Unit, edits_of

__all__ = [
    "Activations",
    "Isolated",
    "IsolationOptions",
    "NeuronOptions",
    "NeuronTrial",
    "RepairOptions",
    "Unit",
    "causal_effects",
    "edits_of",
    "isolate",
    "measure_activations",
    "most_different",
    "repair",
]
