"""Models run over inputs in batches, whoever runs them: what a worker is given, and what it keeps.

    inputs [samples, ...]  ->  shards, some batches each  ->  a worker's sessions  ->  what `Work` keeps of each batch

Batches are those of `Session.stream`, wherever the data lies and however many workers there are: so a result keeps its
bits. A shard has its rows, or says where they are stored (`debugset.rows`), and the worker reads them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.debugset.rows import Table, kept_by, part_of, stored
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.running.batching import AS_GIVEN, Batching
from atpatch_onnx.running.executors import LOCAL, Executor, Kept, Team, key_of
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Progress, Session, Shipped, joined, silent

Groups = Mapping[str, Mapping[str, Array]]
"""Arrays `[samples, ...]` by group and name: the two sides of a debug set, say, and what belongs to each pair."""


@dataclass(frozen=True, eq=False)
class Opening:
    """How a session is opened; arguments as in `Session`."""

    model: ir.Model | Shipped
    batching: Batching = AS_GIVEN
    providers: Providers = ("cpu",)
    threads: int | None = None

    def open(self) -> Session:
        """In the process that runs it."""
        return Session(self.model, batching=self.batching, providers=self.providers, threads=self.threads)

    def batch_size(self, names: Sequence[str], free: int) -> int:
        """The batch size of inputs of these names: the model's, or `free` where it leaves it so."""
        if self.batching.one_by_one:
            return 1
        assert isinstance(self.model, ir.Model), "those who cut batches have the model itself"
        for value in self.model.graph.inputs:
            axis = self.batching.axis(value.name or "")
            if value.name in names and value.shape is not None and axis is not None and axis < len(value.shape):
                size = value.shape[axis]
                if isinstance(size, int):
                    return size
        return free


@dataclass(frozen=True, eq=False)
class Ready:
    """What a worker has opened."""

    sessions: tuple[Session, ...]
    tables: dict[bytes, Table] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Models:
    """The sessions that some work is done with."""

    openings: tuple[Opening, ...]

    def open(self) -> Ready:
        """All of them."""
        return Ready(tuple(opening.open() for opening in self.openings))

    def shipped(self) -> "Models":
        """With models as bytes; external data stays where it is."""
        return Models(
            tuple(
                replace(one, model=Shipped.of(one.model)) if isinstance(one.model, ir.Model) else one
                for one in self.openings
            )
        )

    def key(self) -> bytes:
        """Of what the models are and how they are opened; external data counts by size and time."""
        parts: dict[str, Any] = {}
        for number, one in enumerate(self.shipped().openings):
            assert isinstance(one.model, Shipped)
            files = [] if one.model.folder is None else sorted(_stamps(self.openings[number].model))
            parts[str(number)] = one.model.source if isinstance(one.model.source, bytes) else one.model.source.encode()
            parts[f"{number} how"] = [files, repr(one.batching), repr(one.providers), one.threads]
        return key_of(**parts)


def _stamps(model: ir.Model | Shipped) -> set[tuple[str, int, int]]:
    assert isinstance(model, ir.Model)
    files = {tensor.path for tensor in graphs.tensors(model) if isinstance(tensor, ir.ExternalTensor)}
    return {(str(path), (found := os.stat(path)).st_size, found.st_mtime_ns) for path in files}


class Work(Protocol):
    """What is done with a batch; a frozen dataclass of plain types, at the top of its module."""

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        """What is kept of a batch."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Some batches of samples."""

    work: Work
    rows: slice
    """Which of the samples."""

    size: int
    """Samples of a batch."""

    groups: Groups
    """Of these samples only."""

    @property
    def where(self) -> str:
        """The rows, and the files where they are stored."""
        found = (stored(array) for group in self.groups.values() for array in group.values())
        sources = {rows.where for rows in found if rows is not None}
        return ", ".join([f"inputs {self.rows.start} to {self.rows.stop - 1}", *sorted(sources)])

    def run(self, opened: Ready) -> Iterator[Kept]:
        """Batch by batch."""
        groups = {
            group: {name: kept_by(array, opened.tables) for name, array in arrays.items()}
            for group, arrays in self.groups.items()
        }
        for start in range(0, self.rows.stop - self.rows.start, self.size):
            part = slice(start, min(start + self.size, self.rows.stop - self.rows.start))
            batch = {
                group: {name: np.ascontiguousarray(array[part]) for name, array in arrays.items()}
                for group, arrays in groups.items()
            }
            yield self.work(opened.sessions, batch)

    def instead(self, error: AtPatchError) -> list[Kept]:
        """Samples that are missing are missing."""
        raise error

    def key(self) -> bytes:
        """Of the work and the data."""
        arrays: dict[str, Any] = {
            f"{group}/{name}": array if (rows := stored(array)) is None else rows.key()
            for group, arrays in self.groups.items()
            for name, array in arrays.items()
        }
        work = {field.name: getattr(self.work, field.name) for field in fields(self.work)}  # type: ignore[arg-type]
        return key_of(work=type(self.work).__name__, how=work, size=self.size, data=arrays)


def stream(
    team: Team,
    work: Work,
    groups: Groups,
    *,
    batch_size: int,
    progress: Progress = silent,
    stage: str = "running",
) -> Iterator[tuple[slice, Kept]]:
    """Which samples, and what was kept of them, batch by batch, in their order.

    Args:
        team: Who has opened the models.
        work: What is done with a batch.
        groups: Arrays `[samples, ...]`, all of one length.
        batch_size: Samples at a time.
        progress: Told after every batch.
        stage: What to tell it.
    """
    samples = len(next(iter(next(iter(groups.values())).values())))
    step = batch_size * team.at_once
    shards = (
        Shard(
            work,
            part,
            batch_size,
            {group: {name: part_of(array, part) for name, array in arrays.items()} for group, arrays in groups.items()},
        )
        for part in (slice(start, min(start + step, samples)) for start in range(0, samples, step))
    )
    start = 0
    for kept in team.map(shards):
        for one in kept:
            part = slice(start, min(start + batch_size, samples))
            start = part.stop
            yield part, one
            progress(stage, part.stop, samples)


@dataclass(frozen=True, eq=False)
class Outputs:
    """All of some outputs; `constants` are inputs without samples."""

    names: tuple[str, ...] | None
    constants: Mapping[str, Array] = field(default_factory=dict)

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        """Outputs by name."""
        return sessions[0].batch(batch["inputs"], self.names, constants=self.constants)


class SpreadSession:
    """A session as in `Session`, of whoever the executor has; what it is asked and answers is the same.

    Args:
        model: The model.
        executor: Who runs it.
        batching: As in `Session`, as the next.
        providers: Execution providers.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        executor: Executor = LOCAL,
        batching: Batching = AS_GIVEN,
        providers: Providers = ("cpu",),
    ) -> None:
        self._opening = Opening(model, batching, providers)
        self._team = executor.team(Models((self._opening,)))

    def stream(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        constants: Mapping[str, Array] | None = None,
        progress: Progress = silent,
        stage: str = "running",
    ) -> Iterator[tuple[slice, Kept]]:
        """As `Session.stream`."""
        yield from self.keep(
            Outputs(None if outputs is None else tuple(outputs), constants or {}),
            {"inputs": inputs},
            batch_size=batch_size,
            progress=progress,
            stage=stage,
        )

    def keep(
        self,
        work: Work,
        groups: Groups,
        *,
        batch_size: int = 32,
        progress: Progress = silent,
        stage: str = "running",
    ) -> Iterator[tuple[slice, Kept]]:
        """What some work keeps of every batch; of several groups, the first are the model's inputs."""
        size = self._opening.batch_size(tuple(next(iter(groups.values()))), batch_size)
        yield from stream(self._team, work, groups, batch_size=size, progress=progress, stage=stage)

    def collect(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        constants: Mapping[str, Array] | None = None,
        progress: Progress = silent,
        stage: str = "running",
    ) -> dict[str, Array]:
        """As `Session.collect`."""
        run: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "stage": stage}
        return joined(self.stream(inputs, outputs, constants=constants, **run))
