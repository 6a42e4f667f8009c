"""From a debug set to an unbaked file, on bases that were quantized statically."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from planted import QUICK, Planted
from rich.console import Console

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.fitting import preparation
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.evaluate import evaluate
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.report import text

PLANTED = Planted()


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        debug = PLANTED.debug(64, seed=5)
        self.feeds = iter([debug.clean, debug.counterfactual])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def quantized(folder: Path, **options: Any) -> ir.Model:
    onnx.save(PLANTED.proto(), folder / "float.onnx")
    quantize_static(folder / "float.onnx", folder / "int8.onnx", Reader(), **options)
    return ir.from_proto(onnx.load(folder / "int8.onnx"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format_", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["pairs", "operators"])
def test_a_fit_end_to_end(format_: QuantFormat, tmp_path: Path) -> None:
    base = quantized(tmp_path, quant_format=format_)
    assert len(find_sites(base)) == PLANTED.layers
    patch = fit(base, PLANTED.debug(), QUICK)
    assert patch.meets_target
    assert patch.figures["left_out"] == []
    patched = bake(base, patch)
    held_out = PLANTED.debug(240, seed=2)
    verify(base, patched, held_out).raise_if_failed()
    backdoor = evaluate(base, patched, held_out).backdoor
    assert backdoor is not None
    assert backdoor.asr_base.value > 0.5
    assert backdoor.asr_above_floor.value < 0.02
    assert fingerprint(unbake(patched)) == fingerprint(base)


def test_a_fit_says_which_sites_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_one_elsewhere(model: ir.Model) -> Any:
        *others, last = find_sites(model)
        return (*others, replace(last, token_axis="elsewhere"))

    monkeypatch.setattr(preparation, "find_sites", last_one_elsewhere)
    patch = fit(PLANTED.model(), PLANTED.debug(), QUICK)
    assert patch.figures["left_out"] == [{"site": "layer2.attention", "token_axis": "elsewhere"}]
    console = Console(file=io.StringIO(), width=120)
    console.print(text.fit_summary(patch))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Left out" in printed
    assert "layer2.attention: on other token axes" in printed
