"""Files that appear whole or not at all, whenever a process is stopped or a disk is full."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows, where what a killed process leaves behind stays
    fcntl = None

_PREFIX = ".atpatch-staging-"
"""Folders of this name are ours to remove."""

_YOUNG = 60.0
"""Seconds within which a folder is left alone: it may not have been locked yet."""


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A private folder within `folder`, so on its file system; it is gone at the end.

    What was left behind in `folder` by processes that were killed goes, too: nobody holds its lock.

    Raises:
        OSError: `folder` is not there, or cannot be written to.
    """
    folder = folder.resolve(strict=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as made:
        lock = _lock(Path(made))
        _sweep(folder, Path(made).stat().st_mtime)
        try:
            yield Path(made)
        finally:
            if lock is not None:
                os.close(lock)


def write_whole(path: Path, content: bytes) -> None:
    """Put a file where another may be: whoever looks finds the old one or the new one.

    Raises:
        OSError: The place cannot be written to.
    """
    with staging(path.parent) as made:
        (made / "new").write_bytes(content)
        os.replace(made / "new", path)


def _lock(folder: Path) -> int | None:
    """A lock that goes with the process; None where somebody else has it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _sweep(folder: Path, now: float) -> None:
    """`now` is the file system's own: its clock may be another than ours."""
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another run sweeps, too
            if not left.is_dir() or left.is_symlink() or now - left.stat().st_mtime < _YOUNG:
                continue
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
