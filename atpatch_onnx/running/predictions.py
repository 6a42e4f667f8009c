"""From a model's outputs to predicted classes."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.errors import RunError
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.running.batching import AS_GIVEN, Batching

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def prediction_output(model: ir.Model, name: str | None = None, batching: Batching = AS_GIVEN) -> str:
    """The output that predictions are read from: `name`, or the first float output `[batch, classes]`.

    Of a model that takes one sample at a time, that may be `[classes]`.

    Raises:
        RunError: There is no such output.
    """
    own = [output for output in model.graph.outputs if not (output.name or "").startswith(PREFIX)]
    names = [output.name or "" for output in own]
    if name is not None:
        if name in names:
            return name
        raise _none(f"an output named {name!r}", names)
    for output in own:
        rank = 2 if batching.outputs.get(output.name or "", 0) is not None else 1
        if output.shape is not None and len(output.shape) == rank and output.dtype in _FLOATS:
            return output.name or ""
    if len(own) == 1 and own[0].shape is None:
        return names[0]
    raise _none("a float output [batch, classes] to read predictions from", names)


def _none(expected: str, names: list[str]) -> RunError:
    return RunError(
        "the model's outputs",
        expected=expected,
        found=", ".join(names) or "none",
        advice="Name the output that holds the logits (option --output).",
    )


def classes(logits: NDArray[Any]) -> NDArray[np.int64]:
    """Predicted class of each sample: the largest logit; with one logit a sample, whether it is positive.

    Args:
        logits: `[samples, classes]` or `[samples, 1]`.

    Returns:
        int64 `[samples]`.
    """
    if logits.ndim == 2 and logits.shape[1] == 1:
        return (logits[:, 0] > 0).astype(np.int64)
    return np.asarray(np.argmax(logits, axis=-1), np.int64)


def confidences(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax (for one logit, the sigmoid and its complement) of logits `[samples, classes]`, float64."""
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
