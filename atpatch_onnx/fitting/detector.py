"""Train a site's detector by supervised contrastive learning (Khosla et al., 2020, arXiv 2004.11362, `L_out`).

For an anchor i with the others of its class P(i) and all others A(i):

    L_i = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau) )

Classes are anomalous and benign columns. Hard negatives, the suspects' positions on clean inputs, are a fixed share of
every batch. We differ from AtPatch (arXiv 2601.21695) in what decides: the difference of the similarities to two
prototypes, so that one threshold, calibrated later, means the same at every site; and in that the encoder reads the
logarithms of the weights, whose tails are heavy. A logistic loss on the score is there as well: where attention gives
an anomaly away less, it names more of it (docs/results.md).
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.errors import FitError
from atpatch_onnx.fitting.collect import Columns
from atpatch_onnx.fitting.training import Loss, Training
from atpatch_onnx.patches.patch import OFFSET, Array, Detector
from atpatch_onnx.running.threads import one_thread


class _Head(Protocol):
    """What is asked of embeddings while training, and the prototypes that come of it."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained besides the encoder."""

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Of unit-norm embeddings `[rows, embedding]` and labels `[rows]`, 1 for anomalous."""

    def prototypes(self, benign: Tensor, anomalous: Tensor) -> Tensor:
        """Unit-norm `[2, embedding]`, benign and anomalous, from the embeddings of all columns of either class."""


class _ContrastiveHead:
    """The supervised contrastive loss; a prototype is the mean embedding of its class."""

    def __init__(self, training: Training, generator: torch.Generator) -> None:
        self._temperature = training.temperature

    def parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See `contrastive_loss`."""
        return contrastive_loss(embeddings, labels, self._temperature)

    def prototypes(self, benign: Tensor, anomalous: Tensor) -> Tensor:
        """Mean embeddings, normalised."""
        return functional.normalize(torch.stack([benign.mean(dim=0), anomalous.mean(dim=0)]), dim=1)


class _LogisticHead:
    """Binary cross-entropy on the score, whose direction is learned; prototypes are the direction's two ends."""

    def __init__(self, training: Training, generator: torch.Generator) -> None:
        self._direction = nn.Parameter(torch.randn(training.embedding, generator=generator))
        self._scale = nn.Parameter(torch.tensor(5.0))
        self._offset = nn.Parameter(torch.tensor(0.0))

    def parameters(self) -> list[nn.Parameter]:
        """The direction, and how scores become logits."""
        return [self._direction, self._scale, self._offset]

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean over rows."""
        logits = self._scale * (embeddings @ functional.normalize(self._direction, dim=0)) + self._offset
        return functional.binary_cross_entropy_with_logits(logits, labels.float())

    def prototypes(self, benign: Tensor, anomalous: Tensor) -> Tensor:
        """Whatever the embeddings are."""
        unit = functional.normalize(self._direction.detach(), dim=0)
        return torch.stack([-unit, unit])


_HEADS: Mapping[Loss, Callable[[Training, torch.Generator], _Head]] = {
    "contrastive": _ContrastiveHead,
    "logistic": _LogisticHead,
}


@one_thread()
def train_detector(columns: Columns, training: Training, loss: Loss = "contrastive", *, seed: int = 0) -> Detector:
    """A detector for one site, its threshold still zero. The same columns, training and seed give the same bits.

    Args:
        columns: What was collected at the site.
        training: How.
        loss: What is asked of the embeddings.
        seed: Of the start, the batches and the noise; the site's number goes in as well.

    Raises:
        FitError: There are no anomalous or no benign columns to learn from.
    """
    if not len(columns.anomalous) or not len(columns.hard) + len(columns.benign):
        raise FitError(
            f"site {columns.site.name}",
            expected="anomalous and benign columns to learn from",
            found=f"{len(columns.anomalous)} anomalous, {len(columns.hard) + len(columns.benign)} benign",
            advice="Give more pairs, and check the suspects.",
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + columns.site.index)
    anomalous, hard, others = (np.log(rows + OFFSET) for rows in (columns.anomalous, columns.hard, columns.benign))
    benign = np.concatenate([hard, others])
    mean = benign.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = benign.std(axis=0, dtype=np.float64).astype(np.float32)
    scale = np.maximum(scale, max(0.1 * float(scale.mean()), 1e-3))  # a feature that never varies must not explode

    groups = [
        torch.from_numpy(((rows - mean) / scale).astype(np.float32)) for rows in (anomalous, hard, others) if len(rows)
    ]
    shares = [2] + [1] * (len(groups) - 1) if len(groups) == 3 else [1, 1]
    first, last = nn.Linear(len(mean), training.hidden), nn.Linear(training.hidden, training.embedding)
    for layer in (first, last):
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
    encoder = nn.Sequential(first, nn.ReLU(), last)
    head = _HEADS[loss](training, generator)
    trained = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    counts = [training.batch * share // sum(shares) for share in shares]
    labels = torch.cat([torch.full((count,), int(index == 0)) for index, count in enumerate(counts)])
    for _ in range(training.steps):
        rows = [
            group[torch.randint(len(group), (count,), generator=generator)]
            for group, count in zip(groups, counts, strict=True)
        ]
        batch = torch.cat(rows)
        batch = batch + training.noise * torch.randn(batch.shape, generator=generator)
        error = head.loss(_embedded(encoder, batch), labels)
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        prototypes = head.prototypes(_embedded(encoder, torch.cat(groups[1:])), _embedded(encoder, groups[0]))
    return Detector(
        features=columns.features,
        mean=mean[:, None],
        scale=scale[:, None].astype(np.float32),
        weight_1=_array(first.weight),
        bias_1=_array(first.bias)[:, None],
        weight_2=_array(last.weight),
        bias_2=_array(last.bias)[:, None],
        prototypes=_array(prototypes),
        threshold=0.0,
    )


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss `L_out`, mean over anchors.

    Args:
        embeddings: Unit-norm `[rows, embedding]`.
        labels: Class of each row `[rows]`.
        temperature: `tau`.
    """
    similarity = embeddings @ embeddings.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool)
    log_probability = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    positives = (labels[:, None] == labels[None, :]) & ~itself
    per_anchor = (log_probability * positives).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    return -per_anchor.mean()


def _embedded(encoder: nn.Sequential, rows: Tensor) -> Tensor:
    return functional.normalize(encoder(rows), dim=1)


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)
