"""What a torch model says of instances and of all their variants."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from atpatch_onnx.discovery.attributes import Attribute, Table, variants
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.running.predictions import classes, confidences
from atpatch_onnx.running.threads import one_thread

_ROWS = 4096
"""Rows that the model is given at a time."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """Instances compared with all their variants."""

    discriminates: NDArray[np.bool_]
    """`[rows]`: some variant is predicted otherwise."""

    other: Table
    """`[rows, features]`: the variant with the largest output gap; of those predicted otherwise where there are any."""


class Judge:
    """A model and the protected attributes that it should not lean on."""

    def __init__(self, model: torch.nn.Module, attributes: Sequence[Attribute], columns: Sequence[int]) -> None:
        if model.training:
            raise DebugSetError(
                "model",
                expected="a module in inference mode",
                found="one in training mode",
                advice="Call model.eval() first: with dropout the same input has several predictions.",
            )
        self._model, self._attributes, self._columns = model, attributes, columns

    def judge(self, table: Table) -> Verdict:
        """Compare rows `[rows, features]` with their variants.

        The output gap of a variant is its largest change of a class's confidence.
        """
        every = variants(table, self._attributes, self._columns)
        rows, count, features = every.shape
        logits = self._logits(np.concatenate([table, every.reshape(-1, features)]))
        own, of = logits[:rows], logits[rows:]
        gaps = np.abs(confidences(of).reshape(rows, count, -1) - confidences(own)[:, None]).max(axis=2)
        flips = classes(of).reshape(rows, count) != classes(own)[:, None]
        is_itself = (every == table[:, None]).all(axis=2)
        flips &= ~is_itself  # the same row in another batch may round otherwise
        best = np.where(is_itself, -1.0, gaps + 2.0 * flips).argmax(axis=1)
        return Verdict(flips.any(axis=1), every[np.arange(rows), best])

    @one_thread()
    def gradients(self, table: Table) -> NDArray[np.float32]:
        """Gradients `[rows, features]` of the cross-entropy against the model's own label."""
        parts = []
        for start in range(0, len(table), _ROWS):
            rows = torch.from_numpy(table[start : start + _ROWS].copy()).requires_grad_()
            logits = self._model(rows)
            if not logits.requires_grad:
                raise DebugSetError(
                    "model",
                    expected="logits with gradients with respect to the table",
                    found="none",
                    advice="Look categories up by interpolation, so that a gradient says what the next one would do.",
                )
            if logits.shape[1] == 1:
                logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
            loss = functional.cross_entropy(logits, logits.detach().argmax(dim=1), reduction="sum")
            parts.append(torch.autograd.grad(loss, rows)[0].numpy())
        return np.concatenate(parts)

    @one_thread()
    def _logits(self, table: Table) -> NDArray[np.float32]:
        with torch.no_grad():
            parts = [
                self._model(torch.from_numpy(table[start : start + _ROWS])).numpy()
                for start in range(0, len(table), _ROWS)
            ]
        logits = np.concatenate(parts)
        if logits.ndim != 2 or len(logits) != len(table):
            raise DebugSetError(
                "model",
                expected="logits [rows, classes]",
                found=f"shape {list(logits.shape)} for {len(table)} rows",
                advice="Wrap it in a module that returns the logits alone.",
            )
        return logits
