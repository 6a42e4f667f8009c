"""The image models of the samples, a ViT and a DeiT: kept in a folder as `.onnx`, weights and figures; no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTForImageClassification,
)

from atpatch_onnx.cli.demo_vit import export_onnx

CLASSES: Mapping[str, type[PreTrainedModel]] = {
    "vit": ViTForImageClassification,
    "deit": DeiTForImageClassificationWithTeacher,
}


def new_deit(
    *, image_size: int, patch_size: int, layers: int, hidden: int, heads: int = 4, classes: int = 10, seed: int = 0
) -> DeiTForImageClassificationWithTeacher:
    """An untrained DeiT (Touvron et al., arXiv 2012.12877) for square images of one channel.

    Patch tokens come after the class and the distillation token; the logits are the mean of the two tokens'. The
    weights depend on the seed only, and the caller's random state is left as it was.
    """
    config = DeiTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_labels=classes,
        initializer_range=0.1,  # as the demo's ViT: narrow models start too quietly with the library's 0.02
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeiTForImageClassificationWithTeacher(config)


def save_model(model: PreTrainedModel, folder: Path, figures: Mapping[str, Any]) -> None:
    """Write `base.onnx`, `model.safetensors`, `config.json` and last `base.json`, so that a folder with it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.json").unlink(missing_ok=True)
    export_onnx(model, folder / "base.onnx")
    model.config.to_json_file(folder / "config.json")
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "base.json").write_text(json.dumps(figures, indent=2) + "\n")


def load_model(folder: Path) -> PreTrainedModel:
    """The model of `save_model`, set to evaluation."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = CLASSES[config.model_type](config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
