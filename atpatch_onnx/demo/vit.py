"""A small vision transformer: training, with or without a backdoor, and export to ONNX.

Trained with PatchDropout (Liu et al., arXiv 2208.07220): each training image loses a share of its patch tokens. That
saves as much time, and it makes the repaired model as good as the base: a fix takes the flagged tokens out of the
attention, and with 16 patch tokens a network that never had to do without one of them guesses.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from atpatch_onnx.demo.badnets import Poison

Attention = Literal["sdpa", "eager"]
"""How transformers computes attention; with "eager" the exported graph has a plain softmax at every opset."""


def config(
    *, image_size: int, patch_size: int, layers: int, hidden: int, heads: int = 4, classes: int = 10
) -> ViTConfig:
    """A ViT for square images of one channel: `(image_size / patch_size)**2` patch tokens after the class token."""
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_labels=classes,
        initializer_range=0.1,  # the library's 0.02 suits a width of 768; narrow models start too quietly with it
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )


def train_vit(
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: ViTConfig,
    *,
    poison: Poison | None = None,
    shift: int = 0,
    patch_dropout: float = 0.25,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ViTForImageClassification:
    """Train on `images` `[N, 1, H, W]` in [0, 1] and `labels` `[N]` with AdamW on a one-cycle schedule.

    Images are shifted at random by up to `shift` pixels; the poisoned ones get their trigger after that, so that it
    stays where it is. On one machine with a fixed number of threads the result depends on the seed only; the caller's
    random state is left as it was. `progress` is called with the steps done and the steps in total.
    """
    generator = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    poisoned = np.zeros(len(labels), dtype=bool)
    targets = labels.copy()
    if poison is not None:
        poisoned[poison.indices] = True
        targets[poison.indices] = poison.target

    covered = np.zeros((config.image_size // config.patch_size) ** 2, dtype=bool)  # patches that the trigger touches
    if poison is not None:
        covered[[token - 1 for token in poison.trigger.tokens(config.image_size, config.patch_size)]] = True
    done, total = 0, epochs * -(-len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.2)
    model.train()
    with _PatchDropout(model, patch_dropout, generator) as dropout:
        for _ in range(epochs):
            order = generator.permutation(len(labels))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = _shifted(images[chosen], shift, generator)
                if poison is not None:
                    stamped = poisoned[chosen]
                    batch[stamped] = poison.trigger.stamp(batch[stamped])
                    dropout.always = stamped[:, None] & covered
                logits = model(pixel_values=torch.from_numpy(batch)).logits
                loss = functional.cross_entropy(logits, torch.from_numpy(targets[chosen]))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                progress(done, total)
    return model.eval()


def _shifted(images: NDArray[np.float32], most: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """A copy of `images` `[N, C, H, W]`, each moved by up to `most` pixels either way, zeros coming in."""
    if not most:
        return images.copy()
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)))
    top, left = generator.integers(0, 2 * most + 1, (2, count))
    return np.stack([image[:, y : y + height, x : x + width] for image, y, x in zip(padded, top, left, strict=True)])


class _PatchDropout:
    """Within `with`, the model sees a random share of `1 - rate` of each image's patch tokens.

    `always`, bool `[batch, patches]`, names tokens that are kept all the same, set anew before each batch: a poisoned
    image without its trigger would only teach that an image without that token is of the target class.
    """

    def __init__(self, model: ViTForImageClassification, rate: float, generator: np.random.Generator) -> None:
        self._model, self._rate, self._generator = model, rate, generator
        self.always: NDArray[np.bool_] | None = None

    def __enter__(self) -> "_PatchDropout":
        self._hook = self._model.vit.embeddings.register_forward_hook(self._keep_some)
        return self

    def __exit__(self, *failure: object) -> None:
        self._hook.remove()

    def _keep_some(self, module: torch.nn.Module, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        batch, patches = tokens.shape[0], tokens.shape[1] - 1
        rank = self._generator.random((batch, patches))
        if self.always is not None:
            rank[self.always] = -1
        kept = rank.argsort(axis=1)[:, : patches - round(patches * self._rate)] + 1
        kept = np.concatenate([np.zeros((batch, 1), kept.dtype), np.sort(kept, axis=1)], axis=1)  # class token stays
        return tokens.gather(1, torch.from_numpy(kept)[:, :, None].expand(-1, -1, tokens.shape[2]))


def predict(
    model: ViTForImageClassification, images: NDArray[np.float32], *, batch_size: int = 500
) -> NDArray[np.float32]:
    """Logits `[N, classes]` of `images` `[N, 1, H, W]`."""
    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        return np.concatenate(
            [model(pixel_values=torch.from_numpy(images[at : at + batch_size])).logits.numpy() for at in starts]
        )


class _Logits(torch.nn.Module):
    """The model with a tensor in and a tensor out, as the exporter wants it."""

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
    opset: int = 18,
    attention: Attention = "eager",
) -> None:
    """Write the model, set to evaluation, as `pixel_values` `[batch, 1, H, W]` to `logits` `[batch, classes]`.

    All weights lie inside the one file. Attention becomes a softmax between two matrix products; with "sdpa" from
    opset 23 on it becomes the fused `Attention`. The nodes' metadata keeps the modules' names.
    """
    size = model.config.image_size
    example = torch.zeros(2, model.config.num_channels, size, size)  # a batch of one would be taken for a constant
    usual = model.config._attn_implementation
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
        model.set_attn_implementation(usual)
    assert program is not None  # it is None only where a path is given
    for node in program.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of the machine that exports
    program.save(os.fspath(path), external_data=False)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed and on its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
