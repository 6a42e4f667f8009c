"""The smallest trigger for each class (`descent`), and the class that stands out (`anomaly`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from atpatch_onnx.discovery.anomaly import FEWEST, OUTLIER, SMALL, anomaly_indices, outlier
from atpatch_onnx.discovery.descent import InversionOptions, Task, smallest
from atpatch_onnx.discovery.network import all_logits, check_class, outside, still
from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array, Progress, silent

REACHED = 0.8
"""Share of the inputs below which a trigger does not do its work, however small it is."""


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
        usual, classes = logits.argmax(dim=1).numpy(), logits.shape[1]
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
            task = Task(model, X[torch.from_numpy(outside(usual, label, "inputs"))], label, bounds, options)
            mask, pattern, reached = (found.numpy() for found in smallest(task, seed))
            triggers.append(InvertedTrigger(mask.copy(), pattern, label, Rate.of(reached)))
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
