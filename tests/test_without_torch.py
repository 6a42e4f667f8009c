"""What must work without any extra: everything but fitting, evaluating, reporting and exporting."""

import subprocess
import sys
from pathlib import Path

import pytest
from planted import Planted, fitted

import atpatch_onnx as atp

EXTRAS = ("torch", "transformers", "sklearn", "fairlearn", "matplotlib", "jinja2", "ray", "pyarrow")

WITHOUT = f"""
import sys

EXTRAS = {EXTRAS!r}

class Without:
    '''A finder that does not find the extras: as if they were not installed.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            return None
        find = getattr(self.finder, "find_spec", None)
        return find(name, path, target) if find else None

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for extra in EXTRAS:
    try:
        __import__(extra)
    except ImportError:
        continue
    raise SystemExit(f"{{extra}} is there after all")
"""


def run_without(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    planted = Planted()
    (folder / "base.onnx").write_bytes(planted.proto().SerializeToString())
    fitted(planted).save(folder / "fix.safetensors")
    planted.debug(30).save(folder / "debug.npz")
    return folder


def test_everything_but_the_fit_works(place):
    run_without(
        """
import atpatch_onnx as atp
from atpatch_onnx.running.sessions import Session

model = atp.load("base.onnx")
assert [site.name for site in atp.find_sites(model)] == ["layer0.attention", "layer1.attention", "layer2.attention"]
patch, debug = atp.Patch.load("fix.safetensors"), atp.DebugSet.load("debug.npz")
for target in ("cpu", "portable"):
    patched = atp.bake(model, patch, target=target)
    atp.verify(model, patched, debug).raise_if_failed()
    assert atp.fingerprint(atp.unbake(patched)) == atp.fingerprint(model)
atp.save(patched, "patched.onnx")
outputs = Session(atp.load("patched.onnx")).collect(debug.counterfactual)
assert outputs["atpatch/flagged"].all()
assert (outputs["logits"].argmax(axis=1) == debug.labels).mean() > 0.9
assert not {"torch", "transformers", "sklearn", "fairlearn", "matplotlib", "jinja2"} & set(sys.modules)
""",
        place,
    )


@pytest.mark.parametrize(
    ("call", "package", "extra"),
    [
        ("atp.fit('base.onnx', debug)", "torch", "fit"),
        ("atp.evaluate('base.onnx', 'base.onnx', debug)", "sklearn", "evaluate"),
    ],
)
def test_what_needs_an_extra_says_which(place, call, package, extra):
    run_without(
        f"""
import atpatch_onnx as atp
from atpatch_onnx.errors import MissingExtraError

debug = atp.DebugSet.load("debug.npz")
try:
    {call}
except MissingExtraError as error:
    assert "the package {package}" in str(error), error
    assert "pip install 'atpatch-onnx[{extra}]'" in str(error), error
else:
    raise SystemExit("nothing was missed")
""",
        place,
    )


def test_the_command_line_works(place):
    shown = run_without(
        """
from atpatch_onnx.cli import main

assert main(["sites", "base.onnx", "--why"]) == 0
assert main(["bake", "base.onnx", "fix.safetensors", "-o", "cli.onnx"]) == 0
assert main(["verify", "base.onnx", "cli.onnx", "debug.npz"]) == 0
assert main(["unbake", "cli.onnx", "-o", "unbaked.onnx"]) == 0
assert main(["fit", "base.onnx", "debug.npz", "-o", "new.safetensors"]) == 1
assert main(["evaluate", "base.onnx", "cli.onnx", "debug.npz"]) == 1
""",
        place,
    )
    assert "layer1.attention" in shown
    assert not (place / "new.safetensors").exists()
    assert atp.fingerprint(atp.load(place / "unbaked.onnx")) == atp.fingerprint(atp.load(place / "base.onnx"))
