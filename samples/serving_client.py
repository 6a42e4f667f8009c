"""Ask a served model, and see which inputs its patch flagged: a client of the Open Inference Protocol, version 2.

    atpatch serve-config patched.onnx repository --stack triton
    tritonserver --model-repository repository
    python -m samples.serving_client http://localhost:8000 patched inputs.npz

Triton and KServe both speak it. Standard library only; requests are JSON, which large inputs would rather not be.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

DATATYPES = {
    "BOOL": np.dtype(bool),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""The protocol's names of the types that JSON carries without loss."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}

FLAGGED, SCORE = "atpatch/flagged", "atpatch/score"


class ServedError(Exception):
    """The server refused the request, or cannot be reached."""


def infer(url: str, model: str, inputs: Mapping[str, NDArray[Any]], *, timeout: float = 30) -> dict[str, NDArray[Any]]:
    """All outputs of a served model for inputs `[batch, ...]`.

    Raises:
        ServedError: The server refused the request, or cannot be reached.
    """
    asked = [
        {"name": name, "datatype": _NAMES[array.dtype], "shape": list(array.shape), "data": array.ravel().tolist()}
        for name, array in inputs.items()
    ]
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v2/models/{quote(model, safe='')}/infer",
        data=json.dumps({"inputs": asked}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise ServedError(f"{url} refused: {error.read().decode(errors='replace')}") from error
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise ServedError(f"{url} gave no answer: {error}") from error
    return {
        output["name"]: np.array(output["data"], DATATYPES[output["datatype"]]).reshape(output["shape"])
        for output in answer["outputs"]
    }


def shown(outputs: Mapping[str, NDArray[Any]]) -> Table:
    """Prediction, flag and score of every input; the prediction is that of the first float output."""
    logits = next(array for name, array in outputs.items() if array.dtype.kind == "f" and name != SCORE)
    table = Table("input", "prediction", "flagged", "score")
    for number, (row, flagged, score) in enumerate(zip(logits, outputs[FLAGGED], outputs[SCORE], strict=True)):
        table.add_row(str(number), str(row.argmax()), "yes" if flagged.item() else "", f"{score.item():+.3f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Ask once; 1 where the server gives no answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server")
    parser.add_argument("model", help="its name there")
    parser.add_argument("inputs", help="an .npz file of arrays by input name, each [batch, ...]")
    options = parser.parse_args(arguments)
    with np.load(options.inputs, allow_pickle=False) as file:
        inputs = {name: file[name] for name in file.files}
    try:
        outputs = infer(options.url, options.model, inputs)
    except ServedError as error:
        print(error, file=sys.stderr)
        return 1
    Console().print(shown(outputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
