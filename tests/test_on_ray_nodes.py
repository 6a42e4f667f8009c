"""On Ray with two nodes, of which one leaves in the middle: the same patch."""

from pathlib import Path

import pytest
from planted import QUICK, Planted, fitted
from spreading import ON_RAY

import atpatch_onnx as atp

pytestmark = ON_RAY
ray = pytest.importorskip("ray", reason="extra scale")

PLANTED = Planted(masked=True, tokens=12)
SMALL = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def content(patch: atp.Patch, folder: Path) -> bytes:
    patch.save(folder / "patch.safetensors")
    return (folder / "patch.safetensors").read_bytes()


def test_a_node_that_leaves_takes_nothing_with_it(tmp_path):
    from ray.cluster_utils import Cluster

    from atpatch_onnx.running.on_ray import Ray, start

    cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
    gone: list[object] = []
    try:
        other = cluster.add_node(**SMALL)
        start(address=cluster.address, logging_level="error", log_to_driver=False)
        with Ray() as executor:
            assert len(executor.crew) == 2

            def leave(stage: str, done: int, total: int) -> None:
                if stage == "collecting, clean inputs" and not gone:
                    gone.append(other)
                    cluster.remove_node(other)

            patch = atp.fit(PLANTED.model(), PLANTED.debug(), QUICK, executor=executor, progress=leave)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert gone
    assert content(patch, tmp_path) == content(fitted(PLANTED, QUICK), tmp_path)
