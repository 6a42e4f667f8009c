"""Files are the old ones or the new ones, whatever stops the process that writes them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.files import staging, write_whole


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".atpatch-"))


def test_a_file_is_replaced_and_nothing_is_left(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert left(tmp_path) == []


def interrupted(folder: Path) -> None:
    with staging(folder) as made:
        (made / "new").write_bytes(b"ne")
        raise KeyboardInterrupt


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from atpatch_onnx.files import staging
with staging(Path(sys.argv[1])) as made:
    (made / "new").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A process is in the middle of it; at the end it is killed."""
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.kill()


def aged(folder: Path) -> None:
    """As if what is left there were two minutes old."""
    for name in left(folder):
        os.utime(folder / name, (time.time() - 120,) * 2)


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path):
    with writing(tmp_path):
        pass
    assert len(left(tmp_path)) == 1
    write_whole(tmp_path / "file", b"new")
    assert len(left(tmp_path)) == 1, "it might be one that is not locked yet"
    aged(tmp_path)
    write_whole(tmp_path / "file", b"new")
    assert left(tmp_path) == []


def test_what_another_process_writes_stays(tmp_path):
    with writing(tmp_path):
        aged(tmp_path)
        write_whole(tmp_path / "file", b"new")
        assert len(left(tmp_path)) == 1


def gone(process: int) -> None:
    """Wait until it is: what was interrupted tidies up first; an interrupt within a destructor is lost."""
    for tries in range(6000):
        try:
            os.kill(process, signal.SIGKILL if tries == 500 else 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


WRITERS = """
import os, signal, sys
from pathlib import Path
import numpy as np
import atpatch_onnx as atp
from models import Net, draw_patch
from atpatch_onnx.debugset import DebugSet

folder, model = Path(sys.argv[1]), Net().model()
works = []
for seed in (0, 1):
    patch, x = draw_patch(model, seed), np.full((200, 8, 8), seed, np.float32)
    works.append((patch, atp.bake(model, patch), DebugSet.from_pairs({"x": x}, {"x": x + 1})))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        patch, patched, debug = works[int(line)]
        while True:
            patch.save(folder / "fix.safetensors")
            atp.save(patched, folder / "patched.onnx")
            debug.save(folder / "debug.npz")
    print(child, flush=True)
"""
"""Starts a process that writes the files of a seed again and again, for every seed that it is told."""

KINDS = ("fix.safetensors", "patched.onnx", "debug.npz")
STOPS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def test_killed_at_any_moment_files_are_old_or_new(tmp_path, request):
    """Each process writes over what another seed's wrote; whatever is found is one of the two, whole."""
    rng = np.random.default_rng(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as parent:
        assert parent.stdout.readline() == "ready\n"

        def started(seed: int) -> int:
            print(seed, file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        whole = {name: set() for name in KINDS}
        for seed in (0, 1):
            child = started(seed)
            while any(len(found) <= seed for found in whole.values()):
                for name, found in whole.items():
                    found.update([(tmp_path / name).read_bytes()] if (tmp_path / name).exists() else [])
            os.kill(child, signal.SIGKILL)
        assert all(len(found) == 2 for found in whole.values())
        for number in range(request.config.getoption("--kills")):
            gone(child)
            child = started(number % 2)
            time.sleep(float(rng.uniform(0, 0.15)))
            os.kill(child, STOPS[number % 3])
            for name, found in whole.items():
                assert (tmp_path / name).read_bytes() in found, (name, number)
        gone(child)
        parent.stdin.close()
    aged(tmp_path)
    write_whole(tmp_path / "fix.safetensors", (tmp_path / "fix.safetensors").read_bytes())
    assert left(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(KINDS)
