"""Everything that was done to a patched file after baking is found without running it."""

import onnx_ir as ir
import pytest
from tampered import BESIDE_PATCH, CONDITIONAL, TAMPERED, Change
from tampering import CARRY, sign
from test_verify import patch_of

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.again import require_as_baked
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import Patch

ALL = [(name, change, False) for name, change in TAMPERED.items()]
ALL += [(name, change, True) for name, change in CONDITIONAL.items()]


@pytest.fixture(scope="module")
def planted() -> tuple[ir.Model, Patch]:
    return patch_of(CARRY)


def done(planted: tuple[ir.Model, Patch], change: Change, conditional: bool) -> ir.Model:
    model, patch = planted
    patched = bake(model, patch, conditional=conditional)
    digest = patched.metadata_props["atpatch.weights"]
    change(patched)
    if patched.metadata_props["atpatch.weights"] == digest:
        sign(patched)
    return patched


@pytest.mark.parametrize("conditional", [False, True])
def test_an_untouched_file_passes(planted, conditional: bool) -> None:
    model, patch = planted
    patched = done(planted, lambda model: None, conditional)
    assert verify(model, patched).passed
    assert verify(model, patched, patch=patch).passed
    assert graphs.fingerprint(require_as_baked(patched)) == patch.base


@pytest.mark.parametrize(("name", "change", "conditional"), ALL, ids=[name for name, _, _ in ALL])
def test_what_was_done_is_found(planted, name: str, change: Change, conditional: bool) -> None:
    model, _ = planted
    patched = done(planted, change, conditional)
    failures = {check.name for check in verify(model, patched).failures}
    assert failures & {"unbake", "additions", "parameters"}
    with pytest.raises(AtPatchError):
        require_as_baked(patched)


@pytest.mark.parametrize("name", BESIDE_PATCH)
def test_what_another_patch_would_do_is_found_beside_the_patch(planted, name: str) -> None:
    model, patch = planted
    patched = done(planted, BESIDE_PATCH[name], False)
    assert verify(model, patched).passed, "it could have been baked"
    assert {check.name for check in verify(model, patched, patch=patch).failures} & {"additions", "parameters"}
