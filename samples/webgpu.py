"""Models on onnxruntime-web's WebGPU provider, in headless Chromium; with a software adapter, no GPU is needed."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BROWSER = Path(__file__).parent / "browser"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """One model, run once."""

    outputs: dict[str, NDArray[Any]]
    lines: tuple[str, ...]
    """What onnxruntime wrote to the console, verbosely."""


def missing() -> str | None:
    """What has to be installed; None where all is there."""
    if not (os.environ.get("CHROMIUM") or shutil.which("chromium")) or not shutil.which("node"):
        return "Chromium and node"
    if not (BROWSER / "node_modules" / "onnxruntime-web").is_dir():
        return "npm install --prefix samples/browser"
    return None


def run(models: Sequence[Path], inputs: Arrays, *, timeout: float = 600) -> tuple[str | None, list[Run]]:
    """The adapter, None where WebGPU does not start, and what came of each model on these inputs.

    Raises:
        RuntimeError: Chromium fails, or onnxruntime does.
    """
    feeds = {
        name: {"type": str(array.dtype), "dims": array.shape, "data": array.ravel().tolist()}
        for name, array in inputs.items()
    }
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
    done = subprocess.run(
        ["node", str(BROWSER / "webgpu.mjs")],
        input=json.dumps([{"model": str(model), "feeds": feeds} for model in models]),
        env={**os.environ, "CHROMIUM": chromium},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:] or "node failed")
    answer = json.loads(done.stdout)
    for one in answer["answers"]:
        if "error" in one:
            raise RuntimeError(one["error"])
    return answer["adapter"], [_run(one) for one in answer["answers"]]


def _run(answer: Mapping[str, Any]) -> Run:
    outputs = {name: np.array(one["data"], one["type"]).reshape(one["dims"]) for name, one in answer["outputs"].items()}
    return Run(outputs, tuple(answer["lines"]))
