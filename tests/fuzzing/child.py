"""Runs cases in a separate process, with a limit of memory and of time; prints a line of JSON for each.

    python -m fuzzing.child <kind> <first case> <cases> <keep folder>      cases that are made
    python -m fuzzing.child <kind> <file> ...                              files that are there

A case is made from its number alone. The outcome is "right", "refused", or what went wrong.
"""

import faulthandler
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stderr
from pathlib import Path

from atpatch_onnx.cli.root import quiet_libraries
from atpatch_onnx.errors import AtPatchError
from fuzzing import seeds
from fuzzing.drives import KINDS, check_message

MEMORY = 2**30
"""Bytes of address space that the cases may take beside what is there once all is imported."""

SECONDS = 10.0
"""Of the processor's time that a case may take."""


class TooLong(BaseException):
    """Not an Exception: nothing may catch it on its way."""


def too_long(*_: object) -> None:
    raise TooLong


def limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, too_long)


def warm_up(kind: str) -> None:
    """What is imported on demand, before the limit is set."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "onnx":
            for name in ("plain", "patched"):
                path = Path(folder) / f"{name}.onnx"
                path.write_bytes(seeds.model(name))
                KINDS["onnx"][1](path)


def outcome(kind: str, path: Path) -> str:
    faulthandler.dump_traceback_later(20 * SECONDS, exit=True)  # where no Python runs, no signal is seen
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with redirect_stderr(io.StringIO()) as said:
            KINDS[kind][1](path)
        assert not said.getvalue(), f"said {said.getvalue()!r}"
        return "right"
    except AtPatchError as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            check_message(error)
        except AssertionError as broken:
            return str(broken)
        return "refused"
    except (Exception, TooLong) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        frames = list(traceback.extract_tb(error.__traceback__))
        own = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-1:]]
        ours = [frame for frame in frames if "atpatch_onnx" in frame.filename]
        own = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in ours[-1:]] + own
        return f"{type(error).__name__} at {' < '.join(own)}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def run(kind: str, number: int, keep: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = KINDS[kind][0](random.Random(f"{kind} {number}"), Path(folder))
        except (ValueError, OSError, UnicodeError, OverflowError, RuntimeError):  # a change that cannot be written down
            return "unmade"
        whole = outcome(kind, path)
        left = {entry.name for entry in Path(folder).iterdir() if entry.name.startswith(".atpatch-")}
        if left:
            whole = f"left behind: {left}"
        if whole not in ("right", "refused") and keep.is_dir():
            kept = keep / f"{kind}-{number}{path.suffix}"
            shutil.copytree(path, kept, dirs_exist_ok=True) if path.is_dir() else shutil.copyfile(path, kept)
        return whole


def again(kind: str, file: Path) -> str:
    """What becomes of a file that is there; of a copy of it, since what is made is written beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        shutil.copytree(file, path) if file.is_dir() else shutil.copyfile(file, path)
        (path.parent / seeds.DATA).write_bytes(seeds.external_data())
        return outcome(kind, path)


def main(kind: str, *rest: str) -> None:
    warm_up(kind)
    limit()
    if not rest[0].isdigit():
        for file in rest:
            say(file, again(kind, Path(file)))
        return
    first, count, keep = int(rest[0]), int(rest[1]), Path(rest[2])
    for number in range(first, first + count):
        say(number, run(kind, number, keep))


def say(case: int | str, whole: str) -> None:
    sys.stdout.write(json.dumps([case, whole]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
