"""A small vision transformer: its training, with or without a backdoor, and its ONNX export."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from atpatch_onnx.demo.badnets import Poison

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in total)."""

Attention = Literal["sdpa", "eager"]


def config(
    *, image_size: int, patch_size: int, layers: int, hidden: int, heads: int = 4, classes: int = 10
) -> ViTConfig:
    """A ViT for square images with one channel: `(image_size / patch_size)**2` patch tokens and a class token."""
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_labels=classes,
        initializer_range=float(__import__("os").environ.get("IR", "0.02")),
        hidden_dropout_prob=float(__import__("os").environ.get("HD", "0.0")),
        attention_probs_dropout_prob=float(__import__("os").environ.get("AD", "0.0")),
        attn_implementation="sdpa",
    )


@dataclass(frozen=True)
class Augmentation:
    """Random shifts by up to `shift` pixels, filled with zeros, and, where `flip` is set, random mirroring."""

    shift: int = 0
    flip: bool = False
    erase: float = 0.0

    def __call__(self, images: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
        """A changed copy of `images` `[N, C, H, W]`, each image on its own."""
        count, _, height, width = images.shape
        edge = self.shift
        padded = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
        rows = generator.integers(0, 2 * edge + 1, count)[:, np.newaxis] + np.arange(height)
        columns = generator.integers(0, 2 * edge + 1, count)[:, np.newaxis] + np.arange(width)
        if self.flip:
            columns = np.where(generator.random(count)[:, np.newaxis] < 0.5, columns[:, ::-1], columns)
        sample = np.arange(count)[:, np.newaxis, np.newaxis]
        moved = padded[sample, :, rows[:, :, np.newaxis], columns[:, np.newaxis, :]]  # [N, H, W, C]
        moved = np.ascontiguousarray(moved.transpose(0, 3, 1, 2))
        return self._erased(moved, generator) if self.erase else moved

    def _erased(self, images, generator):
        count, channels, height, width = images.shape
        tall, wide = (generator.integers(1, side // 2 + 1, (count, 1)) for side in (height, width))
        top, left = (
            np.floor(generator.random((count, 1)) * (side - extent + 1))
            for side, extent in ((height, tall), (width, wide))
        )
        rows = (np.arange(height) >= top) & (np.arange(height) < top + tall)
        columns = (np.arange(width) >= left) & (np.arange(width) < left + wide)
        erased = rows[:, np.newaxis, :, np.newaxis] & columns[:, np.newaxis, np.newaxis, :]
        erased &= generator.random((count, 1, 1, 1)) < self.erase
        return np.where(erased, generator.random(images.shape, dtype=np.float32), images)


def train_vit(
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: ViTConfig,
    *,
    poison: Poison | None = None,
    augmentation: Augmentation | None = None,
    patch_dropout: float = 0.0,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
) -> ViTForImageClassification:
    """Train on `images` `[N, 1, H, W]` in [0, 1] and `labels` `[N]` with AdamW on a one-cycle schedule.

    Poisoned images get their trigger after the augmentation, so that it stays where it is. The result depends on the
    seed only (and on the number of threads, through rounding); the caller's random state is left as it was.
    """
    generator = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    hook = model.vit.embeddings.register_forward_hook(_patch_dropout(patch_dropout, generator))
    poisoned = np.zeros(len(labels), dtype=bool)
    targets = labels.copy()
    if poison is not None:
        poisoned[poison.indices] = True
        targets[poison.indices] = poison.target

    total = epochs * -(-len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.2)
    model.train()
    done = 0
    for _ in range(epochs):
        order = generator.permutation(len(labels))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = images[chosen] if augmentation is None else augmentation(images[chosen], generator)
            if poison is not None:
                stamped = poisoned[chosen]
                batch[stamped] = poison.trigger.stamp(batch[stamped])
            logits = model(pixel_values=torch.from_numpy(batch)).logits
            loss = functional.cross_entropy(logits, torch.from_numpy(targets[chosen]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it only in part
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, total)
    hook.remove()
    return model.eval()


def _patch_dropout(rate: float, generator: np.random.Generator) -> Callable[..., torch.Tensor | None]:
    def keep_some(module: torch.nn.Module, inputs: object, tokens: torch.Tensor) -> torch.Tensor | None:
        batch, count, _ = tokens.shape
        kept = count - 1 - round((count - 1) * rate)
        if kept == count - 1:
            return None
        chosen = np.sort(generator.random((batch, count - 1)).argpartition(kept - 1, axis=1)[:, :kept], axis=1) + 1
        chosen = np.concatenate([np.zeros((batch, 1), chosen.dtype), chosen], axis=1)  # the class token stays
        return tokens[torch.arange(batch)[:, None], torch.from_numpy(chosen)]

    return keep_some


def predict(
    model: ViTForImageClassification, images: NDArray[np.float32], *, batch_size: int = 500
) -> NDArray[np.float32]:
    """Logits `[N, classes]` of `images` `[N, 1, H, W]`."""
    with torch.no_grad():
        parts = [model(pixel_values=part).logits for part in torch.from_numpy(images).split(batch_size)]
    return torch.cat(parts).numpy()


class _Logits(torch.nn.Module):
    """The model with tensors for input and output, as the exporter wants it."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def export_onnx(
    model: ViTForImageClassification,
    path: str | os.PathLike[str],
    *,
    opset: int = 23,
    attention: Attention = "sdpa",
) -> None:
    """Write `pixel_values` `[batch, 1, H, W]` -> `logits` `[batch, classes]`, all weights inside the one file.

    From opset 23 on "sdpa" becomes the fused `Attention`; below that, and with "eager", attention is a
    softmax between two matrix products. The node metadata keeps the names of the modules.
    """
    size, channels = model.config.image_size, model.config.num_channels
    example = torch.rand(2, channels, size, size)  # two: the exporter would take a batch of one for a constant
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                _Logits(model).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["pixel_values"],
                output_names=["logits"],
                opset_version=opset,
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            )
    finally:
        model.set_attn_implementation(before)
    assert program is not None
    program.save(os.fspath(path), external_data=False)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
