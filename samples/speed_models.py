"""What speed is measured on: well-known models with random weights, exported in several forms, and in torch with hooks.

Weights do not matter to speed, so nothing is downloaded.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import transformers
from torch import Tensor

from atpatch_onnx.exporters.exporting import exporting
from atpatch_onnx.patches.patch import Detector, Patch, SitePatch

EAGER, FUSED, OFFLINE = "decomposed, opset 18", "op `Attention`, opset 23", "op `Attention`, fused offline"
FORMS = {EAGER: ("eager", 18), FUSED: ("sdpa", 23)}
"""How transformers computes attention, and the opset. The third form is the second one, optimized by onnxruntime."""


@dataclass(frozen=True)
class Kind:
    """A model of transformers."""

    model: type[transformers.PreTrainedModel]
    config: Callable[[bool], transformers.PreTrainedConfig]
    """Of the real size, or of a tiny one."""

    reads_tokens: bool = True


def _sizes(fast: bool, **real: int) -> dict[str, Any]:
    if not fast:
        return real
    return {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


KINDS = {
    "vit": Kind(
        transformers.ViTForImageClassification,
        lambda fast: transformers.ViTConfig(
            **_sizes(fast), **({"image_size": 32, "patch_size": 4} if fast else {}), num_labels=1000
        ),
        reads_tokens=False,
    ),
    "large images": Kind(  # little to compute on much to read
        transformers.ViTForImageClassification,
        lambda fast: transformers.ViTConfig(
            **_sizes(True),
            **({"image_size": 32, "patch_size": 4} if fast else {}),
            num_labels=10,
            initializer_range=0.5,  # so that a bright patch changes what is predicted
        ),
        reads_tokens=False,
    ),
    "bert": Kind(transformers.BertForSequenceClassification, lambda fast: transformers.BertConfig(**_sizes(fast))),
    "minilm": Kind(
        transformers.BertForSequenceClassification,
        lambda fast: transformers.BertConfig(
            **_sizes(fast, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        ),
    ),
    "gpt2": Kind(
        transformers.GPT2LMHeadModel,
        lambda fast: transformers.GPT2Config(
            use_cache=False,
            **(
                {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": None, "eos_token_id": None}
                if fast
                else {}
            ),
        ),
    ),
    "two layers": Kind(
        transformers.BertForSequenceClassification,
        lambda fast: transformers.BertConfig(
            **_sizes(fast, num_hidden_layers=2) | {"num_hidden_layers": 2}, max_position_embeddings=4096
        ),
    ),
}


def example(kind: Kind, config: Any) -> dict[str, Tensor]:
    """Two inputs to trace with."""
    if not kind.reads_tokens:
        size = config.image_size
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)}
    ids = torch.arange(2 * 16).reshape(2, 16) % 90 + 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def torch_model(name: str, *, fast: bool, attention: str) -> transformers.PreTrainedModel:
    """A model in inference mode; the same weights each time."""
    kind = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind.model._from_config(kind.config(fast), attn_implementation=attention).eval()


def export(name: str, folder: Path, *, fast: bool) -> dict[str, Path]:
    """The files of each form of a model, in `folder`; batch and length are free."""
    kind, paths = KINDS[name], {}
    for form, (attention, opset) in FORMS.items():
        module = torch_model(name, fast=fast, attention=attention)
        inputs = example(kind, module.config)
        free = {0: torch.export.Dim.DYNAMIC, **({1: torch.export.Dim.DYNAMIC} if kind.reads_tokens else {})}
        with exporting(name):
            program = torch.onnx.export(
                module,
                (),
                kwargs=inputs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dict.fromkeys(inputs, free),
                verbose=False,
            )
        assert program is not None  # it is None only where a path is given
        paths[form] = folder / f"{name.replace(' ', '-')}-{attention}.onnx"
        program.save(paths[form], external_data=True)
    paths[OFFLINE] = optimized(paths[FUSED])
    return paths


def optimized(path: Path) -> Path:
    """The graph that onnxruntime makes of a file at its extended level: SkipLayerNormalization, BiasGelu, ..."""
    target = path.with_name(f"{path.stem}-fused.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = os.fspath(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
    ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return target


class Hooks:
    """The fix in torch: attention with Python code between its operators, as the paper has it.

    The detectors and neutral tokens are those of the patch. Register with `hooked`.
    """

    def __init__(self, patch: Patch, device: torch.device) -> None:
        self._sites = [_Site.of(entry, device) for entry in patch.sites]
        self._numbers: dict[int, int] = {}
        self._margins: Tensor | None = None

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Attention as transformers asks for it: q, k, v `[batch, heads, tokens, depth]`."""
        number = self._numbers.setdefault(id(module), len(self._numbers))
        site = self._sites[number]
        margins = site.margins(key)
        if number and self._margins is not None:
            margins = torch.maximum(margins, self._margins)
        self._margins = margins
        flags = margins > 0
        if flags.any():
            where = flags[:, None, :, None]
            key, value = torch.where(where, site.neutral[0], key), torch.where(where, site.neutral[1], value)
        scores = query @ key.transpose(2, 3) * more["scaling"]
        P = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return (P @ value).transpose(1, 2).contiguous(), P


@dataclass(frozen=True, eq=False)
class _Site:
    """One site's linear detector and neutral token, as tensors."""

    weights: Tensor
    threshold: float
    neutral: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, entry: SitePatch, device: torch.device) -> "_Site":
        detector, neutral = entry.detector, entry.neutral
        assert isinstance(detector, Detector), "it reads keys"
        assert neutral is not None
        own = (torch.from_numpy(array)[None, :, None].to(device) for array in (neutral.key, neutral.value))
        weights = torch.from_numpy(detector.weights[:, 0]).to(device)
        return cls(weights, detector.threshold, tuple(own))  # type: ignore[arg-type]

    def margins(self, key: Tensor) -> Tensor:
        """`[batch, tokens]` of keys `[batch, heads, tokens, depth]`."""
        found: Tensor = key.transpose(1, 2).flatten(2) @ self.weights - self.threshold
        return found


def hooked(model: transformers.PreTrainedModel, patch: Patch) -> transformers.PreTrainedModel:
    """The model with hooks in place of its attention."""
    transformers.AttentionInterface.register("atpatch_hooks", Hooks(patch, model.device))
    model.set_attn_implementation("atpatch_hooks")
    return model


def quiet() -> None:
    """No lines of the exporter."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
