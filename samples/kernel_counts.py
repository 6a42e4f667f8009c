"""How many kernels a patch adds, by the form of the attention, the precision and the reading: counted, not timed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.baking.kernels import kernels
from atpatch_onnx.baking.quantize import quantize
from atpatch_onnx.fitting.options import Kind
from atpatch_onnx.measuring.benchmark import synthetic_patch
from samples.speed_models import EAGER, FUSED, export

MODELS = ("vit", "gpt2")
"""Projections apart, and packed: of BERT-base there is nothing else to count."""

NUMBERS = ("precision", "reading", "detecting", "carrying", "redistributing", "monitors", "few", "all")
"""What a row says: of one site, of the outputs, of two whole patches."""

SITES, DETECTING, REDISTRIBUTING = 12, 2, 4
"""Of a whole model, and of a patch such as fits find."""


def counts() -> list[dict[str, Any]]:
    """One row for each precision and reading; forms of attention stand together where they come to the same."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            for form, *numbers in _of_model(name, Path(folder)):
                rows.setdefault(tuple(numbers), []).append(form)
    return [{"forms": forms, **dict(zip(NUMBERS, numbers, strict=True))} for numbers, forms in rows.items()]


def _of_model(name: str, folder: Path) -> Iterator[tuple[Any, ...]]:
    files = export(name, folder, fast=True)
    for form in (EAGER, FUSED):
        for precision in ("fp32", "fp16"):
            base = atp.load(files[form])
            model = quantize(base, "fp16") if precision == "fp16" else base
            readings: tuple[Kind, ...] = ("linear", "hidden")
            for reading in readings:
                found = kernels(atp.bake(model, synthetic_patch(model, reading), target="cuda"))
                first, second, *_ = found.sites
                each = first.detecting, second.carrying, first.redistributing, found.monitors
                totals = _whole(DETECTING, REDISTRIBUTING, *each), _whole(SITES, SITES, *each)
                yield f"{name}, {form}", precision, reading, *each, *totals


def _whole(detecting: int, redistributing: int, *each: int) -> int:
    """Kernels of a patch of so many sites."""
    return int(np.dot([detecting, detecting - 1, redistributing, 1], each))
