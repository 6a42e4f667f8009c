"""Train a site's detector: logistic regression on the keys of tokens, linear or with one hidden layer.

Hard negatives, the suspects' positions on clean inputs, are a fixed share of every batch. Keys are standardised by
those of benign tokens while training; that is folded into the weights, so that a detector reads keys as they are. We
differ from AtPatch (arXiv 2601.21695), whose detector reads columns of the map by contrastive learning: a column is
what all queries make of one key, and the first layer here is a set of learned queries.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.errors import FitError
from atpatch_onnx.fitting.collect import Tokens
from atpatch_onnx.fitting.options import Training
from atpatch_onnx.patches.patch import Array, Detector
from atpatch_onnx.running.threads import one_thread

_FLOOR = 0.1
"""Smallest standard deviation of a feature, as a share of the mean one: what never varies must not explode."""


@one_thread()
def train_detector(tokens: Tokens, training: Training, *, hidden: bool, seed: int = 0) -> Detector:
    """A detector for one site, its threshold still zero. The same tokens, training and seed give the same bits.

    Args:
        tokens: What was collected at the site.
        training: How.
        hidden: Whether it has a hidden layer.
        seed: Of the start, the batches and the noise; the site's number goes in as well.

    Raises:
        FitError: There are no anomalous or no benign tokens to learn from.
    """
    if not len(tokens.anomalous) or not len(tokens.hard) + len(tokens.benign):
        raise FitError(
            f"site {tokens.site.name}",
            expected="anomalous and benign tokens to learn from",
            found=f"{len(tokens.anomalous)} anomalous, {len(tokens.hard) + len(tokens.benign)} benign",
            advice="Give more pairs, and check the suspects.",
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + tokens.site.index)
    benign = np.concatenate([tokens.hard, tokens.benign])
    mean, scale = benign.mean(axis=0, dtype=np.float64), benign.std(axis=0, dtype=np.float64)
    scale = np.maximum(scale, max(_FLOOR * float(scale.mean()), 1e-6))
    kinds = [rows for rows in (tokens.anomalous, tokens.hard, tokens.benign) if len(rows)]
    groups = [torch.from_numpy(((rows - mean) / scale).astype(np.float32)) for rows in kinds]
    layers = _layers(len(mean), training.hidden if hidden else None, generator)
    _train(layers, groups, training, generator)
    return _folded(layers, mean, scale)


def _layers(features: int, hidden: int | None, generator: torch.Generator) -> nn.Sequential:
    sizes = [features, 1] if hidden is None else [features, hidden, 1]
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layer = nn.Linear(size, following)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _train(layers: nn.Sequential, groups: list[Tensor], training: Training, generator: torch.Generator) -> None:
    """Binary cross-entropy over batches, half of them anomalous tokens (the first group), half benign ones."""
    shares = [2] + [1] * (len(groups) - 1) if len(groups) == 3 else [1, 1]
    counts = [training.batch * share // sum(shares) for share in shares]
    labels = torch.cat([torch.full((count,), float(index == 0)) for index, count in enumerate(counts)])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for _ in range(training.steps):
        batch = torch.cat(
            [
                group[torch.randint(len(group), (count,), generator=generator)]
                for group, count in zip(groups, counts, strict=True)
            ]
        )
        batch = batch + training.noise * torch.randn(batch.shape, generator=generator)
        error = functional.binary_cross_entropy_with_logits(layers(batch)[:, 0], labels)
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()


def _folded(layers: nn.Sequential, mean: np.ndarray, scale: np.ndarray) -> Detector:
    """The detector for keys that are not standardised.

    `W (k - mean) / scale + b = (W / scale) k + (b - W mean / scale)`. What is added to all scores alike is left out:
    thresholds are calibrated later.
    """
    first = layers[0]
    assert isinstance(first, nn.Linear)
    weights = first.weight.detach().numpy().astype(np.float64) / scale
    bias = first.bias.detach().numpy().astype(np.float64) - weights @ mean
    if len(layers) == 1:
        return Detector(_array(weights.T), None, None, threshold=0.0)
    last = layers[2]
    assert isinstance(last, nn.Linear)
    return Detector(_array(weights.T), _array(bias), _array(last.weight.detach().numpy()[0]), threshold=0.0)


def _array(found: np.ndarray) -> Array:
    return np.ascontiguousarray(found, np.float32)
