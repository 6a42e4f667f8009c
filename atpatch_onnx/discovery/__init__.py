"""Pairs where the trigger is not known, or where flips are rare.

Searched for by forward passes, in any `.onnx` file: `hunt` in traffic, `scan` with clean inputs only.

    found = hunt("model.onnx", {"pixel_values": traffic})
    print(found.verdict, found.sentence)
    patch = fit("model.onnx", found.pairs)

Searched for by gradients, in the torch model. Triggers that nobody told us of are masks and patterns, or short token
sequences. What these searches find feeds a debug set as a known trigger does:

    inversion = invert_trigger(module, images)
    trigger = inversion.trigger()  # of the class that stands out
    debug = DebugSet.from_trigger({"pixel_values": images}, trigger.on("pixel_values"), labels, target=trigger.target)

    found = invert_tokens(module, ids, mask).trigger()
    debug = found.pairs({"input_ids": ids, "attention_mask": mask}, labels)

Individual discrimination: inputs whose prediction changes with a protected attribute (`discriminatory_pairs`).

A module is imported when a name of it is first used: hunting and scanning need no torch.
"""

import typing
from importlib import import_module

_HOMES = {
    "Attribute": "attributes",
    "Discrimination": "discriminatory",
    "HuntOptions": "options",
    "Inversion": "images",
    "InversionOptions": "descent",
    "InvertedTokens": "tokens",
    "InvertedTrigger": "images",
    "Part": "verdict",
    "ScanOptions": "options",
    "Search": "verdict",
    "SearchOptions": "discriminatory",
    "TokenInversion": "tokens",
    "TokenOptions": "swaps",
    "Verdict": "verdict",
    "anomaly_indices": "anomaly",
    "discriminatory_pairs": "discriminatory",
    "hunt": "hunting",
    "invert_tokens": "tokens",
    "invert_trigger": "images",
    "scan": "scanning",
}
"""The module of each name."""

__all__ = list(_HOMES)

if typing.TYPE_CHECKING:
    from atpatch_onnx.discovery.anomaly import anomaly_indices as anomaly_indices
    from atpatch_onnx.discovery.attributes import Attribute as Attribute
    from atpatch_onnx.discovery.descent import InversionOptions as InversionOptions
    from atpatch_onnx.discovery.discriminatory import Discrimination as Discrimination
    from atpatch_onnx.discovery.discriminatory import SearchOptions as SearchOptions
    from atpatch_onnx.discovery.discriminatory import discriminatory_pairs as discriminatory_pairs
    from atpatch_onnx.discovery.hunting import hunt as hunt
    from atpatch_onnx.discovery.images import Inversion as Inversion
    from atpatch_onnx.discovery.images import InvertedTrigger as InvertedTrigger
    from atpatch_onnx.discovery.images import invert_trigger as invert_trigger
    from atpatch_onnx.discovery.options import HuntOptions as HuntOptions
    from atpatch_onnx.discovery.options import ScanOptions as ScanOptions
    from atpatch_onnx.discovery.scanning import scan as scan
    from atpatch_onnx.discovery.swaps import TokenOptions as TokenOptions
    from atpatch_onnx.discovery.tokens import InvertedTokens as InvertedTokens
    from atpatch_onnx.discovery.tokens import TokenInversion as TokenInversion
    from atpatch_onnx.discovery.tokens import invert_tokens as invert_tokens
    from atpatch_onnx.discovery.verdict import Part as Part
    from atpatch_onnx.discovery.verdict import Search as Search
    from atpatch_onnx.discovery.verdict import Verdict as Verdict
else:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
