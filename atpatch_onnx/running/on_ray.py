"""Workers on Ray: actors that open a job once and do its pieces, on this machine or on a cluster.

A model goes through Ray's object store as onnxruntime is given it, external data and stored inputs by paths that every
machine must have. A worker that dies is replaced, and another does its piece; only a piece that several die of ends it.
"""

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from atpatch_onnx.errors import AtPatchError, RunError, one_line
from atpatch_onnx.running.executors import AHEAD, BATCHES, Job, Kept, Team

ATTEMPTS = 4
"""Workers that a piece may be the death of."""

QUEUED = 2
"""Pieces that a worker has at a time: one that it is at, and the next."""

STARTS = 3
"""Starts of a cluster that are tried: half a minute, which Ray gives to each, is short on a busy machine."""

PATIENCE = 120.0
"""Seconds to wait for a first worker."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its coming default; the other one warns
}


def start(**how: Any) -> None:
    """Start or join a cluster, as `ray.init` does; once more where the time ran out that Ray gives to its start."""
    for left in reversed(range(STARTS)):
        try:
            ray.init(**how)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


class Ray(AbstractContextManager["Ray"]):
    """An executor on Ray, to be used in a `with`: a cluster that is started for it is stopped at the end.

    Args:
        address: `ray://HOST:PORT`; None: where this process uses Ray already, its cluster, else one on this machine.
        workers: None: as many as the cluster has room for.
        cpus: Of a worker; as many threads has a session.
        gpus: Of a worker, for sessions with a provider that needs one.
        object_store: Bytes for Ray's object store, of a cluster that is started here; None: Ray's choice.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        object_store: int | None = None,
    ) -> None:
        self.address, self.workers = address, workers
        self._cpus, self._gpus, self._object_store = cpus, gpus, object_store
        self._started = False
        self._crew: list[_Member] = []

    def __enter__(self) -> "Ray":
        self._started = not ray.is_initialized()
        if self._started:
            with _environment(), _own_signals():
                self._connect()
        room = ray.cluster_resources()
        count = self.workers or int(
            min(room.get("CPU", 0) // self._cpus, room.get("GPU", 0) // self._gpus if self._gpus else float("inf"))
        )
        if count < 1:
            self.__exit__()
            raise RunError(
                "the Ray cluster",
                expected=f"room for a worker of {self._cpus:g} CPUs and {self._gpus:g} GPUs",
                found=f"{room.get('CPU', 0):g} CPUs and {room.get('GPU', 0):g} GPUs",
                advice="Ask for smaller workers, or join machines to the cluster.",
            )
        self._crew = [self._member() for _ in range(count)]
        return self

    def __exit__(self, *unused: object) -> None:
        for member in self._crew:
            ray.kill(member.actor)
        self._crew = []
        if self._started:
            ray.shutdown()

    def team(self, job: Job[Any]) -> Team:
        """The workers, who open the job when they are given its first piece."""
        return _Team(self, job)

    def _connect(self) -> None:
        how: dict[str, Any] = {"address": self.address, "logging_level": "error", "log_to_driver": False}
        if self.address is None:
            how |= {"address": "local", "include_dashboard": False, "num_cpus": self._cpus_here()}
            how |= {} if self._object_store is None else {"object_store_memory": self._object_store}
        try:
            start(**how)
        except Exception as error:  # gRPC's, OSError, RuntimeError, ValueError
            raise RunError(
                self.address or "a Ray cluster on this machine",
                expected="one that can be reached, of this version of Ray and Python",
                found=one_line(error),
                advice="Is it running (ray start --head), and its port the one of the Ray client, 10001 by default?",
            ) from error

    def _cpus_here(self) -> int:
        """Of a cluster on this machine: no fewer than the workers that are asked for."""
        return max(os.cpu_count() or 1, int(-(-self._cpus * (self.workers or 1) // 1)))

    def _member(self) -> "_Member":
        actor = (
            ray.remote(_Worker)
            .options(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy="SPREAD")
            .remote()
        )
        return _Member(actor, actor.hello.remote())

    def replaced(self, member: "_Member") -> "_Member":
        """Another worker, which is in the crew instead."""
        other = self._member()
        self._crew[self._crew.index(member)] = other
        return other

    @property
    def crew(self) -> tuple["_Member", ...]:
        """Its workers at present."""
        return tuple(self._crew)


@dataclass(eq=False)
class _Member:
    """A worker, and the pieces that it has, the one that it is at first."""

    actor: Any
    hello: Any
    """Answered once it lives; None then."""

    has: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Piece:
    number: int
    item: Any
    attempts: int = 0


class _Worker:
    """In its own process: what it has opened."""

    def __init__(self) -> None:
        self._opened: dict[bytes, Any] = {}

    def hello(self) -> int:
        """Says that it lives."""
        return os.getpid()

    def run(self, key: bytes, job: list[Any], item: Any) -> list[Kept] | AtPatchError:
        """Do a piece; what fails is answered, too."""
        try:
            if key not in self._opened:
                if len(self._opened) > 1:  # a fit goes from one model to the next
                    del self._opened[next(iter(self._opened))]
                self._opened[key] = ray.get(job[0]).open()
            return list(item.run(self._opened[key]))
        except AtPatchError as error:
            return error
        except Exception as error:
            return _failed(item, one_line(error))


def _said(error: RayError) -> str:
    """What Ray says, without its tracebacks: what was raised comes last, why a worker died comes first."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayTaskError) else 0] if lines else 'nothing said'}"


def _failed(item: Any, found: str) -> RunError:
    return RunError(
        item.where,
        expected="a piece that a worker can do",
        found=found,
        advice="Try this piece alone, in this process (executor='local', --on local).",
    )


class _Team:
    """A crew at one job."""

    def __init__(self, of: Ray, job: Job[Any]) -> None:
        self._of, self._key = of, os.urandom(16)
        self._job = ray.put(job.shipped())

    @property
    def at_once(self) -> int:
        return BATCHES

    def map(self, items: Iterable[Any]) -> Iterator[list[Kept]]:
        """What came of each item, in their order."""
        left = enumerate(items)
        again: deque[_Piece] = deque()
        at: dict[Any, tuple[_Piece, _Member]] = {}
        done: dict[int, list[Kept]] = {}
        turn, ended, waited = 0, False, time.monotonic()
        while True:
            for member in self._free():
                if not again and not ended and len(at) + len(done) < AHEAD * len(self._of.crew):
                    number, item = next(left, (-1, None))
                    ended = number < 0
                    again.extend([] if ended else [_Piece(number, item)])
                if again:
                    piece = again.popleft()
                    ref = member.actor.run.remote(self._key, [self._job], piece.item)
                    member.has.append(ref)
                    at[ref] = piece, member
            if ended and not at and not again:
                return
            for ref in self._answered(at):
                waited = time.monotonic()
                found = self._result(ref, at, again)
                if found is not None:
                    done[found[0]] = found[1]
            self._awake(waited, at)
            while turn in done:
                yield done.pop(turn)
                turn += 1

    def _free(self) -> Iterator[_Member]:
        """Workers that may have another piece, those with the fewest first."""
        for most in range(QUEUED):
            yield from (member for member in self._of.crew if member.hello is None and len(member.has) <= most)

    def _answered(self, at: dict[Any, tuple[_Piece, _Member]]) -> list[Any]:
        """Pieces that are done or lost; workers that live by now, and such as died before, are seen to."""
        starting = {member.hello: member for member in self._of.crew if member.hello is not None}
        ready, _ = ray.wait([*at, *starting], num_returns=1, timeout=1.0)
        for ref in ready:
            if ref in starting:
                member = starting[ref]
                try:
                    ray.get(ref)
                    member.hello = None
                except RayError as error:
                    self._reason = _said(error)
                    self._of.replaced(member)
        return [ref for ref in ready if ref in at]

    def _result(
        self, ref: Any, at: dict[Any, tuple[_Piece, _Member]], again: deque[_Piece]
    ) -> tuple[int, list[Kept]] | None:
        piece, member = at[ref]
        try:
            found = ray.get(ref)
        except RayTaskError as error:  # the piece, or what it answers, does not go through Ray
            del at[ref]
            member.has.remove(ref)
            return piece.number, piece.item.instead(_failed(piece.item, _said(error)))
        except RayError as error:  # the worker died, or the machine with its answer left
            piece.attempts += member.has[0] == ref
            if member in self._of.crew:
                self._of.replaced(member)
            lost = [other for other in at if at[other][1] is member]
            again.extend(found for other in lost if (found := at.pop(other)[0]) is not piece)
            if piece.attempts >= ATTEMPTS:
                said = _failed(piece.item, f"the end of {ATTEMPTS} workers: {_said(error)}")
                return piece.number, piece.item.instead(said)
            again.append(piece)
            return None
        del at[ref]
        member.has.remove(ref)
        if isinstance(found, AtPatchError):
            raise found
        return piece.number, found

    _reason = "no worker answered"

    def _awake(self, waited: float, at: dict[Any, tuple[_Piece, _Member]]) -> None:
        """Refuse to wait for workers that nobody has room for."""
        if at or time.monotonic() - waited < PATIENCE:
            return
        raise RunError(
            "the Ray cluster",
            expected=f"a worker within {PATIENCE:g} seconds",
            found=self._reason,
            advice="Is atpatch-onnx installed on its machines, and is there room for a worker?",
        )


@contextmanager
def _environment() -> Iterator[None]:
    """Ray reads some of its settings from the environment only; what the user says there holds."""
    new = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; whoever had it keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
