"""Fresh exports of tiny, randomly initialised models: the fixtures of the matching tests.

Exporting takes seconds, so each (model, way) is exported once a session.
"""

import functools
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers
from torch import nn
from transformers.exporters import OnnxConfig, OnnxExporter

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
IDS = {"input_ids": torch.arange(2 * 12).reshape(2, 12) % 50 + 3}
MASKED_IDS = {**IDS, "attention_mask": torch.ones(2, 12, dtype=torch.int64)}  # the TorchScript exporter needs the mask


@dataclass(frozen=True)
class Tiny:
    """A model to export: how to build it, what to feed it, and how many attention modules it has."""

    build: Callable[[str], nn.Module]
    inputs: dict[str, torch.Tensor]
    attentions: int


def _pretrained(name: str, config: transformers.PretrainedConfig) -> Callable[[str], nn.Module]:
    return lambda attention: getattr(transformers, name)._from_config(config, attn_implementation=attention)


MODELS = {
    "vit": Tiny(
        _pretrained("ViTForImageClassification", transformers.ViTConfig(**TINY, image_size=16, patch_size=4)),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
        2,
    ),
    "bert": Tiny(
        _pretrained("BertModel", transformers.BertConfig(**TINY, vocab_size=64, max_position_embeddings=64)),
        MASKED_IDS,
        2,
    ),
    "gpt2": Tiny(
        _pretrained(
            "GPT2LMHeadModel",
            transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=64,
                n_positions=64, use_cache=False, bos_token_id=1, eos_token_id=2,
            ),
        ),
        MASKED_IDS,
        2,
    ),
    "llama": Tiny(
        _pretrained(
            "LlamaForCausalLM",
            transformers.LlamaConfig(
                **TINY, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, use_cache=False
            ),
        ),
        MASKED_IDS,
        2,
    ),
    "t5": Tiny(
        _pretrained(
            "T5Model",
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=64, use_cache=False,
                decoder_start_token_id=0,
            ),
        ),
        {**IDS, "decoder_input_ids": IDS["input_ids"] + 1},
        6,
    ),
}  # fmt: skip

WAYS = {
    "dynamo 18 eager": ("eager", lambda model, inputs: _dynamo(model, inputs, 18)),
    "dynamo 18 sdpa": ("sdpa", lambda model, inputs: _dynamo(model, inputs, 18)),
    "dynamo 23 eager": ("eager", lambda model, inputs: _dynamo(model, inputs, 23)),
    "dynamo 23 sdpa": ("sdpa", lambda model, inputs: _dynamo(model, inputs, 23)),
    "torchscript eager": ("eager", lambda model, inputs: _torchscript(model, inputs)),
    "torchscript sdpa": ("sdpa", lambda model, inputs: _torchscript(model, inputs)),
    "transformers": ("sdpa", lambda model, inputs: by_transformers(model, inputs)),
    "transformers 23": ("sdpa", lambda model, inputs: by_transformers(model, inputs, opset_version=23)),
    "transformers dynamic": ("sdpa", lambda model, inputs: by_transformers(model, inputs, dynamic=True)),
}
"""How to export, by name: the attention implementation and the exporter."""


@functools.cache
def export(model: str, way: str) -> ir.Model:
    """The model, exported that way."""
    torch.manual_seed(0)
    attention, exporter = WAYS[way]
    return export_module(MODELS[model].build(attention).eval(), MODELS[model].inputs, exporter)


def export_module(
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    exporter: Callable[[nn.Module, dict[str, torch.Tensor]], onnx.ModelProto | ir.Model],
) -> ir.Model:
    """Any module, exported; the exporters' own warnings (deprecations inside torch and transformers) are not ours."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = exporter(module, inputs)
    return exported if isinstance(exported, ir.Model) else ir.from_proto(exported)


def numpy_inputs(model: str) -> dict[str, np.ndarray]:
    """The inputs that the model was exported with."""
    return {name: tensor.numpy() for name, tensor in MODELS[model].inputs.items()}


class _Positional(nn.Module):
    """A model that takes its inputs in order and gives its first output, as the TorchScript exporter wants it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        result = self.model(**dict(zip(self.names, values, strict=True)))
        return result if isinstance(result, torch.Tensor) else result[0]


def _dynamo(model: nn.Module, inputs: dict[str, torch.Tensor], opset: int) -> onnx.ModelProto:
    program = torch.onnx.export(
        model, (), kwargs=inputs, dynamo=True, opset_version=opset, external_data=False, verbose=False
    )
    return program.model_proto


def _torchscript(model: nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        _Positional(model, tuple(inputs)),
        tuple(inputs.values()),
        buffer,
        dynamo=False,
        opset_version=17,
        input_names=list(inputs),
        dynamic_axes={
            name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: f"{name}_tokens"} for name in inputs
        },
    )
    return onnx.load_from_string(buffer.getvalue())


def by_transformers(model: nn.Module, inputs: dict[str, torch.Tensor], **options: object) -> ir.Model:
    """As transformers' own exporter writes it; without options in its default way."""
    return OnnxExporter().export(model, dict(inputs), OnnxConfig(**options)).program
