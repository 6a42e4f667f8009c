"""What all tests share: helper modules and samples can be imported, and hypothesis draws the same everywhere."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # pytest's importlib mode leaves it alone

settings.register_profile("steady", deadline=None, derandomize=True)  # however busy the machine
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of what has no end is tried."""
    parser.addoption("--kills", type=int, default=50, help="how often a process that writes files is stopped")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `atpatch demo --json` left, with its output in `said.json`; its tests are one group, for one worker."""
    from atpatch_onnx.cli import main

    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["demo", "--out", str(folder), "--json"]) == 0
    (folder / "said.json").write_text(said.getvalue())
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: with several workers, the longest one must not be left for the end."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("nightly", "slow"))))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands take (`command_line.furnish`); nothing here is written to by a test."""
    from command_line import furnish

    folder = tmp_path_factory.mktemp("place")
    furnish(folder)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder; `place` is where the arguments' `@` points to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
