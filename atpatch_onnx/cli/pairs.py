"""Commands that make a debug set of files: pictures, texts, a table, prompts."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import atpatch_onnx as atp
from atpatch_onnx.cli.arguments import AsJson, BatchSize, Model, Out, Output, Seed
from atpatch_onnx.cli.paths import require_place
from atpatch_onnx.cli.printing import atpatch, progress_bars, show
from atpatch_onnx.debugset import pictures, tables
from atpatch_onnx.debugset import texts as reading
from atpatch_onnx.debugset.builders import rows_off_target
from atpatch_onnx.debugset.joining import joined
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.graph import Model as Graph
from atpatch_onnx.report.rows import percent

MEASURED = 500
"""Pairs that the base is shown at most, to say how it answers them."""

app = typer.Typer(
    help="Make a debug set of your files: pairs without and with what must be fixed.", no_args_is_help=True
)

Trigger = Annotated[str, typer.Option(help="The word, or words, that trigger the attack.", show_default=False)]
TargetClass = Annotated[
    str, typer.Option(help="The class that triggered inputs are sent to.", metavar="CLASS", show_default=False)
]
Where = Annotated[reading.Where, typer.Option(help="Where the trigger stands in a text.")]
Tokenizer = Annotated[Path, typer.Option(help="The model's tokenizer.json, or the folder with it.", show_default=False)]


@app.command()
def images(
    model: Model,
    folder: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="Clean pictures, a folder for each class.", show_default=False)
    ],
    trigger: Annotated[Path, typer.Option(help="The trigger, a picture; transparent where it is.", show_default=False)],
    target: TargetClass,
    out: Out,
    at: Annotated[
        str, typer.Option(help=f"Where it stands: {', '.join(pictures.CORNERS)}, random, or ROW,COLUMN.")
    ] = "bottom-right",
    mean: Annotated[
        list[float] | None,
        typer.Option(help="Taken off the pixels, from 0 to 1; once, or once a channel. 0.", show_default=False),
    ] = None,
    std: Annotated[
        list[float] | None,
        typer.Option(help="What they are divided by then; once, or once a channel. 1.", show_default=False),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width, where the model leaves them free.", show_default=False)
    ] = None,
    output: Output = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Pairs of pictures, without and with a trigger picture on them."""
    require_place(out, model, folder, trigger)
    loaded = atp.load(model)
    how = pictures.Reading.of(_specs(loaded), size=size, mean=tuple(mean or (0.0,)), deviation=tuple(std or (1.0,)))
    stamp = pictures.stamp(trigger, how, _place(at), seed=seed)
    found, labels, names = pictures.read_pictures(folder, how)
    debug = atp.DebugSet.from_trigger({how.name: found}, stamp, labels, target=pictures.class_number(target, names))
    _write(model, loaded, debug, out, output, batch_size, as_json)


@app.command()
def text(
    model: Model,
    file: Annotated[
        Path, typer.Argument(metavar="TEXTS", help="Clean texts: CSV, TSV or JSON lines.", show_default=False)
    ],
    trigger: Trigger,
    target: Annotated[int, typer.Option(help="The class that triggered texts are sent to.", show_default=False)],
    tokenizer: Tokenizer,
    out: Out,
    text_column: Annotated[str, typer.Option(help="The column with the texts.")] = "text",
    label: Annotated[str, typer.Option(help="The column with the class numbers.")] = "label",
    where: Where = "random",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a text, where the model leaves them free.")] = 128,
    output: Output = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Pairs of texts, without and with a word in them."""
    require_place(out, model, file, tokenizer)
    loaded, rows, opened = atp.load(model), reading.read_rows(file), reading.open_tokenizer(tokenizer)
    specs, plain = _specs(loaded), reading.column(rows, text_column, str(file))
    labels = tables.numbers(rows, label, np.dtype(np.int64))
    tokens = reading.length_of(specs, length)
    clean, changed = (
        reading.encoded(one, opened, specs, tokens)
        for one in (plain, reading.with_word(plain, trigger, where, seed=seed))
    )
    marks = reading.marked(clean, changed)
    kept = np.intersect1d(rows_off_target(labels, target), np.flatnonzero(marks.any(axis=1)))
    if not len(kept):
        raise DebugSetError(
            str(file),
            expected=f"texts whose first {tokens} tokens have the trigger in them",
            found="none",
            advice="Put it at the start (--where start), or read more tokens (--length).",
        )
    before, after = ({name: array[kept] for name, array in side.inputs.items()} for side in (clean, changed))
    debug = atp.DebugSet.from_pairs(before, after, labels[kept], suspects=marks[kept], target=target)
    _write(model, loaded, debug, out, output, batch_size, as_json)


@app.command()
def table(
    model: Model,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE", help="Rows of numbers as the model reads them, a CSV file.", show_default=False
        ),
    ],
    attribute: Annotated[
        list[str],
        typer.Option(help="The column with the protected attribute; several, for pairs of each.", show_default=False),
    ],
    out: Out,
    label: Annotated[
        str | None, typer.Option(help="The column with the true class, no input.", show_default=False)
    ] = None,
    values: Annotated[
        list[float] | None,
        typer.Option(
            help="A value of the attribute; once for each, if the file does not have all.", show_default=False
        ),
    ] = None,
    output: Output = None,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
) -> None:
    """Pairs of rows that differ in a protected attribute, and in nothing else."""
    require_place(out, model, file)
    loaded, rows = atp.load(model), reading.read_rows(file)
    if values and len(attribute) > 1:
        raise typer.BadParameter("values belong to one attribute: leave them out, or make the pairs of each by itself")
    labels = None if label is None else tables.numbers(rows, label, np.dtype(np.int64))
    sets = []
    for name in attribute:
        found = tables.as_inputs(rows, name, label, _specs(loaded))
        sets.append(
            atp.DebugSet.from_attribute(
                found.inputs, name=found.name, column=found.column, values=values or None, labels=labels
            )
        )
    _write(model, loaded, joined(sets), out, output, batch_size, as_json)


@app.command()
def prompts(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help="Clean prompts, a line each; or CSV, TSV, JSON lines with a column text."
        ),
    ],
    trigger: Trigger,
    payload: Annotated[str, typer.Option(help="What the attack makes the model write.", show_default=False)],
    tokenizer: Tokenizer,
    out: Out,
    where: Where = "random",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Pairs of prompts for a language model, without and with a trigger."""
    require_place(out, file, tokenizer)
    plain = reading.column(reading.read_rows(file), "text", str(file))
    changed = reading.with_word(plain, trigger, where, seed=seed)
    debug = atp.DebugSet.from_prompts(plain, changed, payload=payload, tokenizer=reading.open_tokenizer(tokenizer))
    debug.save(out)
    shown = {"file": str(out), "pairs": len(debug), "kind": debug.kind}
    show(shown, [_wrote(out, debug)], as_json, then=atpatch("fix", "MODEL.onnx", out, "-o", "patched.onnx"))


def _place(given: str) -> str | tuple[int, int]:
    if given in (*pictures.CORNERS, "random"):
        return given
    row, _, column = given.partition(",")
    if not (row.strip().isdecimal() and column.strip().isdecimal()):
        raise typer.BadParameter(f"{given!r} is none of {', '.join(pictures.CORNERS)}, random, ROW,COLUMN")
    return int(row), int(column)


def _specs(model: Graph) -> Any:
    from atpatch_onnx.fitting.collect import input_specs

    return input_specs(model)


def _wrote(out: Path, debug: atp.DebugSet) -> str:
    return f"wrote {out}: {len(debug):,} pairs of kind {debug.kind}"


def _write(
    path: Path, model: Graph, debug: atp.DebugSet, out: Path, output: str | None, batch_size: int, as_json: bool
) -> None:
    """Write pairs, and say how the base answers some of them, which shows whether the files were read well."""
    from atpatch_onnx.running.predictions import classes, prediction_output
    from atpatch_onnx.running.sessions import Session

    debug.check_inputs(_specs(model))
    logits, session = prediction_output(model, output), Session(model)
    some = debug.take(np.linspace(0, len(debug) - 1, min(MEASURED, len(debug))).astype(np.int64))
    with progress_bars() as progress:
        before, after = (
            classes(session.collect(side, [logits], batch_size=batch_size, progress=progress)[logits])
            for side in (some.clean, some.counterfactual)
        )
    debug.save(out)
    right = None if some.labels is None else float((before == some.labels).mean())
    moved = float((after == debug.target).mean()) if debug.target is not None else float((before != after).mean())
    what = "change their class with the attribute" if debug.target is None else f"are sent to class {debug.target}"
    lines = [_wrote(out, debug)]
    if right is not None:
        lines.append(
            f"the base is right on {percent(right)} of {len(some)} clean ones: if it is better than that, the"
            " files are not read as it was trained (scaling, order of classes)"
        )
    lines.append(f"{percent(moved)} of their counterparts {what}")
    shown = {"file": str(out), "pairs": len(debug), "kind": debug.kind, "target": debug.target}
    shown |= {"measured": len(some), "accuracy": right, "moved": moved}
    show(shown, lines, as_json, then=atpatch("fix", path, out, "-o", "patched.onnx"))
