"""The data files of a model, as they lay on disk when they were read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import ServingError

_State = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class HeldData:
    """What was proven of external data holds for as long as its files are the same: not written to, nor exchanged.

    The rest of a model is in memory.
    """

    states: Mapping[Path, _State | None]
    """Each file and what the file system says of it; None where there is none."""

    @classmethod
    def of(cls, model: ir.Model) -> "HeldData":
        """The files that hold weights of a model, before these are read."""
        tensors = graphs.weights(model).values()
        files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        return cls({file: _state(file) for file in sorted(files)})

    def require_unchanged(self) -> None:
        """Refuse a file that was written to or exchanged since.

        Raises:
            ServingError: It was, or is gone.
        """
        for file, state in self.states.items():
            if state is None or _state(file) != state:
                raise ServingError(
                    str(file),
                    expected="the file as it was when the session began",
                    found="one that was written to, exchanged, moved or linked since",
                    advice="Verify the file, and start a session of it.",
                )


def _state(file: Path) -> _State | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
