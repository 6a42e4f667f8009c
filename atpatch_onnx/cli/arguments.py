"""What commands take: their arguments and options, described once."""

from pathlib import Path
from typing import Annotated

import typer

from atpatch_onnx.graph import External

TARGETS = ("cpu", "cuda", "tensorrt", "directml", "coreml", "web", "openvino", "portable")
"""The keys of `atpatch_onnx.TARGETS`, spelt out so that help loads nothing that bakes."""

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The base, an .onnx file.", show_default=False)]
Base = Annotated[Path, typer.Argument(metavar="BASE", help="The base, an .onnx file.", show_default=False)]
Patched = Annotated[Path, typer.Argument(metavar="PATCHED", help="The patched .onnx file.", show_default=False)]
Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="A debug set: .npz, or a folder of .npy.", show_default=False)
]
Patches = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATCH...", help="The patch, a .safetensors file; or several, in order.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Output = Annotated[str | None, typer.Option(help="The model's output with the logits.", show_default=False)]
ExternalData = Annotated[
    External | None,
    typer.Option(
        "--external",
        help="Data files that lie elsewhere: leave them there (at or below the new file), clone or hard-link, or copy "
        "them. By default those that can stay do, and others are copied.",
        show_default=False,
    ),
]
AsrGoal = Annotated[float, typer.Option("--asr-above-floor", help="Goal: ASR above floor, a share.")]
FlipGoal = Annotated[float, typer.Option("--flip-rate", help="Goal for an attribute: flip rate, a share.")]
AccuracyGoal = Annotated[float, typer.Option("--accuracy-loss", help="Goal: accuracy lost, a share.")]
FlagGoal = Annotated[
    float, typer.Option("--clean-flag-rate", help="Budget: share of clean inputs that may be flagged.")
]
Steps = Annotated[int, typer.Option(min=1, help="Of prompts: tokens of each answer that count.")]
Candidates = Annotated[
    int, typer.Option(min=0, help="Hidden units that are tried one by one, those that differ most; 0: all.")
]
RankedOn = Annotated[int, typer.Option(min=1, help="Pairs that hidden units are ranked on.")]
Seed = Annotated[int, typer.Option(help="Same seed, same patch.")]
Force = Annotated[bool, typer.Option("--force", help="Write a patch that misses its goal, marked so.")]
Target = Annotated[str, typer.Option(help=f"Where it will run: {', '.join(TARGETS)}.")]
Provider = Annotated[
    str, typer.Option(help="What runs the models: cpu, cuda, tensorrt, directml, coreml, openvino.", show_default=True)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs at a time, where the model leaves it free.")]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option(
        "--custom-ops",
        metavar="LIBRARY",
        help="A library with operators of the model, such as onnxruntime-extensions' tokenizers; its code is run.",
        show_default=False,
    ),
]
