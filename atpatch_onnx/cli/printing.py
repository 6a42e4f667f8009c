"""What commands print: results for people or for machines, and progress."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from atpatch_onnx.errors import VerificationError

if TYPE_CHECKING:
    from atpatch_onnx.measuring.checks import Verification
    from atpatch_onnx.running.sessions import Progress


def atpatch(*parts: object) -> str:
    """An `atpatch` command as it is typed; what stands in CAPITALS is for the reader to fill in."""
    return shlex.join(["atpatch", *map(str, parts)])


def show(
    shown: Mapping[str, Any], renderables: Sequence[RenderableType], as_json: bool, *, then: str | None = None
) -> None:
    """Print a result, for people or for machines; people are told as well what to type `then`."""
    if as_json:
        sys.stdout.write(json.dumps(dict(shown), indent=2) + "\n")
        return
    console = Console(soft_wrap=False, markup=False)  # a file's name is no markup
    for renderable in renderables:
        console.print(renderable, highlight=False)
    if then is not None:  # in one line, to be copied
        console.print(f"\nNext: {then}", highlight=False, soft_wrap=True)


class Rate(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        """Of one task; nothing until it is known."""
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s" if task.speed >= 10 else f"{task.speed:.1f}/s")


@contextmanager
def progress_bars() -> "Iterator[Progress]":
    """Progress bars on stderr, one for each stage; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    counts = (MofNCompleteColumn(), Rate(), TimeElapsedColumn(), TimeRemainingColumn(compact=True))
    columns = (TextColumn("{task.description}"), BarColumn(20), *counts)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield progress


def require_passed(patched: Path, result: "Verification", advice: str) -> None:
    """End with an error that names the checks that failed: what each says was printed before.

    Raises:
        VerificationError: One failed.
    """
    if not result.passed:
        raise VerificationError(
            str(patched),
            expected=f"all {len(result.checks)} checks to pass",
            found=f"{len(result.failures)} that failed: {', '.join(check.name for check in result.failures)}",
            advice=advice,
        )
