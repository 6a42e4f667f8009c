"""Models that do not come from torch's exporters alone."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import tokenizers
import torch
import transformers
from onnxruntime.transformers.optimizer import optimize_model

from atpatch_onnx.exporters.exporting import exporting
from samples.exported_model import BATCH, OPSET, Model

HEADS, WIDTH, LAYERS, TOKENS = 4, 64, 2, 16


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


def _keras(path: Path) -> str:
    """What tf2onnx makes of layers of keras; the process ends, and leaves TensorFlow behind."""
    script = f"""
import os
os.environ |= {{"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}}
import keras, tensorflow, tf2onnx
keras.utils.set_random_seed(0)
inputs = x = keras.Input(({TOKENS}, {WIDTH}))
for _ in range({LAYERS}):
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention({HEADS}, {WIDTH // HEADS})(x, x))
    x = x + keras.layers.Dense({WIDTH})(keras.layers.Dense({WIDTH}, activation="relu")(x))
model = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.GlobalAveragePooling1D()(x)))
asked = [tensorflow.TensorSpec([None, {TOKENS}, {WIDTH}], tensorflow.float32, name="tokens")]
run = tensorflow.function(lambda tokens: model(tokens, training=False), input_signature=asked)
tf2onnx.convert.from_function(run, input_signature=asked, opset={OPSET}, output_path={str(path)!r})
"""
    _in_a_process(["-c", script])
    return ""


def _jax(path: Path) -> str:
    """What jax2onnx makes of jax's own attention."""
    import jax
    from jax import numpy as jnp
    from jax2onnx import to_onnx

    rng = np.random.default_rng(0)
    names = ("q", "k", "v", "out")
    layers = [
        {name: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 8, jnp.float32) for name in names} for _ in range(LAYERS)
    ]

    def run(x: jax.Array) -> jax.Array:
        for layer in layers:
            q, k, v = ((x @ layer[name]).reshape(x.shape[0], TOKENS, HEADS, WIDTH // HEADS) for name in "qkv")
            x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ layer["out"]
        return x.mean(axis=1)

    onnx.save(to_onnx(run, [("samples", TOKENS, WIDTH)]), path)
    return ""


def _built(path: Path, *, precision: str) -> str:
    """What the model builder of onnxruntime-genai makes of a Llama."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "vocab_size": 40}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        saved, out = Path(folder) / "saved", Path(folder) / "out"
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(saved)
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{number}": number for number in range(40)}, "w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(saved)
        arguments = ["-i", saved, "-o", out, "-p", precision, "-e", "cpu", "-c", Path(folder) / "cache"]
        _in_a_process(["-m", "onnxruntime_genai.models.builder", *map(str, arguments)])
        onnx.save(onnx.load(out / "model.onnx"), path)
    return ""


def _in_a_process(arguments: list[str]) -> None:
    """Run Python, and raise what it said last where it fails."""
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(next(iter(done.stderr.strip().splitlines()[::-1]), "no message"))


MODELS = (
    Model("bert", "onnxruntime", {"optimizer": _optimized}, lambda: LAYERS),
    Model("MultiHeadAttention", "keras", {"tf2onnx": _keras}, lambda: LAYERS, ("keras", "tensorflow", "tf2onnx")),
    Model("dot_product_attention", "jax", {"jax2onnx": _jax}, lambda: LAYERS, ("jax", "jax2onnx")),
    Model(
        "llama",
        "onnxruntime-genai",
        {f"builder {precision}": partial(_built, precision=precision) for precision in ("fp32", "int4")},
        lambda: LAYERS,
        ("onnxruntime_genai",),
    ),
)
