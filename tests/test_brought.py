"""From a debug set to a base that is back, on models as people bring them."""

from dataclasses import replace

import onnx
import pytest
from dressed import (
    as_image,
    of_opset,
    of_words,
    sequence_first,
    talking,
    with_a_sequence,
    with_maps,
    without_batch,
    words_debug,
)
from planted import QUICK, Planted

import atpatch_onnx as atp
from atpatch_onnx.fitting.goal import Goal

LOW = replace(QUICK, goal=Goal(clean_flag_rate=0.05))
"""So few pairs do for it."""

MASKED = Planted(masked=True, tokens=12, drawn=(0,), harmful=(1, 2))
SQUARE = Planted(batch=8, tokens=8)
BROUGHT = {
    "sequence first": (lambda: sequence_first(Planted().proto()), Planted().debug),
    "sequence first, as long as the batch": (lambda: sequence_first(SQUARE.proto()), SQUARE.debug),
    "sequence first, the mask is not": (lambda: sequence_first(MASKED.proto()), MASKED.debug),
    "sequence first, fused": (lambda: sequence_first(Planted(form="packed").proto()), Planted().debug),
    "no batch axis": (lambda: without_batch(Planted(free=True).proto()), Planted().debug),
    "no batch axis, one row": (lambda: without_batch(Planted().proto(), keeps_one=True), Planted().debug),
    "a sequence and a text returned": (lambda: with_a_sequence(Planted().proto()), Planted().debug),
    "maps returned": (lambda: with_maps(Planted().proto()), Planted().debug),
    "opset 12, lifted": (lambda: of_opset(Planted().proto(), 12, 7), Planted().debug),
    "IR version 3, lifted": (lambda: of_opset(Planted(free=True).proto(), 11, 3, listed=True), Planted().debug),
    "talking heads": (lambda: talking(Planted().proto()), Planted().debug),
    "pixels, heads in the batch": (lambda: as_image(Planted()), Planted().debug),
    "words": (lambda: of_words(Planted()), lambda pairs=480: words_debug(Planted(), pairs)),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_end_to_end(name, tmp_path):
    """Fitted on samples that are given first, baked, verified, evaluated, unbaked."""
    make, debug = BROUGHT[name]
    onnx.save(make(), tmp_path / "base.onnx")
    model, pairs = atp.load(tmp_path / "base.onnx"), debug(160)
    patch = atp.fit(model, pairs, LOW)
    assert patch.meets_target
    assert pairs.suspects is None, "they were found, on the right axis"
    atp.save(atp.bake(model, patch), tmp_path / "patched.onnx")
    atp.verify(tmp_path / "base.onnx", tmp_path / "patched.onnx", pairs.take(range(20)), patch=patch).raise_if_failed()
    found = atp.evaluate(tmp_path / "base.onnx", tmp_path / "patched.onnx", pairs)
    assert found.backdoor.asr_base.value > 0.9
    assert found.backdoor.asr_above_floor.value < 0.05
    assert found.columns.recall.value > 0.95
    assert atp.fingerprint(atp.unbake(atp.load(tmp_path / "patched.onnx"))) == atp.fingerprint(model)


@pytest.mark.parametrize("name", BROUGHT)
def test_a_rehearsal_has_a_verdict(name, tmp_path):
    make, _ = BROUGHT[name]
    onnx.save(make(), tmp_path / "base.onnx")
    result = atp.rehearse(tmp_path / "base.onnx")
    assert (result.passed, result.failures) == (True, ())
