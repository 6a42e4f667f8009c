"""Exchange the fix of a session for half an hour, and see whether memory stays where it was.

    python -m samples.soak --out demo-out                  # 30 minutes, a swap a second, of what `make demo` made
    python -m samples.soak --out demo-out --minutes 1

A swap opens two or three sessions of onnxruntime and lets go of as many. Requests are served in between. The last line
is JSON: swaps, requests, and resident memory in MiB after each tenth of the time.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.running.drawing import draw_inputs


def main(arguments: list[str] | None = None) -> int:
    """Swap and serve; 1 where memory grew by more than a fiftieth from the first half, its median, to the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder with patched.onnx, fix.safetensors")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between swaps")
    options = parser.parse_args(arguments)
    patch = atp.Patch.load(options.out / "fix.safetensors")
    inputs = draw_inputs(atp.load(options.out / "patched.onnx"), np.random.default_rng(0))
    session = atp.PatchedSession(options.out / "patched.onnx")
    seconds = 60 * options.minutes
    begun, swaps, requests = time.monotonic(), 0, 0
    memory: list[float] = []
    while time.monotonic() - begun < seconds:
        session.swap(shifted(patch, swaps % 2))
        swaps += 1
        until = time.monotonic() + options.pause
        while time.monotonic() < until:
            session.run(None, inputs)
            requests += 1
            time.sleep(0.05)
        if time.monotonic() - begun > seconds * (len(memory) + 1) / 10:
            memory.append(resident())
    print(json.dumps({"minutes": options.minutes, "swaps": swaps, "requests": requests, "mib": memory}))
    half = len(memory) // 2
    return int(np.median(memory[half:]) > 1.02 * np.median(memory[:half]))


def shifted(patch: atp.Patch, number: int) -> atp.Patch:
    """The patch, or the same with other thresholds."""
    if number == 0:
        return patch
    sites = tuple(
        site
        if site.detector is None
        else replace(site, detector=replace(site.detector, threshold=site.detector.threshold + 0.1))
        for site in patch.sites
    )
    return replace(patch, sites=sites)


def resident() -> float:
    """Resident memory of this process, MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
