"""The only place that runs models: onnxruntime sessions, batches and progress."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime import SessionOptions as SessionOptions  # for those who may not import onnxruntime

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import RunError
from atpatch_onnx.running.batching import AS_GIVEN, Batching
from atpatch_onnx.running.opening import Libraries
from atpatch_onnx.running.providers import Providers, chosen, first, require_started

Array = NDArray[Any]

Progress = Callable[[str, int, int], None]
"""Told of long work: what is being done, how much is done, how much there is."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of those who do not want to know."""


def _threads_of_the_environment() -> int | None:
    """What `OMP_NUM_THREADS` says, if it says a number; idle threads of several processes would take turns spinning."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else None


def session_options(optimize: bool = True, threads: int | None = None) -> SessionOptions:
    """Options of a session; arguments as in `Session`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; onnxruntime need not print it as well
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    threads = _threads_of_the_environment() if threads is None else threads
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@dataclass(frozen=True)
class Shipped:
    """A model as onnxruntime is given it: what another process needs to open it, of plain types."""

    source: bytes | str
    """The model itself, or the path of its file."""

    where: str
    """For messages."""

    folder: str | None
    """What external data of `bytes` is relative to."""

    libraries: tuple[str, ...]
    """With custom operators."""

    @classmethod
    def of(cls, model: graphs.ModelOrPath, custom_ops: Libraries = ()) -> Self:
        """A model in memory knows its own libraries."""
        if not isinstance(model, ir.Model):
            path = os.fspath(model)
            return cls(path, path, None, tuple(os.fspath(library) for library in custom_ops))
        folder = graphs.external_folder(model)
        where = None if folder is None else os.fspath(folder)
        return cls(graphs.to_bytes(model), "the model", where, graphs.custom_ops(model))


class Session:
    """One onnxruntime session of a model.

    Args:
        model: The model, whose external data is read by onnxruntime from where it lies; or a file, which onnxruntime
            reads by itself; or either as it was shipped from another process.
        optimize: Whether onnxruntime may optimise the graph (its default) or must run it node by node.
        threads: Threads within an operator; None: as many as the environment variable `OMP_NUM_THREADS` says, which
            torch and numpy heed as well, else onnxruntime's choice.
        providers: Execution providers; the CPU's by default.
        batching: Where the model has the samples; inputs are given and outputs taken with samples first.
        custom_ops: Libraries with operators of a file; a model in memory knows its own.

    Raises:
        RunError: onnxruntime refuses the model, has no such provider, or it does not start.
    """

    def __init__(
        self,
        model: "graphs.ModelOrPath | Shipped",
        *,
        optimize: bool = True,
        threads: int | None = None,
        providers: Providers = ("cpu",),
        batching: Batching = AS_GIVEN,
        custom_ops: Libraries = (),
    ) -> None:
        self._session = opened(model, session_options(optimize, threads), providers, custom_ops)
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._batching = batching
        self._batches = {
            value.name: value.shape[axis]
            for value in self._session.get_inputs()
            if (axis := batching.axis(value.name)) is not None and axis < len(value.shape)
        }

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs by name, all or those asked for.

        Raises:
            RunError: onnxruntime refuses the inputs, or fails.
        """
        names = list(self.output_names if outputs is None else outputs)
        given = self._batching.given(inputs)
        try:
            return self._batching.taken(dict(zip(names, self._session.run(names, given), strict=True)))
        except Exception as error:
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in given.items())
            raise _refused(f"running the model on {shapes}", "inputs that it runs on", error) from error

    def stream(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        constants: Mapping[str, Array] | None = None,
        progress: Progress = silent,
        stage: str = "running",
    ) -> Iterator[tuple[slice, dict[str, Array]]]:
        """Run sample by sample in batches: (which samples, their outputs).

        A model whose batch size is fixed is run at that size; a last batch that is too short is filled up with copies
        of its last sample, whose results are cut off.

        Args:
            inputs: Arrays `[samples, ...]` by input name.
            outputs: Names of the outputs wanted; those without samples on their first axis are given as they are.
            batch_size: Samples at a time, where the model leaves it free.
            constants: Inputs without samples, the same for every batch.
            progress: Told after every batch.
            stage: What to tell it.
        """
        samples = len(next(iter(inputs.values())))
        size = self._fixed(inputs) or batch_size
        for start in range(0, samples, size):
            part = slice(start, min(start + size, samples))
            batch = {name: np.ascontiguousarray(array[part]) for name, array in inputs.items()}
            yield part, self.batch(batch, outputs, constants=constants)
            progress(stage, part.stop, samples)

    def batch(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        constants: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """One batch of `stream`, of no more samples than the model takes at a time."""
        count, fixed = len(next(iter(inputs.values()))), self._fixed(inputs)
        results = self.run({**self.filled(inputs), **(constants or {})}, outputs)
        if fixed and count < fixed:
            results = {name: _cut_off(array, count, fixed) for name, array in results.items()}
        return results

    def _fixed(self, inputs: Mapping[str, Array]) -> int | None:
        """The batch size, where the model has one."""
        if self._batching.one_by_one:
            return 1
        sizes = [self._batches.get(name) for name in inputs]
        return next((size for size in sizes if isinstance(size, int)), None)

    def filled(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """The batch itself, or where it is too short for the model, filled up with copies of its last sample."""
        size = self._fixed(batch)
        if size is None or len(next(iter(batch.values()))) >= size:
            return batch
        missing = {name: np.repeat(array[-1:], size - len(array), axis=0) for name, array in batch.items()}
        return {name: np.concatenate([array, missing[name]]) for name, array in batch.items()}

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
        """The outputs of all samples at once, `[samples, ...]` by name; arguments as for `stream`."""
        run: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "stage": stage}
        return joined(self.stream(inputs, outputs, constants=constants, **run))


def joined(found: Iterable[tuple[slice, Mapping[str, Array]]]) -> dict[str, Array]:
    """What there is of all batches, `[samples, ...]` by name."""
    parts: dict[str, list[Array]] = {}
    for _, results in found:
        for name, array in results.items():
            parts.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


class FileSession:
    """onnxruntime's own session of a model, with other values for some of its weights.

    onnxruntime checks neither shape nor type of these, and ignores one whose old value its optimizer has used up.

    Args:
        model: The model, or its file, which onnxruntime reads by itself.
        weights: The other values, by name.
        providers: Execution providers.
        options: Options of the session.
        custom_ops: As in `Session`.
        recorded: Whether its first run is recorded, and played again from then on: see `BoundRun`.

    Raises:
        RunError: onnxruntime refuses it.
    """

    def __init__(
        self,
        model: graphs.ModelOrPath,
        weights: Mapping[str, Array],
        *,
        providers: Providers = ("cpu",),
        options: SessionOptions,
        custom_ops: Libraries = (),
        recorded: bool = False,
    ) -> None:
        device = first(providers).device  # where its kernels look for them
        self._weights = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in weights.items()}
        for name, value in self._weights.items():  # which must outlive the session
            options.add_initializer(name, value)
        self.session = opened(model, options, providers, custom_ops, recorded=recorded)


def opened(
    model: graphs.ModelOrPath | Shipped,
    options: SessionOptions,
    providers: Providers,
    custom_ops: Libraries = (),
    *,
    recorded: bool = False,
) -> ort.InferenceSession:
    """A session; a model in memory has its external data where it lies.

    Raises:
        RunError: As in `Session`.
    """
    shipped = model if isinstance(model, Shipped) else Shipped.of(model, custom_ops)
    if shipped.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", shipped.folder)
    for library in shipped.libraries:
        _register(library, options)
    wanted = chosen(providers, recorded=recorded)
    try:
        session = ort.InferenceSession(shipped.source, options, providers=wanted, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen types without a common base
        raise _refused(shipped.where, "one that onnxruntime loads", error) from error
    require_started(session, wanted, shipped.where)
    return session


def _register(library: str, options: SessionOptions) -> None:
    try:
        options.register_custom_ops_library(library)
    except Exception as error:
        raise RunError(
            library,
            expected="a library of custom operators that onnxruntime loads",
            found=" ".join(str(error).split())[:400],
            advice="Give the shared library itself, such as what onnxruntime_extensions.get_library_path() says.",
        ) from error


def tensors(output: object) -> tuple[Array, ...]:
    """The tensors that an output holds: itself, or those of a sequence or a map, in order; an absent optional none."""
    if isinstance(output, Mapping):
        return tensors([part for pair in output.items() for part in pair])
    if isinstance(output, list):
        return tuple(array for part in output for array in tensors(part))
    return () if output is None else (np.asarray(output),)


def _cut_off(output: Array, count: int, size: int) -> Array:
    """The samples that were asked for, where there is one axis for them."""
    by_sample = isinstance(output, np.ndarray) and output.ndim and len(output) == size
    return output[:count] if by_sample else output


def _refused(where: str, expected: str, error: Exception) -> RunError:
    message = " ".join(str(error).split())
    advice = "Check it with onnxruntime alone first."
    if "is not a registered function/op" in message:
        advice = "Give the library that this operator comes from (custom_ops=, --custom-ops)."
    return RunError(where, expected=expected, found=message[:400], advice=advice)
