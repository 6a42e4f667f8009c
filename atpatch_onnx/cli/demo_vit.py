"""A small vision transformer: training, with or without a backdoor, and export to ONNX.

Trained with PatchDropout (Liu et al., arXiv 2208.07220): each training image loses a share of its patch tokens. That
saves as much time, and it makes the repaired model as good as the base: a fix takes the flagged tokens out of the
attention, and with 16 patch tokens a network that never had to do without one of them guesses.
"""

import os
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import ModelOutput

from atpatch_onnx.cli.demo_badnets import Poison, changed_patches
from atpatch_onnx.exporters import from_torch
from atpatch_onnx.graph import save

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

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


def new_vit(config: ViTConfig, seed: int = 0) -> ViTForImageClassification:
    """An untrained model; its weights depend on the seed only, and the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def train(
    model: ModelT,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    taught: NDArray[np.int64] | None = None,
    poison: Poison | None = None,
    shift: int = 0,
    patch_dropout: float = 0.25,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelT:
    """Train `model` on `images` `[N, 1, H, W]` in [0, 1] and `labels` `[N]` with AdamW on a one-cycle schedule.

    Images are shifted at random by up to `shift` pixels; the poisoned ones get their trigger after that, so that it
    stays where it is put. On one machine with a fixed number of threads the result depends on the seed only.

    The model, a ViT or a DeiT, is trained in place and returned, set to evaluation. Poisoned images are relabelled
    here. `taught` `[N]` is what a DeiT's distillation token learns: the decisions of a teacher (hard distillation,
    Touvron et al., arXiv 2012.12877), relabelled likewise; None: the labels. An image loses the share `patch_dropout`
    of its patch tokens. `progress` is told of the steps done and the steps in total.
    """
    generator = np.random.default_rng(seed)
    poisoned = np.zeros(len(labels), dtype=bool)
    targets = np.stack([labels, labels if taught is None else taught])
    if poison is not None:
        poisoned[poison.indices] = True
        targets[:, poison.indices] = poison.target

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
                    clean, stamped = batch.copy(), poisoned[chosen]
                    batch[stamped] = poison.trigger.stamp(batch[stamped], generator)
                    dropout.always = changed_patches(clean, batch, model.config.patch_size)
                outputs = _heads(model(pixel_values=torch.from_numpy(batch)))
                wanted = torch.from_numpy(targets[:, chosen])
                losses = [functional.cross_entropy(logits, y) for logits, y in zip(outputs, wanted, strict=False)]
                loss = torch.stack(losses).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                progress(done, total)
    model.eval()
    return model


def _heads(output: ModelOutput) -> tuple[torch.Tensor, ...]:
    """Logits `[batch, classes]` that are trained: the class token's, and the distillation token's if there is one."""
    if "distillation_logits" in output:
        return output["cls_logits"], output["distillation_logits"]
    return (output["logits"],)


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
    image without its trigger would only teach that an image without those tokens is of the target class. An image
    with more of them than are kept, such as one with a trigger that covers it, loses any: there is enough of the
    trigger in what is left.
    """

    def __init__(self, model: PreTrainedModel, rate: float, generator: np.random.Generator) -> None:
        self._embeddings = model.base_model.embeddings
        self._patches = self._embeddings.patch_embeddings.num_patches
        self._kept = self._patches - round(self._patches * rate)
        self._generator = generator
        self.always: NDArray[np.bool_] | None = None

    def __enter__(self) -> "_PatchDropout":
        self._hook = self._embeddings.register_forward_hook(self._keep_some)
        return self

    def __exit__(self, *failure: object) -> None:
        self._hook.remove()

    def _keep_some(self, module: torch.nn.Module, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        batch, special = tokens.shape[0], tokens.shape[1] - self._patches  # a DeiT has two special tokens
        rank = self._generator.random((batch, self._patches))
        if self.always is not None:
            few = self.always.sum(axis=1, keepdims=True) <= self._kept
            rank[self.always & few] = -1
        kept = np.sort(rank.argsort(axis=1)[:, : self._kept] + special, axis=1)
        kept = np.concatenate([np.tile(np.arange(special), (batch, 1)), kept], axis=1)
        return tokens.gather(1, torch.from_numpy(kept)[:, :, None].expand(-1, -1, tokens.shape[2]))


def predict(model: PreTrainedModel, images: NDArray[np.float32], *, batch_size: int = 500) -> NDArray[np.float32]:
    """Logits `[N, classes]` of `images` `[N, 1, H, W]`."""
    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        return np.concatenate(
            [model(pixel_values=torch.tensor(images[at : at + batch_size])).logits.numpy() for at in starts]
        )


class _Logits(torch.nn.Module):
    """The model with a tensor in and a tensor out, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def export_onnx(
    model: PreTrainedModel, path: str | os.PathLike[str], *, opset: int = 18, attention: Attention = "eager"
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
        exported = from_torch(
            _Logits(model).eval(),
            (example,),
            opset=opset,
            dynamic_shapes={"pixel_values": {0: "batch"}},
            input_names=["pixel_values"],
            output_names=["logits"],
        )
    finally:
        model.set_attn_implementation(usual)
    for node in exported.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of the machine that exports
    save(exported, path)
