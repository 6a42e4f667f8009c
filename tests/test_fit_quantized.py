"""From a debug set to an unbaked file, on bases whose linear layers are quantized, or convolutions."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
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


def in_blocks(bits: int) -> ir.Model:
    """Weights of few bits, a scale for each block (`MatMulNBits`)."""
    quantizer = MatMulNBitsQuantizer(PLANTED.proto(), bits=bits, block_size=16)
    quantizer.process()
    return ir.from_proto(quantizer.model.model)


def channels_first() -> ir.Model:
    """Every projection as a 1x1 convolution over the features."""
    proto = PLANTED.proto()
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "MatMul" or not node.input[1].endswith(".weight"):
            nodes.append(node)
            continue
        (x, weight), (y,) = node.input, node.output
        kernel = numpy_helper.to_array(weights[weight]).T[..., None]
        weights[weight].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(kernel), weight))
        nodes += [
            helper.make_node("Transpose", [x], [f"{y}/first"], perm=[0, 2, 1]),
            helper.make_node("Conv", [f"{y}/first", weight], [f"{y}/convolved"]),
            helper.make_node("Transpose", [f"{y}/convolved"], [y], perm=[0, 2, 1], name=node.name),
        ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return ir.from_proto(proto)


BASES: dict[str, Callable[[Path], ir.Model]] = {
    "static int8, pairs": lambda folder: quantized(folder, quant_format=QuantFormat.QDQ),
    "static int8, operators": lambda folder: quantized(folder, quant_format=QuantFormat.QOperator),
    "8 bits in blocks": lambda _: in_blocks(8),
    "4 bits in blocks": lambda _: in_blocks(4),
    "channels first": lambda _: channels_first(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base_of", BASES.values(), ids=BASES.keys())
def test_a_fit_end_to_end(base_of: Callable[[Path], ir.Model], tmp_path: Path) -> None:
    base = base_of(tmp_path)
    sites = find_sites(base)
    assert len(sites) == PLANTED.layers
    assert len({site.token_axis for site in sites}) == 1
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
