"""The root of the command line: all commands in the order of the walk, and the one error handler."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from atpatch_onnx.cli import baking, demo, discovering, fitting, fixing, measuring, pairs, serving, signing, surveying
from atpatch_onnx.errors import AtPatchError

app = typer.Typer(
    help="Bake a hot-fix for a backdoored or unfair transformer into its own ONNX graph.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS = {
    "Fix a model": (
        fitting.sites,
        fixing.fix,
        fitting.fit,
        baking.bake,
        measuring.verify,
        measuring.evaluate,
        measuring.report,
        baking.unbake,
    ),
    "Find what nobody told of": (discovering.hunt, discovering.scan, surveying.zoo),
    "Other fixes": (fitting.isolate, fitting.repair, fitting.compare),
    "Say what is in a file": (signing.inspect, signing.sign),
    "Deploy": (baking.quantize, measuring.benchmark, serving.serve_config),
    "Begin": (demo.demo, baking.export),
}
"""All commands by the group that help shows them in, in the order of the walk."""

app.add_typer(pairs.app, name="pairs", rich_help_panel="Fix a model")
for group, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=group)(command)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work as an error does, so that what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """onnx-ir warns of what it reads all the same, such as bytes that are no text: lines that nobody can act on."""
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 after an error, 2 after wrong usage, or 3 after an alarm."""
    quiet_libraries()
    try:
        with _ended_by_sigterm():
            app(args=arguments)
    except AtPatchError as error:
        sys.stderr.write(f"atpatch: {' '.join(str(error).split())}\n")
        return 1
    except SystemExit as exit_:  # how typer ends, well or after wrong usage, whichever click it brings along
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0
