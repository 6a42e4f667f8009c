"""Models that do not come from torch's exporters alone."""

from pathlib import Path

import torch
import transformers
from onnxruntime.transformers.optimizer import optimize_model

from atpatch_onnx.exporters.exporting import exporting
from samples.exported_model import BATCH, OPSET, Model

HEADS, WIDTH, LAYERS = 4, 64, 2


def _optimized(path: Path) -> str:
    """What onnxruntime's optimizer of transformers makes of a BERT from the TorchScript exporter."""
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": WIDTH,
    }
    config = transformers.BertConfig(**sizes, vocab_size=100, max_position_embeddings=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(BATCH * 16).reshape(BATCH, 16) % 90 + 5
    names = ["input_ids", "attention_mask"]
    free = {name: {0: "batch", 1: "tokens"} for name in names}
    inputs = (ids, torch.ones_like(ids))
    with exporting(path.stem):
        torch.onnx.export(model, inputs, path, dynamo=False, opset_version=OPSET, input_names=names, dynamic_axes=free)
    optimize_model(str(path), "bert", num_heads=HEADS, hidden_size=WIDTH).save_model_to_file(str(path))
    return ""


MODELS = (Model("bert", "onnxruntime", {"optimizer": _optimized}, lambda: LAYERS),)
