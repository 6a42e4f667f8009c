"""The command line: thin commands over the functions of the same name."""

from atpatch_onnx.cli.printing import progress_bars
from atpatch_onnx.cli.root import app, main

__all__ = ["app", "main", "progress_bars"]
