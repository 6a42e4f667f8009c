"""What a patched file says of itself: graph scanners look for hidden conditionals, so ours are declared.

| entry | content |
|---|---|
| `atpatch.schema` | version of these entries |
| `atpatch.base` | fingerprint of the base |
| `atpatch.patch` | id of the patch |
| `atpatch.emission` | `conditional` or `branchless` |
| `atpatch.outputs` | JSON: patched site to the name of its output in the base, for every site that redistributes |
| `atpatch.monitors` | JSON: names of the outputs that were added behind the model's own |
| `atpatch.sites` | JSON: what each patched site does |
| `atpatch.figures` | JSON: what the fit measured |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from atpatch_onnx.errors import StripError
from atpatch_onnx.patch import Patch

PREFIX = "atpatch."
SCHEMA = "1"


@dataclass(frozen=True)
class PatchRecord:
    """The entries of a patched model, read back."""

    base: str
    patch: str
    emission: str
    outputs: Mapping[str, str]
    monitors: tuple[str, ...]
    sites: tuple[Mapping[str, Any], ...]
    figures: Mapping[str, Any]


def describe(patch: Patch, *, emission: str, outputs: Mapping[str, str], monitors: Sequence[str]) -> dict[str, str]:
    """The metadata entries of a model with this patch."""
    sites = [
        {
            "site": entry.site,
            "detects": entry.detector is not None,
            "redistributes": entry.redistribution is not None,
            "threshold": None if entry.detector is None else entry.detector.threshold,
            "value": None
            if entry.redistribution is None
            else ("own" if entry.redistribution.neutral is None else "neutral"),
        }
        for entry in patch.sites
    ]
    entries = {
        "schema": SCHEMA,
        "base": patch.base,
        "patch": patch.id,
        "emission": emission,
        "outputs": json.dumps(dict(outputs), sort_keys=True),
        "monitors": json.dumps(list(monitors)),
        "sites": json.dumps(sites, sort_keys=True),
        "figures": json.dumps(dict(patch.figures), sort_keys=True),
    }
    return {PREFIX + key: value for key, value in entries.items()}


def is_patched(model: ir.Model) -> bool:
    """Whether the model says that a patch is in it."""
    return any(key.startswith(PREFIX) for key in model.metadata_props)


def read_record(model: ir.Model) -> PatchRecord:
    """Read back what `describe` wrote.

    Raises:
        StripError: The model is not patched, or its entries are incomplete or of another schema.
    """
    if not is_patched(model):
        raise StripError(
            "the model",
            expected="a patched model",
            found=f"none of the metadata entries {PREFIX}*",
            advice="Give the file that 'atpatch bake' wrote.",
        )
    entries = {key.removeprefix(PREFIX): text for key, text in model.metadata_props.items() if key.startswith(PREFIX)}
    try:
        if entries["schema"] != SCHEMA:
            raise ValueError(f"schema {entries['schema']}")
        outputs, monitors = json.loads(entries["outputs"]), json.loads(entries["monitors"])
        sites, figures = json.loads(entries["sites"]), json.loads(entries["figures"])
        return PatchRecord(
            base=entries["base"],
            patch=entries["patch"],
            emission=entries["emission"],
            outputs={str(site): str(output) for site, output in outputs.items()},
            monitors=tuple(str(name) for name in monitors),
            sites=tuple(dict(site) for site in sites),
            figures=dict(figures),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StripError(
            f"the metadata entries {PREFIX}*",
            expected=f"complete entries of schema {SCHEMA}",
            found=f"{type(error).__name__}: {error}",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        ) from error
