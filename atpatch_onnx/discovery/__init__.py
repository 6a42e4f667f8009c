"""Pairs where the trigger is not known, or where flips are rare: searched for in the model itself, by gradients.

Triggers that nobody told us of are masks and patterns, or short token sequences. Both searches need the torch model.
What they find feeds a debug set as a known trigger does:

    inversion = invert_trigger(module, images)
    trigger = inversion.trigger()  # of the class that stands out
    debug = DebugSet.from_trigger({"pixel_values": images}, trigger.on("pixel_values"), labels, target=trigger.target)

    found = invert_tokens(module, ids, mask).trigger()
    debug = found.pairs({"input_ids": ids, "attention_mask": mask}, labels)

Individual discrimination: inputs whose prediction changes with a protected attribute (`discriminatory_pairs`).
"""

from atpatch_onnx.discovery.anomaly import anomaly_indices
from atpatch_onnx.discovery.attributes import Attribute
from atpatch_onnx.discovery.descent import InversionOptions
from atpatch_onnx.discovery.discriminatory import Discrimination, SearchOptions, discriminatory_pairs
from atpatch_onnx.discovery.images import Inversion, InvertedTrigger, invert_trigger
from atpatch_onnx.discovery.swaps import TokenOptions
from atpatch_onnx.discovery.tokens import InvertedTokens, TokenInversion, invert_tokens

__all__ = [
    "Attribute",
    "Discrimination",
    "Inversion",
    "InversionOptions",
    "InvertedTokens",
    "InvertedTrigger",
    "SearchOptions",
    "TokenInversion",
    "TokenOptions",
    "anomaly_indices",
    "discriminatory_pairs",
    "invert_tokens",
    "invert_trigger",
]
