"""Thousands of damaged files: each is read, or refused on one line, in bounded memory and time.

500 cases by default, shared among the kinds; `ATPATCH_FUZZ_CASES=10000` for a night: of each kind. A case is made from
its number, so what is found once is found again; the first cases are new ones each night where `ATPATCH_FUZZ_FIRST`
says so. What was found lies in `fuzzing/found/`, and is read by every run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing.drives import KINDS

TESTS = Path(__file__).parent
FOUND = TESTS / "fuzzing" / "found"

USUAL = {"onnx": 250, "safetensors": 100, "npz": 100, "npy": 50}
"""Cases of each kind of file."""

ASKED = os.environ.get("ATPATCH_FUZZ_CASES")
FIRST = int(os.environ.get("ATPATCH_FUZZ_FIRST", "0"))

FINE = {"right", "refused", "unmade"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by setrlimit, and read from /proc")


def made(kind: str, first: int, count: int, keep: Path) -> Iterator[tuple[int | str, str]]:
    """What becomes of the cases from `first` on; where one ends the process, another process goes on behind it."""
    end = first + count
    while first < end:
        for case, whole in outcomes(kind, str(first), str(end - first), str(keep)):
            yield (first if isinstance(case, str) else case), whole
            first += 1


def outcomes(kind: str, *arguments: str) -> Iterator[tuple[int | str, str]]:
    """What the child says of each case; it says no more where a case ends the process."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzzing.child", kind, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))), "OMP_NUM_THREADS": "1"},
    )
    for line in done.stdout.splitlines():
        yield tuple(json.loads(line))
    if done.returncode:
        yield "the process", f"ended with {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    """The files of cases that fail are kept in pytest's temporary folder."""
    count = USUAL[kind] if ASKED is None else int(ASKED)
    found = list(made(kind, FIRST, count, tmp_path))
    failed = {case: whole for case, whole in found if whole not in FINE}
    assert not failed, "\n".join(f"{kind} {case}: {whole}" for case, whole in failed.items())
    assert len(found) == count
    counts = {name: sum(whole == name for _, whole in found) for name in FINE}
    assert counts["refused"], "some are damaged"
    assert counts["unmade"] < count / 4, "most can be made"
    assert count < 50 or counts["right"], "some are still sound"


def kept(kind: str) -> list[str]:
    return sorted(str(path) for path in FOUND.glob(f"{kind}-*"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kept(kind)])
def test_what_was_found_once(kind: str) -> None:
    files = kept(kind)
    found = dict(outcomes(kind, *files))
    assert found.keys() == set(files), found
    assert set(found.values()) <= FINE, found
