"""A torch model as inversion sees it: weights that stay as they are, and logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.threads import one_thread


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, its weights gather no gradients, and torch runs on one thread.

    After it all is as it was before.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.eval()
    for weight, _ in wanted:
        weight.requires_grad_(False)
    try:
        with one_thread():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, wants in wanted:
            weight.requires_grad_(wants)


def logits_of(output: object) -> Tensor:
    """Logits float `[batch, classes]` of what a model returned: the tensor itself, or its `.logits`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        shape = f" {list(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise InversionError(
            "the model",
            expected="logits [batch, classes] of at least two classes, or an output that has them as .logits",
            found=f"{type(logits).__name__}{shape}",
            advice="Wrap it in a module that returns its logits.",
        )
    return logits


def check_class(target: int, classes: int) -> int:
    """The class `target`, if the model has it."""
    if not 0 <= target < classes:
        raise InversionError(
            "target", expected=f"a class from 0 to {classes - 1}", found=str(target), advice="Name one of them."
        )
    return int(target)


def outside(usual: NDArray[np.int64], label: int, where: str) -> NDArray[np.bool_]:
    """Which inputs the model does not put into a class, bool `[n]`, of those that it does put them into `[n]`."""
    rows = np.asarray(usual != label)
    if not rows.any():
        raise InversionError(
            where,
            expected=f"some that the model does not put into class {label}",
            found=f"all {len(rows)} of them in it",
            advice="Give inputs of various classes.",
        )
    return rows


@torch.no_grad()
def all_logits(model: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    """Logits float `[inputs, classes]` of `inputs` `[inputs, ...]`."""
    starts = range(0, len(inputs), batch_size)
    return torch.cat([logits_of(model(inputs[start : start + batch_size])) for start in starts])
