"""What a patched file says of itself: graph scanners look for hidden conditionals, so ours are declared.

| entry | content |
|---|---|
| `atpatch.schema` | version of these entries |
| `atpatch.base` | fingerprint of the base |
| `atpatch.patch` | id of the patch |
| `atpatch.emission` | `conditional` or `branchless` |
| `atpatch.monitors` | JSON: names of the outputs that were added behind the model's own |
| `atpatch.sites` | JSON: what each patched site does, and the names of the values it reads and writes (`PatchedSite`) |
| `atpatch.joint` | JSON: the decision of all sites together (`PatchedJoint`); null where each decides for itself |
| `atpatch.layers` | JSON: the hidden layers with edited units, and the values that they are (`PatchedLayer`) |
| `atpatch.weights` | digest of the weights that the patch brought |
| `atpatch.figures` | JSON: what the fit measured |
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, get_type_hints

import onnx_ir as ir

from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import ENTRY, PREFIX, SCOPE, base_name, output_scope, own_name, units_scope
from atpatch_onnx.patches.patch import Patch

SCHEMA = "6"


@dataclass(frozen=True)
class PatchedSite:
    """One patched site of a file: what it does, and by which values of the graph."""

    site: str
    threshold: float | None
    """None: the site does not detect, or not for itself."""

    reach: float | None
    """By how much the threshold is lower for the other columns of a flagged input; None as of `threshold`."""

    value: str | None
    """`neutral` or `own`; None: the site does not redistribute."""

    map: str
    """The attention map `[maps, heads, queries, keys]`."""

    values: str
    """The values, laid out as `value_layout` says (see `layout`)."""

    value_layout: str
    kv_heads: int
    output: str
    """The site's output in the base, which the model reads, laid out as `output_layout` says; in a joint decision, that
    of the second pass."""

    output_layout: str

    parts: int | None
    """Maps of one sample, if their number is fixed; 0 where samples share a map."""

    flags: str
    """Its own or carried flags, bool `[samples, columns]`."""

    margin: str | None
    """Score minus threshold `[samples, columns]`, where it detects; in a joint decision, the one of all sites."""

    @property
    def base_output(self) -> str:
        """The output as the base computes it, where the site redistributes."""
        return base_name(self.site)


@dataclass(frozen=True)
class PatchedJoint:
    """The decision of all sites of a file together."""

    threshold: float
    reach: float
    outputs: tuple[str, ...]
    """The model's outputs that depend on the redistributing sites: they are chosen between both passes."""


@dataclass(frozen=True)
class PatchedLayer:
    """One hidden layer of a file whose units are edited; factors and constants are among the weights."""

    layer: str
    value: str
    """The hidden units in the base, which the model reads, `[..., units]`."""

    edited: int
    """How many units are edited."""

    @property
    def base_value(self) -> str:
        """The hidden units as the base computes them."""
        return base_name(self.scope)

    @property
    def scope(self) -> str:
        """Where the names of its edits lie, under `atpatch/`."""
        return units_scope(self.layer)


@dataclass(frozen=True)
class PatchRecord:
    """The entries of a patched model, read back."""

    base: str
    patch: str
    emission: str
    monitors: tuple[str, ...]
    sites: tuple[PatchedSite, ...]
    joint: PatchedJoint | None
    layers: tuple[PatchedLayer, ...]
    weights: str
    figures: Mapping[str, Any]

    @property
    def detects(self) -> bool:
        """Whether there is something to flag: not where hidden units are edited and that is all."""
        return bool(self.sites) or not self.layers

    @property
    def thresholds(self) -> dict[str, str]:
        """Name of the value by which scores exceed a threshold, by that of the weight that this threshold is."""
        margins = {site.site: site.margin for site in self.sites if site.margin}
        if self.joint is not None:
            margins = dict.fromkeys([SCOPE], next(iter(margins.values())))
        return {own_name(scope, "threshold"): margin for scope, margin in margins.items()}

    @property
    def outputs(self) -> dict[str, str]:
        """Name of the base's value by scope: of every edited layer, and of every site that redistributes.

        With a joint decision, sites redistribute in the second pass, and the outputs of the model take their place.
        """
        sites = {site.site: site.output for site in self.sites if site.value is not None}
        if self.joint is not None:
            sites = {output_scope(number): name for number, name in enumerate(self.joint.outputs)}
        return {**{layer.scope: layer.value for layer in self.layers}, **sites}


def describe(
    patch: Patch,
    model: ir.Model,
    *,
    emission: str,
    sites: Sequence[PatchedSite],
    joint: PatchedJoint | None,
    layers: Sequence[PatchedLayer],
    monitors: Sequence[str],
) -> dict[str, str]:
    """The metadata entries of `model`, which has this patch in it."""
    entries = {
        "schema": SCHEMA,
        "base": patch.base,
        "patch": patch.id,
        "emission": emission,
        "monitors": json.dumps(list(monitors)),
        "sites": json.dumps([asdict(site) for site in sites], sort_keys=True),
        "joint": json.dumps(None if joint is None else asdict(joint), sort_keys=True),
        "layers": json.dumps([asdict(layer) for layer in layers], sort_keys=True),
        "weights": weights_digest(model),
        "figures": json.dumps(dict(patch.figures), sort_keys=True),
    }
    return {ENTRY + key: value for key, value in entries.items()}


def weights_digest(model: ir.Model) -> str:
    """Digest of the weights under `atpatch/`: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        if name.startswith(PREFIX) and value.const_value is not None:
            array = value.const_value.numpy()
            digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def is_patched(model: ir.Model) -> bool:
    """Whether the model says that a patch is in it."""
    return any(key.startswith(ENTRY) for key in model.metadata_props)


def read_record(model: ir.Model) -> PatchRecord:
    """Read back what `describe` wrote.

    Raises:
        UnbakeError: The model is not patched, or its entries are incomplete or of another schema.
    """
    if not is_patched(model):
        raise UnbakeError(
            "the model",
            expected="a patched model",
            found=f"none of the metadata entries {ENTRY}*",
            advice="Give the file that 'atpatch bake' wrote.",
        )
    entries = {key.removeprefix(ENTRY): text for key, text in model.metadata_props.items() if key.startswith(ENTRY)}
    try:
        if entries["schema"] != SCHEMA:
            raise ValueError(f"schema {entries['schema']}")
        monitors, figures = json.loads(entries["monitors"]), json.loads(entries["figures"])
        record = PatchRecord(
            base=entries["base"],
            patch=entries["patch"],
            emission=entries["emission"],
            weights=entries["weights"],
            monitors=tuple(str(name) for name in monitors),
            sites=_entries(PatchedSite, entries["sites"], "site"),
            joint=_joint(json.loads(entries["joint"])),
            layers=_entries(PatchedLayer, entries["layers"], "layer"),
            figures=dict(figures),
        )
        if record.joint is not None and len({site.margin for site in record.sites if site.margin}) != 1:
            raise ValueError("the joint decision has no margin, or several")
        return record
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnbakeError(
            f"the metadata entries {ENTRY}*",
            expected=f"complete entries of schema {SCHEMA}",
            found=f"{type(error).__name__}: {error}",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        ) from error


def _joint(entry: Mapping[str, Any] | None) -> PatchedJoint | None:
    """The joint decision; ValueError where a field is not of its type."""
    if entry is None:
        return None
    outputs, numbers = entry["outputs"], (entry["threshold"], entry["reach"])
    if not isinstance(outputs, list) or not all(isinstance(name, str) for name in outputs) or len(entry) != 3:
        raise ValueError("the joint decision has other fields")
    if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
        raise ValueError("the joint decision has a threshold or reach that is no number")
    return PatchedJoint(*numbers, tuple(outputs))


_Entry = TypeVar("_Entry", PatchedSite, PatchedLayer)


def _entries(kind: type[_Entry], text: str, name: str) -> tuple[_Entry, ...]:
    """Entries of one kind, each named once; ValueError where a field is not of its type."""
    found = tuple(kind(**entry) for entry in json.loads(text))
    hints = get_type_hints(kind)
    for entry in found:
        for field, hint in hints.items():
            value = getattr(entry, field)
            if not isinstance(value, hint):
                raise ValueError(f"{field} of a {name} is {value!r}")
    names = [getattr(entry, name) for entry in found]
    if len(set(names)) < len(names):
        raise ValueError(f"a {name} is named twice")
    return found
