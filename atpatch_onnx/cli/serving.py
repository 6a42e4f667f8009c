"""The command that writes what serves a model."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

import atpatch_onnx as atp
from atpatch_onnx.cli.arguments import Model
from atpatch_onnx.cli.printing import show


def serve_config(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    stack: Annotated[Literal["triton", "kserve", "genai"], typer.Option(help="What will serve it.")],
    name: Annotated[str | None, typer.Option(help="Of the model; the file's by default.", show_default=False)] = None,
    max_batch_size: Annotated[int, typer.Option(help="Requests that are run together at most.", min=1)] = 32,
    kind: Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="Where instances run.")] = "auto",
    base: Annotated[
        Path | None,
        typer.Option(help="genai: the folder of the base, as its model builder wrote it.", show_default=False),
    ] = None,
    storage: Annotated[str, typer.Option(help="KServe: URI of the uploaded model repository.")] = "pvc://models",
) -> None:
    """Write a Triton model repository for MODEL, a KServe manifest with one, or a folder for onnxruntime-genai."""
    from atpatch_onnx.serving import (
        KServeOptions,
        TritonOptions,
        write_genai_folder,
        write_inference_service,
        write_model_repository,
    )

    if (base is None) is (stack == "genai"):
        raise typer.BadParameter("give --base with --stack genai, and with no other")
    served, called = atp.load(model), name or model.stem
    triton = TritonOptions(max_batch_size=max_batch_size, kind=kind)
    if base is not None:
        wrote = write_genai_folder(served, base, folder)
    elif stack == "triton":
        wrote = write_model_repository(served, folder, called, triton)
    else:
        wrote = write_inference_service(served, folder, called, KServeOptions(storage=storage, triton=triton))
    then = {
        "triton": shlex.join(["tritonserver", f"--model-repository={folder}"]),
        "kserve": shlex.join(["kubectl", "apply", "-f", str(wrote)]),
        "genai": shlex.join(["python", "-c", f"import onnxruntime_genai; onnxruntime_genai.Model({str(folder)!r})"]),
    }
    show({}, [f"wrote {wrote}"], False, then=then[stack])
