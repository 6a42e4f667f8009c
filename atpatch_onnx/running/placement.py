"""Which provider runs which node: what onnxruntime's own profile of a run says."""

import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpatch_onnx import graph as graphs
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.running.opening import Libraries
from atpatch_onnx.running.providers import CPU, Providers
from atpatch_onnx.running.sessions import Array, opened, session_options

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Placement:
    """The nodes of an optimized graph, by the provider that ran them.

    A provider that compiles parts of a graph shows each as one node, under a separate name.
    """

    nodes: Mapping[str, tuple[str, ...]]
    """Names by onnxruntime's name of the provider, sorted."""

    def ours(self, provider: str) -> tuple[str, ...]:
        """The nodes of a patch that a provider ran."""
        return tuple(name for name in self.nodes.get(provider, ()) if name.startswith(PREFIX))

    def fallen(self, allowed: Collection[str] = ()) -> tuple[str, ...]:
        """The nodes of a patch that ran on the CPU, but for those that may."""
        return tuple(name for name in self.ours(CPU) if name not in allowed)

    @property
    def said(self) -> str:
        """How many nodes ran where, in words."""
        return ", ".join(
            f"{len(names)} nodes on {provider} ({len(self.ours(provider))} of the patch)"
            for provider, names in self.nodes.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Counts by provider."""
        return {
            provider: {"nodes": len(names), "of_the_patch": len(self.ours(provider))}
            for provider, names in self.nodes.items()
        }


def placement(
    model: graphs.ModelOrPath,
    inputs: Mapping[str, Array],
    providers: Providers,
    *,
    optimize: bool = True,
    custom_ops: Libraries = (),
) -> Placement:
    """Run a model once, and see what ran where.

    Args:
        model: As in `Session`, as the next two.
        inputs: Of one run.
        providers: Execution providers.
        optimize: Whether onnxruntime may optimise the graph.
        custom_ops: As in `Session`.

    Raises:
        RunError: As in `Session`; or onnxruntime refuses the inputs.
    """
    options = session_options(optimize)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = opened(model, options, providers, custom_ops)
        try:
            session.run(None, dict(inputs))
        finally:
            events = json.loads(Path(session.end_profiling()).read_text())
    return _of_events(events)


def _of_events(events: Collection[Mapping[str, Any]]) -> Placement:
    found: dict[str, set[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
            provider = str(event["args"].get("provider") or CPU)
            found.setdefault(provider, set()).add(str(event["name"]).removesuffix(_KERNEL))
    return Placement({provider: tuple(sorted(names)) for provider, names in sorted(found.items())})
