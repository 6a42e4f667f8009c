"""A newcomer's walks, as `how-to/pairs.md` has them: from an install line to a file that is verified and measured."""

import numpy as np
import onnxruntime
import pytest
from pages import DOCS, blocks, run
from worlds import WORLDS

import atpatch_onnx as atp

PAGE = DOCS / "how-to" / "pairs.md"
LINES = 12


@pytest.mark.slow
@pytest.mark.parametrize("world", ["images", "texts", "tables", "prompts"])
def test_a_walk(world, tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    WORLDS[world](tmp_path)
    walk, *more = [block for block in blocks(PAGE) if block.world == world and block.runs]
    typed = walk.text.strip().splitlines()
    assert typed[0].startswith("pip install")
    assert len(typed) <= LINES
    names: dict = {}
    for block in (walk, *more):
        run(block, names)
    atp.verify("model.onnx", "patched.onnx", patch=atp.Patch.load("patched.safetensors")).raise_if_failed()
    if world != "prompts":
        repaired(atp.DebugSet.load("pairs.npz"))


def repaired(pairs: atp.DebugSet) -> None:
    """As a stranger would see it, by onnxruntime alone."""
    base, patched = (onnxruntime.InferenceSession(f"{name}.onnx") for name in ("model", "patched"))

    def classes(session: onnxruntime.InferenceSession, side: str) -> np.ndarray:
        return session.run(["logits"], dict(getattr(pairs, side)))[0].argmax(axis=1)

    moved = [(classes(session, "counterfactual") != classes(session, "clean")).mean() for session in (base, patched)]
    assert moved[0] > 0.3
    assert moved[1] < 0.03
    lost = (classes(base, "clean") == pairs.labels).mean() - (classes(patched, "clean") == pairs.labels).mean()
    assert lost < 0.01
