"""Who does what is done piece by piece: this process, one after the other, or workers elsewhere.

A team is given items and answers what came of each, **in the order of the items**, whatever the order in which they are
finished. So what is made of the answers is the same for any number of workers: sums are added up in one order.

An item says how it is done, of what the job opened: most often sessions of models (`running.shards`).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.errors import AtPatchError, RunError, one_line, require
from atpatch_onnx.files import write_whole

Kept = Mapping[str, NDArray[Any]]
"""What is kept of a piece of work: arrays by name, and nothing else, so that it may go anywhere and lie on a disk."""

Opened = TypeVar("Opened", contravariant=True)
Opens = TypeVar("Opens", covariant=True)


class Job(Protocol[Opens]):
    """What workers open once, of plain types."""

    def open(self) -> Opens:
        """In the worker."""

    def shipped(self) -> "Job[Opens]":
        """The same for another process."""

    def key(self) -> bytes:
        """The same for the same job only."""


class Item(Protocol[Opened]):
    """A piece of work."""

    @property
    def where(self) -> str:
        """Which one, for messages."""

    def run(self, opened: Opened) -> Iterable[Kept]:
        """Do it with what the job opened."""

    def instead(self, error: AtPatchError) -> list[Kept]:
        """What is kept where workers died of it, or the error is raised again: nothing can stand for it."""

    def key(self) -> bytes:
        """The same for the same piece of the same data only."""


class Team(Protocol):
    """Workers that have opened a job."""

    @property
    def at_once(self) -> int:
        """Batches that an item should have."""

    def map(self, items: Iterable[Any]) -> Iterator[Iterable[Kept]]:
        """What came of each item, in their order.

        Raises:
            AtPatchError: One failed; it says which.
        """


class Executor(Protocol):
    """Who does the work."""

    def team(self, job: Job[Any]) -> Team:
        """Workers for a job."""


@dataclass(frozen=True, eq=False)
class _InProcess:
    opened: Any

    @property
    def at_once(self) -> int:
        return 1

    def map(self, items: Iterable[Any]) -> Iterator[Iterable[Kept]]:
        for item in items:
            yield item.run(self.opened)


@dataclass(frozen=True)
class Local:
    """One piece after the other, in this process; an onnxruntime session has its threads all the same."""

    def team(self, job: Job[Any]) -> Team:
        """The job, opened here."""
        return _InProcess(job.open())


LOCAL = Local()


@dataclass(frozen=True, eq=False)
class Resuming:
    """Another executor whose finished pieces are kept in a folder: work that was stopped goes on where it was.

    A piece is known by its job, its options and its data: of a file by path, size and time, of arrays by content.
    """

    executor: Executor
    folder: Path

    def team(self, job: Job[Any]) -> Team:
        """Workers of the other executor, who are asked for what is not kept yet.

        Raises:
            RunError: The folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(self.folder, error) from error
        return _Keeping(self, job, job.key())


@dataclass(eq=False)
class _Keeping:
    of: Resuming
    job: Job[Any]
    key: bytes
    _team: Team | None = None

    @property
    def at_once(self) -> int:
        return BATCHES

    def map(self, items: Iterable[Any]) -> Iterator[Iterable[Kept]]:
        """Neighbours that are not kept yet are asked for together, so that workers have enough to do."""
        asked: list[tuple[Any, Path]] = []
        for item in items:
            file = self.of.folder / f"{sha256(self.key + item.key()).hexdigest()[:32]}.npz"
            if not file.is_file() and len(asked) < _ASKED:
                asked.append((item, file))
                continue
            yield from self._made(asked)
            asked = []
            if file.is_file():
                yield _read(file)
            else:
                asked = [(item, file)]
        yield from self._made(asked)

    def _made(self, asked: Sequence[tuple[Any, Path]]) -> Iterator[Iterable[Kept]]:
        if not asked:
            return
        if self._team is None:  # nothing is opened where all is kept
            self._team = self.of.executor.team(self.job)
        for (_, file), found in zip(asked, self._team.map([item for item, _ in asked]), strict=True):
            kept = list(found)
            try:
                write_whole(file, _packed(kept))
            except OSError as error:
                raise _refused(self.of.folder, error) from error
            yield kept


BATCHES = 8
"""Of an item for another process, or for a file: enough to be worth the way."""

AHEAD = 4
"""Pieces, for each worker, that may be done before an earlier one is: they are held until it is."""

_ASKED = 64
"""Items that are asked for together: many times as many as there are workers, and few enough to be held."""


def _packed(kept: Sequence[Kept]) -> bytes:
    file = BytesIO()
    arrays: Any = {f"{number}/{name}": array for number, one in enumerate(kept) for name, array in one.items()}
    np.savez(file, **arrays)
    return file.getvalue()


def _read(file: Path) -> list[dict[str, NDArray[Any]]]:
    found: dict[int, dict[str, NDArray[Any]]] = {}
    try:
        with np.load(BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            for key in arrays.files:
                number, _, name = key.partition("/")
                found.setdefault(int(number), {})[name] = arrays[key]
    except Exception as error:  # zipfile and numpy's header parser raise a dozen types
        raise _refused(file, error) from error
    return [found[number] for number in sorted(found)]


def _refused(where: Path, error: Exception) -> RunError:
    return RunError(
        str(where),
        expected="a folder for finished pieces, and whole files in it",
        found=one_line(error),
        advice="Name another folder, or remove what is damaged.",
    )


def key_of(**parts: Any) -> bytes:
    """A digest of what is given by name: of arrays and bytes their content, of other things what they look like."""
    digest = sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, np.ndarray):
            content = f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        elif isinstance(part, Mapping):
            content = key_of(**part)
        else:
            content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.digest()


@contextmanager
def executing(
    on: "Executor | str", *, workers: int | None = None, resume: str | os.PathLike[str] | None = None
) -> Iterator[Executor]:
    """The executor itself, or the one of a name, which is stopped at the end.

    Args:
        on: `local`, `ray` (a cluster on this machine, for this work), `ray://HOST:PORT` (one that is there), or an
            executor.
        workers: How many a cluster is asked for; None: as many as it has room for.
        resume: A folder for finished pieces; None: nothing is kept.

    Raises:
        RunError: There is no such executor, or the cluster cannot be reached.
        MissingExtraError: Ray is not installed.
    """
    with _named(on, workers) if isinstance(on, str) else nullcontext(on) as executor:
        yield executor if resume is None else Resuming(executor, Path(resume))


def _named(on: str, workers: int | None) -> AbstractContextManager[Executor]:
    if on == "local":
        return nullcontext(LOCAL)
    if on != "ray" and not on.startswith("ray://"):
        raise RunError(
            "who is to run models",
            expected="local, ray, or ray://HOST:PORT",
            found=repr(on),
            advice="Name one of these (executor=, --on).",
        )
    require("ray", "scale", "running models on Ray")
    from atpatch_onnx.running.on_ray import Ray

    return Ray(None if on == "ray" else on, workers=workers)
