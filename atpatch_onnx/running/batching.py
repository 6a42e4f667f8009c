"""How samples are given to a model and taken from it: everywhere else they are on the first axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Batching:
    """The axis of samples of each input and output; of names that are not listed, tensors are left as they are."""

    inputs: Mapping[str, int | None] = field(default_factory=dict)
    """None: the model takes the input of one sample, without an axis for it."""

    outputs: Mapping[str, int | None] = field(default_factory=dict)

    alone: bool = False
    """Whether a batch of several is no several samples, although there is an axis for it."""

    @property
    def one_by_one(self) -> bool:
        """Whether the model takes one sample at a time."""
        return self.alone or None in self.inputs.values()

    def axis(self, name: str) -> int | None:
        """The axis of samples of an input."""
        return self.inputs.get(name, 0)

    def given(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs `[samples, ...]` as the model takes them."""
        return {name: _given(array, self.axis(name)) for name, array in inputs.items()}

    def taken(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs as the model gives them, as `[samples, ...]`; those that are no tensor stay what they are."""
        return {name: _first(output, self.outputs.get(name, 0)) for name, output in outputs.items()}

    def samples_first(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs as the model takes them, as `[samples, ...]`."""
        return {name: _first(array, self.axis(name)) for name, array in inputs.items()}

    def declared(self, name: str, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """The shape of an input that is given as `[samples, ...]`; None where a size is free."""
        axis = self.axis(name)
        return (None, *shape) if axis is None else (*shape[axis : axis + 1], *shape[:axis], *shape[axis + 1 :])


AS_GIVEN = Batching()
"""Nothing is moved."""


def _given(array: Array, axis: int | None) -> Array:
    if axis == 0:
        return array
    return np.ascontiguousarray(array[0] if axis is None else np.moveaxis(array, 0, axis))


def _first(output: Any, axis: int | None) -> Any:
    if axis == 0 or not isinstance(output, np.ndarray) or (axis is not None and axis >= output.ndim):
        return output
    return output[None] if axis is None else np.ascontiguousarray(np.moveaxis(output, axis, 0))
