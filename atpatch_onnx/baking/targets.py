"""Where a patched file will run, and what that asks of the file.

A runtime's own limits are measured where it is at hand (`tests/test_runtimes.py`, `docs/evidence/runtimes.md`) and
read from its documents where it is not: `evidence` says which.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph import opset_version
from atpatch_onnx.graph.names import SITE_KEY

OWN_DOMAINS = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class Target:
    """How a patch is written for one kind of runtime, and which files it takes."""

    conditional: bool
    """Whether replacements stand in an `If`."""

    why: str
    evidence: str

    opset: int | None = None
    ir_version: int | None = None
    """The highest of the ONNX operators, and of the file format; None: none is known."""

    without: frozenset[str] = frozenset()
    """Operators that may not stand in the file, the base's own included."""

    standard: bool = False
    """Whether all operators must be ONNX's own: no runtime's fused ones."""


_RUNTIMES = "tests/test_runtimes.py"
_of_onnxruntime = partial(Target, opset=26, ir_version=13)

TARGETS: Mapping[str, Target] = {
    "cpu": _of_onnxruntime(
        conditional=True, why="one copy of keys and values costs less than choosing between two", evidence=_RUNTIMES
    ),
    "cuda": _of_onnxruntime(
        conditional=False,
        why="reading the condition of an If makes the device wait, and CUDA graphs cannot capture one",
        evidence="microsoft/onnxruntime#9978; tests/test_kernels.py",
    ),
    "tensorrt": Target(
        conditional=False,
        why="If is restricted in the shapes of its branches",
        evidence="onnx/onnx-tensorrt, docs/operators.md",
    ),
    "directml": Target(
        conditional=False,
        why="reading the condition of an If makes the device wait; later opsets run slowly, if at all",
        evidence="onnxruntime's documentation, DirectML execution provider",
        opset=20,
        ir_version=13,
    ),
    "coreml": _of_onnxruntime(
        conditional=False,
        why="If is not among the operators that are handed to Core ML, and would split the graph",
        evidence="onnxruntime's documentation, CoreML execution provider",
    ),
    "web": _of_onnxruntime(
        conditional=False,
        why="WebNN has no If, and in WebGPU reading its condition makes the device wait",
        evidence=f"{_RUNTIMES} (WebAssembly); tests/test_webgpu.py (WebGPU); onnxruntime-web, docs/webnn-operators.md",
    ),
    "openvino": Target(
        conditional=False, why="what comes out of an If is not always what its branch computed", evidence=_RUNTIMES
    ),
    "portable": Target(
        conditional=False,
        why="what ran on every runtime tried: decomposed attention, no If",
        evidence=_RUNTIMES,
        opset=18,
        ir_version=10,
        without=frozenset({"If", "Attention"}),
        standard=True,
    ),
}
"""Where a patched file may run, by the name that `bake` takes: what is written for it, and what it does not take."""


def target_named(name: str) -> Target:
    """The target of this name.

    Raises:
        BakeError: There is none.
    """
    if name not in TARGETS:
        raise BakeError(
            "target", expected=f"one of {', '.join(TARGETS)}", found=repr(name), advice="Choose one of these."
        )
    return TARGETS[name]


def require_target(model: ir.Model, name: str) -> None:
    """Refuse a patched model that the target does not take.

    Raises:
        BakeError: Says all that stands against it.
    """
    found = [*_against(model, TARGETS[name])]
    if found:
        raise BakeError(
            f"target {name}",
            expected="a model that it takes",
            found="; ".join(found),
            advice="Export the model for it (torch.onnx.export(opset_version=18), attn_implementation='eager'), or "
            "choose another target.",
        )


_BFLOAT16 = 16
"""The opset from which on `Where` takes bfloat16, in onnx and in every runtime."""


def _chooses_bfloat16(node: ir.Node) -> bool:
    return node.op_type == "Where" and SITE_KEY in node.metadata_props and node.outputs[0].dtype is ir.DataType.BFLOAT16


def _against(model: ir.Model, target: Target) -> Iterator[str]:
    opset = opset_version(model)
    if opset < _BFLOAT16 and any(_chooses_bfloat16(node) for node in model.graph.all_nodes()):
        yield f"bfloat16 at opset {opset}, Where takes it from {_BFLOAT16} on"
    if target.opset is not None and opset > target.opset:
        yield f"opset {opset}, it takes {target.opset} at most"
    if target.ir_version is not None and model.ir_version > target.ir_version:
        yield f"IR version {model.ir_version}, it takes {target.ir_version} at most"
    nodes = list(model.graph.all_nodes())
    present = {node.op_type for node in nodes if node.domain in OWN_DOMAINS}
    for op_type in sorted(target.without & present):
        yield f"the operator {op_type}"
    if target.standard:
        foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in OWN_DOMAINS})
        if foreign:
            yield f"operators that are not ONNX's own ({', '.join(foreign[:3])})"
