"""Quantized bases with a patch: its detectors stay in float32, it fires as before, and comes out again."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import same_bits
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx.baking.quantize import quantize, rebind
from atpatch_onnx.cli import main
from atpatch_onnx.errors import BakeError, PatchMismatchError
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Session

PLANTED = Planted()
FLAGGED = "atpatch/flagged"

tools_warn = pytest.mark.filterwarnings("ignore::UserWarning")  # the float16 tool tells of what it rounds to zero
precisions = pytest.mark.parametrize("precision", ["int8", "fp16"])


def quantized_and_patched(precision: str, **options: str) -> tuple[ir.Model, ir.Model]:
    base = PLANTED.model()
    quantized = quantize(base, precision)
    return quantized, atp.bake(quantized, rebind(fitted(PLANTED), base, quantized), **options)


@tools_warn
@precisions
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_fix_fires_as_before_and_clean_inputs_are_the_quantized_bases(precision, target):
    quantized, patched = quantized_and_patched(precision, target=target)
    before = Session(atp.bake(PLANTED.model(), fitted(PLANTED)))
    debug = PLANTED.debug(40)
    for inputs, flagged in ((debug.clean, False), (debug.counterfactual, True)):
        found, alone = (Session(model).collect(inputs, batch_size=1) for model in (patched, quantized))
        assert np.array_equal(found[FLAGGED], before.collect(inputs)[FLAGGED])
        assert (found[FLAGGED] == flagged).mean() > 0.9
        assert found["logits"].dtype == np.float32
        quiet = ~found[FLAGGED][:, 0]
        assert same_bits(found["logits"][quiet], alone["logits"][quiet])


@tools_warn
@precisions
def test_the_base_is_quantized_and_the_patch_is_not(precision):
    quantized, patched = quantized_and_patched(precision)
    if precision == "int8":
        assert "MatMulInteger" in [node.op_type for node in quantized.graph]
    else:
        assert ir.DataType.FLOAT16 in {value.dtype for value in quantized.graph.initializers.values()}
    ours = {name: value.dtype for name, value in patched.graph.initializers.items() if name.startswith("atpatch/")}
    neutral = {dtype for name, dtype in ours.items() if "/neutral_" in name}
    assert neutral == {ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT}, (
        "the type of what it replaces"
    )
    rest = {dtype for name, dtype in ours.items() if "/neutral_" not in name}
    assert rest
    assert not rest & {ir.DataType.FLOAT16, ir.DataType.INT8}


@tools_warn
@precisions
def test_unbaking_gives_the_quantized_base(precision):
    quantized, patched = quantized_and_patched(precision)
    assert atp.fingerprint(atp.unbake(patched)) == atp.fingerprint(quantized)


def test_what_is_refused():
    with pytest.raises(BakeError, match="Unbake it first"):
        quantize(atp.bake(PLANTED.model(), fitted(PLANTED)))
    with pytest.raises(BakeError, match="int8 or fp16"):
        quantize(PLANTED.model(), "int4")
    other = replace(fitted(PLANTED), base="sha256:0")
    with pytest.raises(PatchMismatchError, match="the model it was fitted on"):
        rebind(other, PLANTED.model(), PLANTED.model())


def neuron_edit(model: ir.Model) -> atp.Patch:
    arrays = np.zeros(1, np.float32), np.full(1, 0.5, np.float32)
    return atp.Patch(atp.fingerprint(model), (), {}, (LayerEdit("layer1.mlp.hidden", np.array([2]), *arrays),))


@tools_warn
def test_neuron_edits_go_with_float16_and_their_order_stays():
    planted = Planted(mlp=4)
    base = planted.model()
    neurons = neuron_edit(base)
    after = replace(fitted(PLANTED), base=neurons.base, after=(neurons.id,))
    quantized = quantize(base, "fp16")
    patched = atp.bake(quantized, rebind(atp.compose([neurons, after]), base, quantized))
    assert atp.verify(quantized, patched, planted.debug(40)).passed
    with pytest.raises(PatchMismatchError, match="--precision fp16"):
        rebind(neurons, base, quantize(base, "int8"))


@tools_warn
@precisions
def test_the_command_measures_again(precision, tmp_path, capsys):
    atp.save(PLANTED.model(), tmp_path / "base.onnx")
    fitted(PLANTED).save(tmp_path / "fix.safetensors")
    PLANTED.debug(120, seed=5).save(tmp_path / "unseen.npz")
    files = [str(tmp_path / name) for name in ("base.onnx", "fix.safetensors", "out.onnx", "unseen.npz")]
    call = ["quantize", *files[:2], "-o", files[2]]
    assert main([*call, "--precision", precision, "--data", files[3], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for name in ("float32", precision):
        assert shown[name]["backdoor"]["asr_base"]["value"] > 0.9
        assert shown[name]["backdoor"]["asr_above_floor"]["value"] < 0.05
        assert shown[name]["accuracy_base"]["value"] - shown[name]["accuracy_patched"]["value"] < 0.02
    assert main(call) == 0
    assert "unbake it for the int8 base" in " ".join(capsys.readouterr().out.split())
