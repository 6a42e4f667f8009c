"""The smallest trigger for each class: Neural Cleanse (Wang et al., IEEE S&P 2019, sections 3 and 4).

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.discovery.anomaly import FEWEST, OUTLIER, SMALL, anomaly_indices, outlier
from atpatch_onnx.discovery.network import all_logits, check_class, logits_of, still
from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array, Progress, silent

REACHED = 0.8
"""Share of the inputs below which a trigger does not do its work, however small it is."""


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
        checks = (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("success", 0 < self.success <= 1, "a share above 0"),
            ("weight", self.weight > 0, "above 0"),
            ("factor", self.factor > 1, "above 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("starts", self.starts >= 1, "at least 1"),
            ("scan", self.scan >= 1, "at least 1"),
            ("kept", self.kept >= 1, "at least 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                found = repr(getattr(self, name))
                raise InversionError(f"option {name}", expected=expected, found=found, advice="Choose another value.")


@dataclass(frozen=True, eq=False)
class InvertedTrigger:
    """What turns inputs into one class."""

    mask: NDArray[np.float32]
    """In [0, 1], of an input's shape; for images `[channels, height, width]`, one for all channels."""

    pattern: NDArray[np.float32]
    """Of an input's shape, within the bounds; meaningless where the mask is zero."""

    target: int
    success: Rate
    """Share of the inputs that reach the class, of those that the model puts into another."""

    @property
    def norm(self) -> float:
        """Sum of the mask: how many values the trigger takes."""
        return float(self.mask.sum(dtype=np.float64))

    def stamp(self, inputs: Array) -> Array:
        """A triggered copy of `inputs` `[n, ...]`, of the same dtype."""
        stamped: Array = ((1 - self.mask) * inputs + self.mask * self.pattern).astype(inputs.dtype)
        return stamped

    def on(self, name: str) -> Callable[[dict[str, Array]], Mapping[str, ArrayLike]]:
        """The trigger as `DebugSet.from_trigger` takes it, stamped on the model's input of this name."""
        return lambda inputs: {**inputs, name: self.stamp(inputs[name])}


@dataclass(frozen=True, eq=False)
class Inversion:
    """What was found for each class."""

    triggers: tuple[InvertedTrigger, ...]
    """One for each class that was looked at."""

    indices: NDArray[np.float64]
    """Anomaly index of each of them, positive where its mask is smaller than most `[triggers]`."""

    suspected: InvertedTrigger | None
    """That of the class that stands out, or of the only one that was asked for."""

    def trigger(self) -> InvertedTrigger:
        """The suspected one.

        Raises:
            InversionError: No class stands out; says how far each does.
        """
        if self.suspected is None:
            found = ", ".join(
                f"class {trigger.target}: {index:.1f} (mask {trigger.norm:.1f}, success {trigger.success.value:.0%})"
                for trigger, index in zip(self.triggers, self.indices, strict=True)
            )
            raise InversionError(
                "the inverted triggers",
                expected=f"a class of index above {OUTLIER:g} whose mask is at most {SMALL:g} of the median",
                found=found,
                advice="The model may have no backdoor, or no small one. Where you know its class, name it (target=).",
            )
        return self.suspected


def invert_trigger(
    model: nn.Module,
    inputs: ArrayLike,
    target: int | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    options: InversionOptions | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Inversion:
    """Search the smallest trigger for every class, and the class that stands out. Same arguments, same result.

    Args:
        model: From floats `[batch, ...]` to logits `[batch, classes]`, or to an output that has them as `.logits`. Its
            weights and its mode are left as they were.
        inputs: Clean inputs `[n, ...]`; a hundred of various classes do. No labels are needed.
        target: The only class to look at; None: all of them.
        bounds: Least and largest value of an input.
        options: How; the defaults suit small images.
        seed: Of the start and of the batches.
        progress: Told after every class.

    Raises:
        InversionError: Inputs, bounds, class or model do not fit, or the model puts every input into one class.
    """
    options = options or InversionOptions()
    values = _checked(inputs, bounds)
    with still(model):
        X = torch.from_numpy(values)
        logits = all_logits(model, X, options.batch_size)
        usual, classes = logits.argmax(dim=1), logits.shape[1]
        if target is None and classes < FEWEST:
            raise InversionError(
                "target",
                expected=f"a class, since {classes} classes are too few for one to stand out",
                found="none",
                advice="Name it (target=), or invert each class and compare the norms yourself.",
            )
        wanted = range(classes) if target is None else [check_class(target, classes)]
        triggers = []
        for done, label in enumerate(wanted, 1):
            others = X[usual != label]
            if not len(others):
                raise InversionError(
                    "inputs",
                    expected=f"some that the model does not put into class {label}",
                    found=f"all {len(X)} of them in it",
                    advice="Give inputs of various classes.",
                )
            triggers.append(_smallest(model, others, label, bounds, options, seed))
            progress("inverting triggers", done, len(wanted))
    norms = [trigger.norm if trigger.success.value >= REACHED else trigger.mask.size for trigger in triggers]
    found = outlier(norms) if target is None else 0
    return Inversion(tuple(triggers), anomaly_indices(norms), None if found is None else triggers[found])


def _checked(inputs: ArrayLike, bounds: tuple[float, float]) -> NDArray[np.float32]:
    values = np.array(inputs, np.float32)
    low, high = bounds
    if values.ndim < 2 or not len(values) or not np.isfinite(values).all():
        raise InversionError(
            "inputs",
            expected="finite numbers [n, ...], at least one input",
            found=f"shape {list(values.shape)}" + ("" if np.isfinite(values).all() else " with NaN or infinity"),
            advice="Give inputs as the model takes them, preprocessed.",
        )
    if not low < high or values.min() < low or values.max() > high:
        raise InversionError(
            "bounds",
            expected=f"the least and the largest value of an input, {values.min():g} and {values.max():g} or beyond",
            found=f"{low:g} and {high:g}",
            advice="Give the bounds of preprocessed inputs, such as (-1, 1).",
        )
    return values


def _smallest(
    model: nn.Module, inputs: Tensor, target: int, bounds: tuple[float, float], options: InversionOptions, seed: int
) -> InvertedTrigger:
    """The smallest mask of all starts, and its pattern."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + target)
    shape = tuple(inputs.shape[1:])
    places = [*_tiles(shape), *[torch.ones(_mask_shape(shape))] * options.starts]
    descents = [_Descent(model, inputs, target, bounds, options, place, generator) for place in places]
    for descent in descents:
        descent.advance(min(options.scan, options.steps))
    best = sorted(descents, key=_Descent.promise)[: options.kept]
    for descent in best:
        descent.advance(options.steps - min(options.scan, options.steps))
    smallest = min(best, key=_Descent.promise)
    mask, reached = _pruned(model, inputs, smallest, target, options)
    return InvertedTrigger(
        mask.expand(shape).numpy().copy(), smallest.pattern.numpy(), target, Rate.of(reached.numpy())
    )


def _tiles(shape: tuple[int, ...]) -> list[Tensor]:
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


def _pruned(
    model: nn.Module, inputs: Tensor, best: "_Descent", target: int, options: InversionOptions
) -> tuple[Tensor, Tensor]:
    """The mask without its faint values, as many as the success does not need; and which inputs it turns `[inputs]`."""

    def turned(mask: Tensor) -> Tensor:
        stamped = (1 - mask) * inputs + mask * best.pattern
        return all_logits(model, stamped, options.batch_size).argmax(dim=1) == target

    reached = turned(best.mask)
    for cut in CUTS:
        fewer = torch.where(best.mask < cut, 0.0, best.mask)
        still_turned = turned(fewer)
        if still_turned.sum() >= reached.sum() - len(inputs) * (1 - options.success):
            return fewer, still_turned
    return best.mask, reached


class _Descent:
    """One start, and the smallest mask on its way so far that met the success rate."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        target: int,
        bounds: tuple[float, float],
        options: InversionOptions,
        place: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Start at random; the mask stays within `place`, ones and zeros of the mask's shape."""
        self._model, self._inputs, self._target, self._bounds = model, inputs, target, bounds
        self._options, self._place, self._generator = options, place, generator
        shape = tuple(inputs.shape[1:])
        self._mask = torch.empty(_mask_shape(shape)).normal_(0.0, 0.1, generator=generator).requires_grad_()
        self._pattern = torch.empty(shape).normal_(0.0, 0.5, generator=generator).requires_grad_()
        free, moments = [self._mask, self._pattern], (0.5, 0.9)
        self._optimizer = torch.optim.Adam(free, lr=options.learning_rate, betas=moments)
        self._weight = _Weight(options)
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
        mask, pattern = self._bounded()
        chosen = torch.randperm(len(self._inputs), generator=self._generator)[: self._options.batch_size]
        batch = self._inputs[chosen]
        logits = logits_of(self._model((1 - mask) * batch + mask * pattern))
        labels = torch.full((len(batch),), self._target)
        self._reached = float((logits.argmax(dim=1) == labels).float().mean())
        norm = float(mask.detach().sum())
        met = self._reached >= self._options.success
        if self.least == float("inf") or (met and norm < self.least):
            self.mask, self.pattern = mask.detach(), pattern.detach()
            self.least = norm if met else self.least
        loss = functional.cross_entropy(logits, labels) + self._weight.value * mask.sum()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._weight.adapt(self._reached)

    def _bounded(self) -> tuple[Tensor, Tensor]:
        return _bounded(self._mask, (0.0, 1.0)) * self._place, _bounded(self._pattern, self._bounds)


def _mask_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The mask's own shape: one for all channels of an image `[channels, height, width]`."""
    return (1, *shape[1:]) if len(shape) == 3 else shape


def _bounded(free: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return low + (high - low) * (torch.tanh(free) + 1) / 2


class _Weight:
    """`lambda`, and how it follows the success rate."""

    def __init__(self, options: InversionOptions) -> None:
        self.value = options.weight
        self._options, self._above, self._below = options, 0, 0

    def adapt(self, reached: float) -> None:
        """Take the success rate of one more batch into account."""
        met = reached >= self._options.success
        self._above, self._below = (self._above + 1, 0) if met else (0, self._below + 1)
        if self._above >= self._options.patience:
            self.value, self._above = self.value * self._options.factor, 0
        elif self._below >= self._options.patience:
            self.value, self._below = self.value / self._options.factor**1.5, 0
