"""Build the page: the demo's base and patched model, a few digits, onnxruntime-web, and the page's own three files.

    atpatch demo --out demo-out
    npm install --prefix samples/browser
    python -m samples.browser.build --demo demo-out --out out/browser
    python -m http.server --directory out/browser       # then open http://localhost:8000

The folder is all there is: any server of static files serves it, and nothing a visitor draws leaves the browser.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

import atpatch_onnx as atp
from atpatch_onnx.baking.maps import map_outputs, with_maps
from atpatch_onnx.cli import demo_digits as digits
from atpatch_onnx.cli.demo_run import TARGET, TRIGGER
from atpatch_onnx.graph.names import flags_name
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.sessions import Session

HERE = Path(__file__).parent
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page needs of onnxruntime-web."""

SHOWN = 20
"""Evaluation digits to pick from, two of each class."""


def build(demo: Path, out: Path, *, modules: Path = HERE / "node_modules", seed: int = 0) -> None:
    """Write the page into `out`.

    Args:
        demo: What `atpatch demo` left, with the same seed.
        out: Made if it is not there.
        modules: Where npm put onnxruntime-web.
        seed: Of the demo: which digits its training and its fit did not see.
    """
    out.mkdir(parents=True, exist_ok=True)
    base, patch = atp.load(demo / "base.onnx"), atp.Patch.load(demo / "fix.safetensors")
    patched = atp.bake(base, patch, target="web", site_flags=True)
    chosen = next(entry.site for entry in patch.sites if entry.neutral is not None)
    site = next(site for site in atp.find_sites(base) if site.name == chosen)
    base, patched = (with_maps(model, [site], []) for model in (base, patched))
    atp.save(base, out / "base.onnx")
    atp.save(patched, out / "patched.onnx")
    (out / "digits.json").write_text(json.dumps(_digits(base, patched, site, seed)))
    for file in (HERE / "page").iterdir():
        shutil.copy(file, out / file.name)
    for name in RUNTIME:
        shutil.copy(modules / "onnxruntime-web" / "dist" / name, out / name)


def _digits(base: ir.Model, patched: ir.Model, site: AttentionSite, seed: int) -> dict[str, object]:
    """The digits to pick from, the trigger, the names of outputs, and what onnxruntime says of each digit."""
    data = digits.load()
    unseen = data.take(digits.split(data.labels, seed=seed).evaluation)
    chosen = np.concatenate([np.flatnonzero(unseen.labels == label)[: SHOWN // 10] for label in range(digits.CLASSES)])
    images, labels = unseen.images[chosen], unseen.labels[chosen]
    stamped = TRIGGER.stamp(images, np.random.default_rng(seed))
    wanted = {
        name: Session(model).collect({"pixel_values": inputs}, ["logits"])["logits"].tolist()
        for name, model, inputs in (
            ("base", base, images),
            ("patched", patched, images),
            ("base_stamped", base, stamped),
            ("patched_stamped", patched, stamped),
        )
    }
    return {
        "images": images.reshape(len(images), -1).tolist(),
        "labels": labels.tolist(),
        "target": TARGET,
        "trigger": {"row": TRIGGER.row, "column": TRIGGER.column, "size": TRIGGER.size},
        "outputs": {"flags": flags_name(site.name), "map": map_outputs([site])[site.name], "site": site.name},
        "expected": wanted,
    }


def main(arguments: list[str] | None = None) -> int:
    """Build the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="what the demo left")
    parser.add_argument("--out", type=Path, default=Path("out/browser"), help="the page's folder")
    options = parser.parse_args(arguments)
    build(options.demo, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
