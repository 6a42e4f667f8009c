"""What the front ends share: their error, and a quiet export whose failure is one of ours."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from atpatch_onnx.errors import AtPatchError


class ExportError(AtPatchError):
    """A model cannot be exported to ONNX, or an export is asked for in a way that cannot be met."""


_CHATTY = ("torch.onnx._internal.exporter._registration",)
"""Loggers that warn at every export: of torchvision, which no model here needs, and of untyped translations."""


@contextlib.contextmanager
def exporting(what: str) -> Iterator[None]:
    """Run an export without its progress lines and repeated warnings; its failure becomes an `ExportError`.

    Raises:
        ExportError: The export failed; the cause is chained, and its first line is in the message.
    """
    try:
        with _quiet():
            yield
    except AtPatchError:
        raise
    except Exception as error:  # torch, transformers and onnxscript raise separate families
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ExportError(
            what,
            expected="a model that torch.onnx.export can trace with these inputs",
            found=f"{type(error).__name__}: {first}",
            advice="Run the model once with these inputs; the chained error says which operation cannot be exported.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torch prints its progress
            # torch.export's own use of what torch deprecates, such as LeafSpec: nothing that a caller can change.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def require_inference(model: object, what: str) -> None:
    """Refuse a module in training mode: its dropout would be exported.

    Raises:
        ExportError: `model.training` is true.
    """
    if getattr(model, "training", False):
        raise ExportError(
            what,
            expected="a module in inference mode",
            found="one in training mode, whose dropout would be in the graph",
            advice="Call its eval() first.",
        )
