"""What commands take: their arguments and options, described once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from atpatch_onnx.graph import External

TARGETS = ("cpu", "cuda", "tensorrt", "directml", "coreml", "web", "openvino", "portable")
"""The keys of `atpatch_onnx.TARGETS`, spelt out so that help loads nothing that bakes."""

GOAL, BUDGET, MACHINES, EXPERT = (
    "Goal: what must be gone",
    "Budget: what the fix may cost",
    "Machines: who runs the model",
    "Expert: the defaults will do",
)
"""The groups of options in help, behind those that most people need."""

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The base, an .onnx file.", show_default=False)]
Base = Annotated[Path, typer.Argument(metavar="BASE", help="The base, an .onnx file.", show_default=False)]
Patched = Annotated[Path, typer.Argument(metavar="PATCHED", help="The patched .onnx file.", show_default=False)]
Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="A debug set: .npz, a folder of .npy, or Parquet files.", show_default=False),
]
Patches = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATCH...", help="The patch, a .safetensors file; or several, in order.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Output = Annotated[
    str | None,
    typer.Option(help="The model's output with the logits.", show_default=False, rich_help_panel=EXPERT),
]
ExternalData = Annotated[
    External | None,
    typer.Option(
        "--external",
        help="Data files that lie elsewhere: leave them there (at or below the new file), clone or hard-link, or copy "
        "them. By default those that can stay do, and others are copied.",
        show_default=False,
        rich_help_panel=EXPERT,
    ),
]
AsrGoal = Annotated[
    float, typer.Option("--asr-above-floor", help="Of a backdoor: ASR above floor, a share.", rich_help_panel=GOAL)
]
FlipGoal = Annotated[
    float, typer.Option("--flip-rate", help="Of an attribute: flip rate, a share.", rich_help_panel=GOAL)
]
AccuracyGoal = Annotated[
    float, typer.Option("--accuracy-loss", help="Accuracy lost on clean inputs, a share.", rich_help_panel=BUDGET)
]
FlagGoal = Annotated[
    float,
    typer.Option("--clean-flag-rate", help="Share of clean inputs that may be flagged.", rich_help_panel=BUDGET),
]
RobustGoal = Annotated[
    float,
    typer.Option(
        "--robust-accuracy-loss",
        help="Accuracy lost on triggered inputs, beside the same without the trigger.",
        rich_help_panel=GOAL,
    ),
]
TokenFlagGoal = Annotated[
    float | None,
    typer.Option(
        "--flags-per-million",
        help="Flags on a million benign tokens; 100 where the data are prompts.",
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]
Thresholds = Annotated[
    Literal["balanced", "lowest"] | None,
    typer.Option(
        help="Where they lie; lowest where a search found the pairs, else balanced.",
        rich_help_panel=EXPERT,
        show_default=False,
    ),
]
Redistribute = Annotated[
    Literal["needed", "all"],
    typer.Option(help="Which sites do; all: for flip rates that few pairs cannot show.", rich_help_panel=EXPERT),
]
Always = Annotated[
    bool,
    typer.Option(
        "--always",
        help="Of an attribute: its tokens are neutral in every input, at all sites, and no path leads from it to the "
        "output.",
    ),
]
Steps = Annotated[
    int, typer.Option(min=1, help="Of prompts: tokens of each answer that count.", rich_help_panel=EXPERT)
]
Candidates = Annotated[
    int,
    typer.Option(
        min=0,
        help="Hidden units that are tried one by one, those that differ most; 0: all.",
        rich_help_panel=EXPERT,
    ),
]
RankedOn = Annotated[int, typer.Option(min=1, help="Pairs that hidden units are ranked on.", rich_help_panel=EXPERT)]
Seed = Annotated[int, typer.Option(help="Same seed, same patch.", rich_help_panel=EXPERT)]
Force = Annotated[
    bool,
    typer.Option("--force", help="Write a patch that misses its goal, marked so.", rich_help_panel=EXPERT),
]
Target = Annotated[str, typer.Option(help=f"Where it will run: {', '.join(TARGETS)}.")]
Provider = Annotated[
    str,
    typer.Option(help="What runs the models: cpu, cuda, tensorrt, directml, coreml, openvino.", rich_help_panel=EXPERT),
]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Inputs at a time, where the model leaves it free.", rich_help_panel=EXPERT),
]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option(
        "--custom-ops",
        metavar="LIBRARY",
        help="A library with operators of the model, such as onnxruntime-extensions' tokenizers; its code is run.",
        show_default=False,
        rich_help_panel=EXPERT,
    ),
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="local|ray|ray://HOST:PORT",
        help="This process; Ray on this machine; a Ray cluster that is there.",
        rich_help_panel=MACHINES,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of Ray: how many; else as many as there are CPUs.", show_default=False, rich_help_panel=MACHINES
    ),
]
Pieces = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FOLDER",
        help="Finished pieces are kept there: what was stopped goes on where it was.",
        show_default=False,
        rich_help_panel=MACHINES,
    ),
]
