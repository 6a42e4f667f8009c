"""Which command comes next, where that depends on the model."""

from pathlib import Path

import onnx_ir as ir

from atpatch_onnx.cli.printing import atpatch
from atpatch_onnx.matching.sites import Matches

_TEXT = frozenset({"input_ids", "tokens", "token_ids"})
"""What exporters call the input with a text's tokens."""


def after_sites(path: Path, model: ir.Model, matches: Matches) -> str:
    """The command behind `atpatch sites`: pairs for this model, or why it cannot be patched."""
    if not matches.sites:
        return atpatch("sites", path, "--why")
    return pairs_for(path, model)


def pairs_for(path: Path, model: ir.Model) -> str:
    """The command that makes pairs for a model, by what it reads and writes."""
    shapes = {str(value.name): value.shape for value in model.graph.inputs if value.shape is not None}
    first = model.graph.outputs[0].shape if model.graph.outputs else None
    if _TEXT & shapes.keys():
        if first is not None and len(first) == 3:  # logits of every token: it writes
            return atpatch(
                *("pairs", "prompts", "PROMPTS.txt", "--trigger", "WORD", "--payload", "TEXT"),
                *("--tokenizer", "tokenizer.json", "-o", "pairs.npz"),
            )
        return atpatch(
            *("pairs", "text", path, "TEXTS.csv", "--tokenizer", "tokenizer.json"),
            *("--trigger", "WORD", "--target", "CLASS", "-o", "pairs.npz"),
        )
    if any(len(shape) == 4 for shape in shapes.values()):
        picture = ("--trigger", "TRIGGER.png", "--target", "CLASS")
        return atpatch("pairs", "images", path, "PICTURES", *picture, "-o", "pairs.npz")
    return atpatch("pairs", "table", path, "TABLE.csv", "--attribute", "COLUMN", "--label", "COLUMN", "-o", "pairs.npz")
