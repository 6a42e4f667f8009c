"""On Ray, a cluster on this machine: the same bytes as here, with one worker or two, also where one is killed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import QUICK, Planted, fitted
from spreading import ON_RAY, Dying, Failing

import atpatch_onnx as atp
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset import column_files as files
from atpatch_onnx.errors import AtPatchError, DebugSetError, RunError
from atpatch_onnx.matching import batching
from atpatch_onnx.running.executors import Executor, Resuming
from atpatch_onnx.running.shards import Models, Opening, SpreadSession, stream

pytestmark = ON_RAY
ray = pytest.importorskip("ray", reason="extra scale")

PLANTED = Planted(masked=True, tokens=12)
STORE = 100 * 2**20
"""Bytes of the object store: Ray's least is 75 MiB."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with room for three small workers, who find what these tests give them."""
    from atpatch_onnx.running.on_ray import start

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    start(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=STORE,
        logging_level="error",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def crew(cluster: None, request: pytest.FixtureRequest) -> Iterator[Executor]:
    from atpatch_onnx.running.on_ray import Ray

    with Ray(workers=request.param) as executor:
        yield executor
    assert ray.is_initialized(), "it was there before, and stays"


@pytest.fixture
def two(cluster: None) -> Iterator[Executor]:
    from atpatch_onnx.running.on_ray import Ray

    with Ray(workers=2) as executor:
        yield executor


def content(patch: atp.Patch, folder: Path) -> bytes:
    patch.save(folder / "patch.safetensors")
    return (folder / "patch.safetensors").read_bytes()


def evaluation(debug: DebugSet, **options: Any) -> str:
    model = PLANTED.model()
    return json.dumps(atp.evaluate(model, atp.bake(model, fitted(PLANTED)), debug, **options).to_json())


def test_a_patch_and_an_evaluation_are_the_same(crew, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "GROUP_BYTES", 50_000)
    PLANTED.debug().save(tmp_path / "set.parquet")
    expected = content(fitted(PLANTED, QUICK), tmp_path)
    for debug in (PLANTED.debug(), DebugSet.load(tmp_path / "set.parquet")):
        assert content(atp.fit(PLANTED.model(), debug, QUICK, executor=crew), tmp_path) == expected
        other = debug.take(np.arange(7, 200))
        assert evaluation(other, executor=crew) == evaluation(other)


def dying(executor: Executor, folder: Path, times: int) -> list[np.ndarray]:
    folder.mkdir()
    model, (inputs, _, _) = PLANTED.model(), PLANTED.inputs(600)
    team = executor.team(Models((Opening(model, batching(model)),)))
    groups = {"inputs": inputs, "marks": {"row": np.arange(600)}}
    return [kept["row"] for _, kept in stream(team, Dying(str(folder), 300, times), groups, batch_size=8)]


def test_workers_that_are_killed_are_replaced(crew, tmp_path):
    rows = dying(crew, tmp_path / "deaths", 3)
    assert np.array_equal(np.concatenate(rows), np.arange(600))
    assert len(list((tmp_path / "deaths").iterdir())) == 3


class Killing:
    """Kills the first worker once, while a stage whose name begins so is at work."""

    def __init__(self, executor: Executor, stage: str = "") -> None:
        self.executor, self.stage = executor, stage
        self.killed: list[int] = []

    def worker(self) -> int:
        return ray.get(self.executor.crew[0].actor.hello.remote())

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage.startswith(self.stage) and not self.killed:
            self.killed.append(self.worker())
            os.kill(self.killed[0], 9)


def test_a_patch_is_the_same_where_a_worker_is_killed(two, tmp_path):
    killing = Killing(two, "collecting, counterfactual")
    patch = atp.fit(PLANTED.model(), PLANTED.debug(), QUICK, executor=two, progress=killing)
    assert content(patch, tmp_path) == content(fitted(PLANTED, QUICK), tmp_path)
    assert killing.killed
    assert killing.killed[0] != killing.worker()


def test_an_evaluation_is_the_same_where_a_worker_is_killed(two):
    killing, debug = Killing(two), PLANTED.debug(400, seed=8)
    assert evaluation(debug, executor=two, progress=killing) == evaluation(debug)
    assert killing.killed
    assert killing.killed[0] != killing.worker()


def test_a_piece_that_workers_die_of_is_named(two, tmp_path):
    with pytest.raises(RunError, match=r"inputs 256 to 319: .* the end of 4 workers") as caught:
        dying(two, tmp_path / "deaths", 99)
    assert "\n" not in str(caught.value)
    again = dying(two, tmp_path / "none", 0)
    assert len(again) == 75, "the others work on"


def test_a_shard_that_cannot_be_read_is_named(two, tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(3):
        PLANTED.debug(60, seed=number).save(tmp_path / "set" / f"{number}.parquet")
    debug, broken = DebugSet.load(tmp_path / "set"), tmp_path / "set" / "1.parquet"
    broken.write_bytes(b"PAR1" + bytes(broken.stat().st_size - 8) + b"PAR1")
    with pytest.raises(DebugSetError, match=r"1\.parquet: row group 0") as caught:
        evaluation(debug, executor=two)
    assert "\n" not in str(caught.value)


def test_what_fails_otherwise_is_one_line_too(two):
    model, (inputs, _, _) = PLANTED.model(), PLANTED.inputs(100)
    session = SpreadSession(model, executor=two, batching=batching(model))
    with pytest.raises(AtPatchError, match=r"inputs 0 to 63: .* ZeroDivisionError: at this row\. Try this piece alone"):
        list(session.keep(Failing(3), {"inputs": inputs, "marks": {"row": np.arange(100)}}, batch_size=8))


def test_finished_pieces_are_kept(two, tmp_path):
    debug = PLANTED.debug(200, seed=8)
    kept = Resuming(two, tmp_path / "kept")
    assert evaluation(debug, executor=kept) == evaluation(debug)
    pieces = set((tmp_path / "kept").iterdir())
    assert pieces
    assert evaluation(debug, executor=Resuming(Nobody(), tmp_path / "kept")) == evaluation(debug)


class Nobody:
    def team(self, job):
        raise AssertionError("nothing is left to do")


def test_a_cluster_without_room_is_said_in_one_line(cluster):
    from atpatch_onnx.running.on_ray import Ray

    with pytest.raises(RunError, match=r"room for a worker of 1 CPUs and 1 GPUs; found 3 CPUs and 0 GPUs"), Ray(gpus=1):
        pass


def test_the_command_starts_a_cluster_and_stops_it(tmp_path):
    """As people do it, in a separate process: nothing but the result is printed, and nothing of Ray stays."""
    (tmp_path / "base.onnx").write_bytes(PLANTED.proto().SerializeToString())
    atp.save(atp.bake(PLANTED.model(), fitted(PLANTED)), tmp_path / "patched.onnx")
    PLANTED.debug(100, seed=8).save(tmp_path / "set.parquet")
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = [
        subprocess.run(
            [
                sys.executable,
                "-m",
                "atpatch_onnx",
                *["evaluate", "base.onnx", "patched.onnx", "set.parquet", "--json"],
                *on,
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=where,
        )
        for on in (["--on", "ray", "--workers", "1"], [])
    ]
    assert [one.returncode for one in said] == [0, 0], said
    assert said[0].stderr == ""
    assert said[0].stdout == said[1].stdout


def test_a_cluster_that_is_not_there_is_said_in_one_line(tmp_path):
    program = "from atpatch_onnx.running.executors import executing\nwith executing('ray://127.0.0.1:1'): pass"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("atpatch_onnx.errors.RunError: ray://127.0.0.1:1: expected one that can be reached"), last
