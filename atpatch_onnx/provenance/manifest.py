"""The manifest of a patched file: what was added to its base, node by node. It proves nothing."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import PatchRecord, read_record
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph.names import PREFIX, REPLACES_KEY, SITE_KEY


@dataclass(frozen=True)
class AddedNode:
    """A node that baking put into the graph."""

    name: str
    operator: str
    site: str
    """The site, or the hidden layer, that it belongs to; empty where it belongs to none alone."""

    replaces: str | None
    """The base's value that its result stands in for; None where no node of the base reads it."""

    reads: tuple[str, ...]
    """Names of the values that it reads; an absent one is empty."""


@dataclass(frozen=True)
class AddedWeight:
    """A weight that baking put into the graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a patched file is made of."""

    files: dict[str, str]
    """SHA-256 of the file, and of those with its external data, by their paths from its folder."""

    record: PatchRecord
    nodes: tuple[AddedNode, ...]
    weights: tuple[AddedWeight, ...]
    base_nodes: int
    """How many nodes are the base's."""

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON types."""
        return asdict(self)


def manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a patched file; its weights are not read, other than for the digests.

    Raises:
        ModelFileError: The file cannot be read, or is no model.
        UnbakeError: The model is not patched, or its entries are incomplete or of another schema.
    """
    path = Path(path)
    model = graphs.load(path)
    record = read_record(model)
    everything = list(model.graph.all_nodes())
    ours = [node for node in everything if SITE_KEY in node.metadata_props or (node.name or "").startswith(PREFIX)]
    nodes = tuple(
        AddedNode(
            name=node.name or "",
            operator=node.op_type,
            site=node.metadata_props.get(SITE_KEY, ""),
            replaces=node.metadata_props.get(REPLACES_KEY),
            reads=tuple("" if value is None else str(value.name) for value in node.inputs),
        )
        for node in ours
    )
    weights = tuple(
        AddedWeight(name, tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.nbytes)
        for name, tensor in graphs.weights(model).items()
        if name.startswith(PREFIX)
    )
    files = {name: digest(path.parent / name) for name in (path.name, *sorted(data_files(model)))}
    return Manifest(files, record, nodes, weights, len(everything) - len(ours))


def data_files(model: ir.Model) -> set[str]:
    """Where the external data of a model lies, by paths from its folder."""
    return set(_locations(model))


def _locations(model: ir.Model) -> Iterator[str]:
    for tensor in graphs.tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            yield Path(os.path.normpath(tensor.location)).as_posix()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        ModelFileError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(
            str(path), expected="a file that can be read", found=str(error), advice="Check the path."
        ) from error
