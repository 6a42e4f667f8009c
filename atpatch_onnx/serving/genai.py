"""A folder for onnxruntime-genai: the patched decoder beside the settings and the tokenizer of its base.

The runtime opens the folder as it opened the base's. What it knows of the model by name are its inputs and outputs, and
a patch leaves these alone; `Generator.get_output("atpatch/flagged")` says of every step whether a token was flagged.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import ServingError, one_line
from atpatch_onnx.files import staging

SETTINGS = "genai_config.json"
MODEL = "model.onnx"

_LARGEST = 2**26
"""Bytes of a file that goes with a model; tokenizers are far smaller."""

_COPIED = re.compile(r"[\w.-]+\.(json|txt|model|jinja|tiktoken)")
"""Names of files that go with a model; its weights and what is hidden do not."""

_NUMBERED = re.compile(r"%d")


def write_genai_folder(model: ir.Model, base: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write the folder of a patched decoder; returns it.

    Args:
        model: The decoder, patched or not.
        base: The folder of its base, as the runtime's model builder wrote it: not trusted.
        folder: The new folder; nothing may be there.

    Raises:
        ServingError: The base's settings are missing, damaged or of another model, a file is too large, or the folder
            cannot be made.
        ModelFileError: The model cannot be written.
    """
    source, place = Path(base), Path(folder)
    settings = _settings(source / SETTINGS)
    _require_names(settings, model, source / SETTINGS)
    settings["model"]["decoder"]["filename"] = MODEL
    try:
        files = {file.name: file.read_bytes() for file in _beside(source)}
        place.parent.mkdir(parents=True, exist_ok=True)
        with staging(place.parent) as made:
            new = made / "new"
            new.mkdir()
            for name, content in files.items():
                (new / name).write_bytes(content)
            (new / SETTINGS).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
            graphs.save(model, new / MODEL, external="copy")
            place.mkdir()  # nothing may be there
            os.replace(new, place)
    except OSError as error:
        raise ServingError(
            str(place),
            expected="a folder that can be made",
            found=one_line(error),
            advice="Choose another folder, or move that one away.",
        ) from error
    return place


def _settings(file: Path) -> dict[str, Any]:
    """The base's settings, those of a decoder."""
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size} bytes")
        settings = json.loads(file.read_text(encoding="utf-8"))
        decoder = settings["model"]["decoder"]
        fits = all(isinstance(decoder[side], dict) for side in ("inputs", "outputs"))
        layers = decoder["num_hidden_layers"]
        if not fits or type(layers) is not int or not 0 < layers < 10**4:
            raise ValueError("no inputs, outputs or layers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ServingError(
            str(file),
            expected="the settings of a decoder, as onnxruntime-genai's model builder writes them",
            found=one_line(error),
            advice="Give the folder of the base, as the builder wrote it.",
        ) from error
    return dict(settings)


def _require_names(settings: Mapping[str, Any], model: ir.Model, file: Path) -> None:
    """Refuse settings that name what the model does not have."""
    decoder = settings["model"]["decoder"]
    for side, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs)):
        there = {str(value.name) for value in values}
        for name in _names(decoder[side], decoder["num_hidden_layers"]):
            if name not in there:
                raise ServingError(
                    str(file),
                    expected=f"the settings of this model's base, with its {side}",
                    found=f"{name!r}, which the model does not have",
                    advice="Give the folder of the base that was patched.",
                )


def _names(named: Mapping[str, Any], layers: int) -> Iterator[str]:
    """The names that settings have for one side, those of caches for every layer; others need not be there."""
    for key, name in named.items():
        if isinstance(name, str) and _NUMBERED.search(name):
            yield from (_NUMBERED.sub(str(layer), name) for layer in range(layers))
        elif isinstance(name, str) and key in ("input_ids", "logits"):
            yield name


def _beside(folder: Path) -> Iterator[Path]:
    """The files that go with a model: those of the folder itself, no links."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() or not file.is_file() or not _COPIED.fullmatch(file.name) or file.name == SETTINGS:
            continue
        if file.stat().st_size > _LARGEST:
            raise ServingError(
                str(file),
                expected=f"at most {_LARGEST} bytes beside a model",
                found=f"{file.stat().st_size}",
                advice="Leave it out of the folder.",
            )
        yield file
