"""Runs whose inputs and outputs stay where they are on a device (IO binding), as a service has it.

What is recorded once and played again (CUDA graphs) needs that: a recording knows addresses, not names.
"""

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from atpatch_onnx.running.providers import Providers, first
from atpatch_onnx.running.sessions import Array, FileSession


class BoundRun:
    """One session, one set of inputs.

    Args:
        session: Held as long as this is.
        inputs: By name; they are copied to the device once.
        like: Outputs by name, of the shapes and types that these inputs give.
        providers: Of the session.
    """

    def __init__(
        self,
        session: FileSession,
        inputs: Mapping[str, Array],
        like: Mapping[str, Array],
        providers: Providers,
    ) -> None:
        device = first(providers).device
        self._held, self._session = session, session.session
        self._binding = self._session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
        for name, array in like.items():
            value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, device, 0)
            self._binding.bind_ortvalue_output(name, value)
        self._names = tuple(like)

    def __call__(self) -> None:
        """Run, and wait until it is done."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> dict[str, Array]:
        """What the last run computed, by name."""
        found: list[Any] = self._binding.copy_outputs_to_cpu()
        return dict(zip(self._names, found, strict=True))
