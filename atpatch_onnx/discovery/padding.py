"""Padding of texts: a batch of short ones need not be run as long as the longest text of all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.discovery.content import Content
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.running.sessions import Array


@dataclass(frozen=True)
class Padding:
    """What short texts end with."""

    name: str
    """Of the input of ids `[inputs, tokens]`."""

    id: int

    def batches(self, inputs: Mapping[str, Array], size: int) -> Iterator[tuple[NDArray[np.int64], dict[str, Array]]]:
        """Inputs of like length together, `size` at a time, each batch with one position of padding at most.

        Args:
            inputs: Arrays by name; those `[inputs, tokens]` are cut.
            size: Of a batch.

        Yields:
            The numbers of the inputs, and the inputs.
        """
        widths, tokens = self.widths(inputs[self.name]), inputs[self.name].shape[1]
        order = np.argsort(widths, kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            cut = slice(int(widths[rows[-1]]))
            yield (
                rows,
                {
                    name: array[rows, cut] if array.ndim == 2 and array.shape[1] == tokens else array[rows]
                    for name, array in inputs.items()
                },
            )

    def widths(self, ids: Array) -> NDArray[np.int64]:
        """How many tokens of texts `[texts, tokens]` are read, with one position of padding where there is any."""
        real = np.pad(ids != self.id, ((0, 0), (1, 0)), constant_values=True)  # a text of padding alone has one, too
        last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)
        return np.asarray(np.minimum(last + 1, ids.shape[1]), np.int64)


def padding_of(model: ir.Model, content: Content, inputs: Mapping[str, Array]) -> Padding | None:
    """What texts seem to end with; None where that is nothing, or where the model reads one length only."""
    if content.kind != "texts" or isinstance(input_specs(model)[content.name].shape[1], int):
        return None
    known, counts = np.unique(inputs[content.name][:, -1], return_counts=True)
    padding = Padding(content.name, int(known[counts.argmax()]))
    return padding if padding.id in content.common else None
