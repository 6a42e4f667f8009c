"""The smallest trigger for a class: Neural Cleanse (Wang et al., IEEE S&P 2019, sections 3 and 4).

For a class t, a mask `m` and a pattern `d` that turn every input `x` into one of that class:

    minimise  cross-entropy(f((1 - m) x + m d), t) + lambda |m|_1
    with      m = (tanh(u) + 1) / 2,  d likewise, within the bounds

with `lambda` raised while the success rate is met and lowered while it is not, as in the authors' implementation. The
smallest mask on the way that met it is the result. A class that a backdoor leads to needs a far smaller one.

We differ from the paper in five ways: inputs that the model puts into the class anyway are left out, since they say
nothing; `lambda` is adapted by batches instead of by thousands of inputs, so that a hundred inputs suffice; every class
gets several starts, for images also one in each of nine tiles, and after a few steps the best of them go on; faint
values of the mask are dropped in the end; and a class that no mask was found for counts as if its mask covered the
whole input.

Tiles are there because a mask over a whole image can miss a trigger of a few pixels: other pixels that help a little
drown its gradient. In the tile where it lies it is found; in other tiles the class needs a large mask, or has none.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.discovery.network import all_logits, logits_of
from atpatch_onnx.errors import InversionError, check_at_least, check_options

CUTS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Mask values below the first of these that the success rate bears are dropped.

What the descent leaves nearly everywhere changes every token a little, so that all of them would look like the trigger.
"""


@dataclass(frozen=True)
class InversionOptions:
    """How a mask and a pattern are searched for."""

    steps: int = 60
    """Of each start."""

    batch_size: int = 32
    learning_rate: float = 0.3
    """Of Adam, with the moments 0.5 and 0.9 as in the authors' implementation."""

    success: float = 0.99
    """Share of a batch that must reach the class."""

    weight: float = 1e-3
    """`lambda` at the start."""

    factor: float = 1.5
    """By which `lambda` is raised; it is lowered by this to the power of 1.5."""

    patience: int = 5
    """Steps in a row above, or below, the success rate before `lambda` is raised, or lowered."""

    starts: int = 2
    """Random starts over the whole input, for each class: some end in a mask that is small, but not the smallest."""

    scan: int = 20
    """Steps after which only the best starts go on."""

    kept: int = 2
    """How many these are."""

    def __post_init__(self) -> None:
        check_at_least(self, InversionError, steps=1, batch_size=1, patience=1, starts=1, scan=1, kept=1)
        check_options(
            self,
            InversionError,
            learning_rate=(self.learning_rate > 0, "above 0"),
            success=(0 < self.success <= 1, "a share above 0"),
            weight=(self.weight > 0, "above 0"),
            factor=(self.factor > 1, "above 1"),
        )


@dataclass(frozen=True, eq=False)
class Task:
    """One class, and inputs that the model does not put into it."""

    model: nn.Module
    inputs: Tensor
    target: int
    bounds: tuple[float, float]
    options: InversionOptions

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an input."""
        return tuple(self.inputs.shape[1:])

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The mask's own shape: one for all channels of an image `[channels, height, width]`."""
        return (1, *self.shape[1:]) if len(self.shape) == 3 else self.shape

    def turned(self, mask: Tensor, pattern: Tensor) -> Tensor:
        """Which inputs a trigger turns, bool `[inputs]`."""
        stamped = (1 - mask) * self.inputs + mask * pattern
        return all_logits(self.model, stamped, self.options.batch_size).argmax(dim=1) == self.target


def smallest(task: Task, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest mask of all starts, its pattern, both of an input's shape, and which inputs they turn `[inputs]`."""
    generator, options = torch.Generator().manual_seed(seed * 1_000_003 + task.target), task.options
    places = [*tiles(task.shape), *[torch.ones(task.mask_shape)] * options.starts]
    descents = [Descent(task, place, generator) for place in places]
    for descent in descents:
        descent.advance(min(options.scan, options.steps))
    best = sorted(descents, key=Descent.promise)[: options.kept]
    for descent in best:
        descent.advance(options.steps - min(options.scan, options.steps))
    chosen = min(best, key=Descent.promise)
    mask, reached = _pruned(task, chosen)
    return mask.expand(task.shape), chosen.pattern, reached


def tiles(shape: tuple[int, ...]) -> list[Tensor]:
    """Ones where a mask may lie: overlapping tiles of half an image's height and width, a quarter apart.

    Three by three of them, fewer for an image of a few pixels, none for inputs that are no images.
    """
    if len(shape) != 3:
        return []
    _, height, width = shape
    rows, columns = _spans(height), _spans(width)
    tiles = [torch.zeros(1, height, width) for _ in range(len(rows) * len(columns))]
    for tile, (row, column) in zip(tiles, product(rows, columns), strict=True):
        tile[:, row, column] = 1
    return tiles


def _spans(size: int) -> list[slice]:
    half = (size + 1) // 2
    return [slice(start, start + half) for start in sorted({0, (size - half) // 2, size - half})]


def _pruned(task: Task, best: "Descent") -> tuple[Tensor, Tensor]:
    """The mask without its faint values, as many as the success does not need; and which inputs it turns `[inputs]`."""
    reached = task.turned(best.mask, best.pattern)
    for cut in CUTS:
        fewer = torch.where(best.mask < cut, 0.0, best.mask)
        still_turned = task.turned(fewer, best.pattern)
        if still_turned.sum() >= reached.sum() - len(task.inputs) * (1 - task.options.success):
            return fewer, still_turned
    return best.mask, reached


class Descent:
    """One start, and the smallest mask on its way so far that met the success rate."""

    def __init__(self, task: Task, place: Tensor, generator: torch.Generator) -> None:
        """Start at random; the mask stays within `place`, ones and zeros of the mask's shape."""
        self._task, self._place, self._generator = task, place, generator
        self._mask = torch.empty(task.mask_shape).normal_(0.0, 0.1, generator=generator).requires_grad_()
        self._pattern = torch.empty(task.shape).normal_(0.0, 0.5, generator=generator).requires_grad_()
        free, moments = [self._mask, self._pattern], (0.5, 0.9)
        self._optimizer = torch.optim.Adam(free, lr=task.options.learning_rate, betas=moments)
        self._weight, self._streak = task.options.weight, 0
        self._reached = 0.0
        self.least = float("inf")
        """Norm of the mask; infinite where none met the success rate yet, and mask and pattern are the last."""
        self.mask, self.pattern = (value.detach() for value in self._bounded())

    def promise(self) -> tuple[float, float]:
        """The smaller, the better: the norm, and where none succeeded the share of inputs that the last mask turned."""
        return self.least, -self._reached

    def advance(self, steps: int) -> None:
        """Go on for some steps."""
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        task = self._task
        mask, pattern = self._bounded()
        chosen = torch.randperm(len(task.inputs), generator=self._generator)[: task.options.batch_size]
        batch = task.inputs[chosen]
        logits = logits_of(task.model((1 - mask) * batch + mask * pattern))
        labels = torch.full((len(batch),), task.target)
        self._reached = float((logits.argmax(dim=1) == labels).float().mean())
        norm = float(mask.detach().sum())
        met = self._reached >= task.options.success
        if self.least == float("inf") or (met and norm < self.least):
            self.mask, self.pattern = mask.detach(), pattern.detach()
            self.least = norm if met else self.least
        loss = functional.cross_entropy(logits, labels) + self._weight * mask.sum()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._adapt(met)

    def _adapt(self, met: bool) -> None:
        """Raise `lambda` after some batches in a row that met the success rate, lower it after some that did not."""
        self._streak = max(self._streak, 0) + 1 if met else min(self._streak, 0) - 1
        if abs(self._streak) >= self._task.options.patience:
            factor, self._streak = self._task.options.factor, 0
            self._weight = self._weight * factor if met else self._weight / factor**1.5

    def _bounded(self) -> tuple[Tensor, Tensor]:
        return _bounded(self._mask, (0.0, 1.0)) * self._place, _bounded(self._pattern, self._task.bounds)


def _bounded(free: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return low + (high - low) * (torch.tanh(free) + 1) / 2
