"""Changes of a session, one at a time."""

import os
import threading

from atpatch_onnx.errors import ServingError


class Turns:
    """A lock that a forked child does not wait for: whoever held it in the parent is not there to let go."""

    def __init__(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()

    def __enter__(self) -> None:
        """Wait for the others.

        Raises:
            ServingError: This process is a fork of the one that the session was started in.
        """
        if os.getpid() != self._process:
            raise ServingError(
                "the session",
                expected="changes in the process that started it",
                found="a child of that process",
                advice="Start a session in each process, after the fork.",
            )
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        """Let the next one."""
        self._lock.release()
