"""How a detector is trained: settings only, so that they can be named without torch."""

from dataclasses import dataclass
from typing import Literal

Loss = Literal["contrastive", "logistic"]
"""Supervised contrastive, as in the paper; or binary cross-entropy on the score itself."""


@dataclass(frozen=True)
class Training:
    """How a detector is trained."""

    hidden: int = 128
    embedding: int = 16
    steps: int = 2000
    batch: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    temperature: float = 0.1
    noise: float = 0.3
    """Standard deviation of the Gaussian noise on standardised features: keeps the margin wide."""
