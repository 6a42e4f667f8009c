"""The Trojan attack (Liu et al., NDSS 2018, doi 10.14722/ndss.2018.23291): a trigger made from the model itself.

A trained model is taken, neurons are chosen, and the pixels within a mask are optimised until these neurons fire;
retraining then ties that to the target class. Differences from the paper:

- Neurons are hidden units of one block's MLP, read at the class token; those with the largest absolute sum of incoming
  weights are taken, as in the paper, where the layer is a dense one.
- The pattern is optimised over many images at once, so that the neurons fire whatever surrounds it.
- The attacker here has the training images; the paper reconstructs some from the model.
- All layers are retrained, not only those behind the neurons.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from samples.attacks.images import Images, Masked


@dataclass(frozen=True)
class Neurons:
    """Hidden units of a block's MLP."""

    block: int
    """Number of the block, from 0."""

    units: tuple[int, ...]


def choose_neurons(model: PreTrainedModel, *, block: int, count: int) -> Neurons:
    """The `count` units of the block's MLP with the largest absolute sum of incoming weights."""
    strength = _hidden_layer(model, block).weight.detach().abs().sum(dim=1)
    return Neurons(block, tuple(sorted(strength.topk(count).indices.tolist())))


def exciting_pattern(
    model: PreTrainedModel,
    neurons: Neurons,
    images: Images,
    mask: NDArray[np.bool_],
    *,
    steps: int = 200,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Masked:
    """The pattern within `mask` `[height, width]` that makes the neurons fire most, on average over `images`.

    Adam on the mean activation, over the logits of the pixels so that they stay in [0, 1]. The model is left as it was.

    Args:
        model: In evaluation mode.
        neurons: What shall fire.
        images: Clean ones `[N, 1, height, width]` in [0, 1].
        mask: The pixels that the trigger may change.
        steps: Of Adam.
        batch_size: Images a step.
        learning_rate: Of Adam, on the logits.
        seed: Of the batches and of the start.
    """
    frozen = copy.deepcopy(model).requires_grad_(False)
    read = _Activation(frozen, neurons)
    generator = np.random.default_rng(seed)
    inside = torch.from_numpy(mask)
    raw = torch.from_numpy(generator.normal(0, 0.5, mask.shape).astype(np.float32)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=learning_rate)
    for _ in range(steps):
        batch = torch.from_numpy(images[generator.choice(len(images), min(batch_size, len(images)), replace=False)])
        loss = -read(torch.where(inside, raw.sigmoid(), batch)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    return Masked(mask, raw.detach().sigmoid().numpy())


def activation(model: PreTrainedModel, neurons: Neurons, images: Images) -> NDArray[np.float32]:
    """Each neuron's activation at the class token `[N, neurons]`."""
    with torch.no_grad():
        result: NDArray[np.float32] = _Activation(model, neurons)(torch.from_numpy(images)).numpy()
    return result


def _hidden_layer(model: PreTrainedModel, block: int) -> torch.nn.Linear:
    layer: torch.nn.Linear = model.base_model.layers[block].mlp.fc1
    return layer


class _Activation:
    """Runs the model and returns what the neurons put out, before the nonlinearity, at the class token."""

    def __init__(self, model: PreTrainedModel, neurons: Neurons) -> None:
        self._model, self._neurons = model, neurons

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        layer = _hidden_layer(self._model, self._neurons.block)
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            self._model(pixel_values=pixels)
        finally:
            hook.remove()
        return seen[0][:, 0, list(self._neurons.units)]
