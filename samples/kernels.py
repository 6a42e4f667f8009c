"""How much of a patched file's time its own kernels take, added up."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import atpatch_onnx as atp
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.measuring.benchmark import synthetic_patch
from atpatch_onnx.measuring.drawn import NEVER
from atpatch_onnx.running.sessions import Array

RUNS = 12
"""Runs of which the median of each kernel is taken; the first two do not count."""


def kernels(base: Path, inputs: Mapping[str, Array], threads: int) -> dict[str, float]:
    """Time of our kernels over that of all others, by whether inputs are clean or flagged, and how many ours are.

    A patch at every site, as `atpatch benchmark` draws it. A kernel's time is its median over some runs; what lies
    inside an `If` is part of the `If`.
    """
    model = atp.load(base)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patched.onnx"
        atp.save(atp.bake(model, synthetic_patch(model)), path, external="link")
        names = read_record(atp.load(path)).thresholds
        for side, value in (("clean", NEVER), ("flagged", -NEVER)):
            threshold = ort.OrtValue.ortvalue_from_numpy(np.array([value], np.float32))
            spent = _profiled(path, dict.fromkeys(names, threshold), inputs, threads, folder)
            ours = sum(time for name, time in spent.items() if name.startswith(PREFIX))
            found[side] = 1 + ours / (sum(spent.values()) - ours)
            found["count"] = sum(name.startswith(PREFIX) for name in spent)
    return found


def _profiled(
    path: Path, weights: Mapping[str, Any], inputs: Mapping[str, Array], threads: int, folder: str
) -> dict[str, float]:
    """Median time of each kernel of the main graph, in microseconds."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = f"{folder}/profile"
    for name, value in weights.items():
        options.add_initializer(name, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    main = {node.name for node in atp.load(path).graph if node.op_type == "If"}
    for _ in range(RUNS):
        session.run(None, dict(inputs))
    events = json.loads(Path(session.end_profiling()).read_text())
    taken = defaultdict(list)
    spans = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "Node" and event["name"].removesuffix("_kernel_time") in main
    ]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name, start = event["name"].removesuffix("_kernel_time"), event["ts"]
        if name in main or not any(begin <= start < end for begin, end in spans):
            taken[name].append(event["dur"])
    return {name: float(np.median(times[2:] or times)) for name, times in taken.items()}
