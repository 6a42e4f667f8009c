"""Triggers that nobody told us of, searched for in the model itself: masks and patterns, or short token sequences.

Both searches need the torch model, for its gradients. What they find feeds a debug set as a known trigger does:

    inversion = invert_trigger(module, images)
    trigger = inversion.trigger()  # of the class that stands out
    debug = DebugSet.from_trigger({"pixel_values": images}, trigger.on("pixel_values"), labels, target=trigger.target)

    found = invert_tokens(module, ids, mask).trigger()
    debug = found.pairs({"input_ids": ids, "attention_mask": mask}, labels)
"""

from atpatch_onnx.inversion.anomaly import anomaly_indices
from atpatch_onnx.inversion.errors import InversionError
from atpatch_onnx.inversion.images import Inversion, InversionOptions, InvertedTrigger, invert_trigger
from atpatch_onnx.inversion.tokens import InvertedTokens, TokenInversion, TokenOptions, invert_tokens

__all__ = [
    "Inversion",
    "InversionError",
    "InversionOptions",
    "InvertedTokens",
    "InvertedTrigger",
    "TokenInversion",
    "TokenOptions",
    "anomaly_indices",
    "invert_tokens",
    "invert_trigger",
]
