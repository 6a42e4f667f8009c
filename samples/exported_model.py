"""What a model of another package is to `samples.exported`: ways to export it, and the softmaxes that it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from atpatch_onnx.exporters.exporting import ExportError, exporting

Write = Callable[[Path], str]
"""Writes a model's file; says what was done for it, where anything was."""

BATCH = 2
"""What graphs are traced with; the batch is free where the model leaves it free."""

OPSET, LATEST = 17, 20
"""Of the TorchScript exporter; the latest one where it lacks an operator in the other."""


@dataclass(frozen=True)
class Model:
    """A model, and how it is exported, by way."""

    name: str
    package: str
    """The distribution that it comes from."""

    ways: Mapping[str, Write]
    softmaxes: Callable[[], int] | None = None
    """Counts the softmaxes that run when the model does, fused ones included."""

    needs: Sequence[str] = ()
    """Modules to import."""

    @property
    def missing(self) -> str | None:
        """A module that is not installed."""
        return next((name for name in self.needs if find_spec(name) is None), None)


# Modules of torch


@dataclass(frozen=True)
class Module:
    """A module of torch that takes one tensor."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of one sample."""

    unfused: Callable[[], nn.Module] | None = None
    """Makes one that writes attention out, for where an exporter does not take it fused."""

    def dynamo(self, path: Path) -> str:
        """Write what the exporter of today makes of it."""
        return self._first_of(self._attempts(self._by_dynamo), path)

    def torchscript(self, path: Path) -> str:
        """Write what the exporter of old makes of it."""
        latest = partial(self._by_torchscript, opset=LATEST)
        attempts = self._attempts(self._by_torchscript)
        return self._first_of({**attempts, f"opset {LATEST}": lambda path: latest(self.build, path)}, path)

    def _attempts(self, write: Callable[[Callable[[], nn.Module], Path], None]) -> dict[str, Callable[[Path], None]]:
        found: dict[str, Callable[[Path], None]] = {"": lambda path: write(self.build, path)}
        if self.unfused is not None:
            found["attention written out"] = partial(write, self.unfused)
        return found

    @staticmethod
    def _first_of(attempts: Mapping[str, Callable[[Path], None]], path: Path) -> str:
        """The first attempt that an exporter takes; the error of the first one where it takes none."""
        failed: list[ExportError] = []
        for said, attempt in attempts.items():
            try:
                attempt(path)
            except ExportError as error:
                failed.append(error)
            else:
                return said
        raise failed[0]

    def _by_dynamo(self, build: Callable[[], nn.Module], path: Path) -> None:
        module, inputs = self.made(build)
        with exporting(path.stem):
            program = torch.onnx.export(
                module, (inputs,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.AUTO},), verbose=False
            )
        assert program is not None  # it is None only where a path is given
        program.save(path, external_data=False)

    def _by_torchscript(self, build: Callable[[], nn.Module], path: Path, opset: int = OPSET) -> None:
        module, inputs = self.made(build)
        names: dict[str, Any] = {"input_names": ["input"], "dynamic_axes": {"input": {0: "batch"}}}
        with exporting(path.stem):
            torch.onnx.export(module, (inputs,), path, dynamo=False, opset_version=opset, **names)

    def made(self, build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
        """A module in inference mode, its weights the same each time, and what to trace it with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval(), torch.randn(BATCH, *self.shape)

    def softmaxes(self) -> int:
        """Count those that run."""
        module, inputs = self.made(self.build)
        counter = Softmaxes()  # type: ignore[no-untyped-call]
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer
        try:
            with torch.no_grad(), counter:
                module(inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
        return counter.count


class Softmaxes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts softmaxes, alone or within an attention."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator, and run it."""
        name = func.overloadpacket.__name__
        self.count += name in ("_softmax", "_safe_softmax") or name.startswith("_scaled_dot_product")
        return func(*args, **(kwargs or {}))


def of_torch(
    package: str,
    name: str,
    build: Callable[[], nn.Module],
    *shape: int,
    unfused: Callable[[], nn.Module] | None = None,
    needs: Sequence[str] = (),
) -> Model:
    """A model of torch, exported both ways."""
    module = Module(build, shape, unfused)
    ways = {"dynamo": module.dynamo, "torchscript": module.torchscript}
    return Model(name, package, ways, module.softmaxes, needs)
