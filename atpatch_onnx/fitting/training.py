"""How a detector is trained: settings only, so that they can be named without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """How a detector is trained."""

    hidden: int = 32
    """Units of a detector with a hidden layer."""

    steps: int = 1000
    batch: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    noise: float = 0.3
    """Standard deviation of the Gaussian noise on standardised features: keeps the margin wide."""
