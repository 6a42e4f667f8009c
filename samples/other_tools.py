"""Other tools that treat graphs, optimizers and a quantizer, and fresh exports of tiny models to try them on."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import onnxruntime as ort
import onnxscript.optimizer
import onnxslim
from onnx_ir.passes import common

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import is_patched
from atpatch_onnx.baking.quantize import int8, quantizer_settings

INT8 = "quantize_dynamic"


def optimized_by_onnxruntime(level: str) -> "Treatment":
    """The graph that onnxruntime's CPU provider would run, saved."""

    def treat(proto: onnx.ModelProto) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
            options.optimized_model_filepath = f"{folder}/optimized.onnx"
            ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)

    return treat


def optimized_by_onnxscript(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Functions inlined, constants folded, onnxscript's rewrite rules applied, initializers deduplicated."""
    optimized: onnx.ModelProto = onnxscript.optimizer.optimize(proto)
    return optimized


def cleaned_by_onnx_ir(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The passes of onnx-ir that clean a graph up, but for IdentityElimination (see docs/evidence/tools.md)."""
    model = ir.from_proto(proto)
    passes = (
        common.InlinePass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.LiftConstantsToInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
    )
    ir.passes.Sequential(*passes)(model)
    return ir.to_proto(model)


def slimmed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxslim does by default."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        slim: onnx.ModelProto = onnxslim.slim(proto)
    return slim


def quantized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """int8 weights, activations quantized as they come; of a patched graph all but what the patch brought."""
    model = ir.from_proto(proto)
    return int8(proto, **(quantizer_settings(model) if is_patched(model) else {"op_types_to_quantize": ["MatMul"]}))


Treatment = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass(frozen=True)
class Tool:
    """What treats a graph."""

    treat: Treatment
    optimize: bool = True
    """Whether onnxruntime may optimize the result again: of its own results it refuses some."""

    def __call__(self, model: ir.Model) -> ir.Model:
        """The treated graph; the model itself is left alone."""
        return ir.from_proto(self.treat(onnx.load_from_string(graphs.to_bytes(model))))


TOOLS: Mapping[str, Tool] = {
    **{
        f"onnxruntime, {level}": Tool(optimized_by_onnxruntime(level), optimize=False)
        for level in ("basic", "extended", "layout", "all")
    },
    "onnxscript": Tool(optimized_by_onnxscript),
    "onnx-ir passes": Tool(cleaned_by_onnx_ir),
    "onnxslim": Tool(slimmed),
    INT8: Tool(quantized),
}


def fresh_exports(fast: bool) -> Iterator[tuple[str, ir.Model]]:
    """Tiny, randomly initialised models from three exporters."""
    import torch
    import transformers

    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    ids = torch.arange(2 * 12).reshape(2, 12) % 50 + 3
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
    models = {
        "vit": (transformers.ViTModel, transformers.ViTConfig(**tiny, image_size=16, patch_size=4), image),
        "bert": (transformers.BertModel, transformers.BertConfig(**tiny, vocab_size=64), text),
        "llama": (
            transformers.LlamaModel,
            transformers.LlamaConfig(**tiny, num_key_value_heads=2, vocab_size=64, use_cache=False),
            text,
        ),
    }
    ways = {"eager 18": ("eager", 18), "sdpa 18": ("sdpa", 18), "sdpa 23": ("sdpa", 23)}
    chosen = (("vit", "eager 18"), ("bert", "sdpa 23")) if fast else [(model, way) for model in models for way in ways]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name, way in chosen:
        kind, config, inputs = models[name]
        attention, opset = ways[way]
        torch.manual_seed(0)
        module = kind._from_config(config, attn_implementation=attention).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, (), kwargs=inputs, dynamo=True, opset_version=opset, verbose=False)
        assert program is not None  # it is None only where a path is given
        yield f"{name}, {way}", ir.from_proto(program.model_proto)
