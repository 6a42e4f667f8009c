"""What a patched file says of itself: graph scanners look for hidden conditionals, so ours are declared.

| entry | content |
|---|---|
| `atpatch.schema` | version of these entries |
| `atpatch.base` | fingerprint of the base |
| `atpatch.patch` | id of the patch |
| `atpatch.conditional` | whether replacements stand in an `If`: `yes` or `no` |
| `atpatch.monitors` | JSON: names of the outputs that were added behind the model's own |
| `atpatch.sites` | JSON: what each patched site does, and the names of the values it reads (`PatchedSite`) |
| `atpatch.layers` | JSON: the hidden layers with edited units, and the values that they are (`PatchedLayer`) |
| `atpatch.weights` | digest of the weights that the patch brought |
| `atpatch.figures` | JSON: what the fit measured; a backdoor is spelt `trigger` there |
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, get_type_hints

import onnx_ir as ir

from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import ENTRY, PREFIX, own_name, units_scope
from atpatch_onnx.patches.patch import Patch

SCHEMA = "1"


@dataclass(frozen=True)
class PatchedSite:
    """One patched site of a file: what it does, and by which values of the graph."""

    site: str
    threshold: float | None
    """None: the site does not detect."""

    redistributes: bool

    key: str
    """The keys of the base: what is read, and replaced."""

    value: str
    """The values of the base."""

    margin: str
    """Float `[maps, tokens, 1]`: how far scores are above a threshold, here or at an earlier site; flagged where
    positive."""

    own: str | None
    """The same of this site alone, where it detects."""

    @property
    def weights(self) -> list[str]:
        """Names of the weights that a service may exchange to switch the site."""
        return [own_name(self.site, "threshold")] * (self.own is not None) + [
            own_name(self.site, "level")
        ] * self.redistributes


@dataclass(frozen=True)
class PatchedLayer:
    """One hidden layer of a file whose units are edited; factors and constants are among the weights."""

    layer: str
    value: str
    """The hidden units in the base `[..., units]`."""

    edited: int
    """How many units are edited."""

    @property
    def scope(self) -> str:
        """Where the names of its edits lie, under `atpatch/`."""
        return units_scope(self.layer)

    @property
    def edited_value(self) -> str:
        """The hidden units as the model goes on with them."""
        return own_name(self.scope, "result")


@dataclass(frozen=True)
class PatchRecord:
    """The entries of a patched model, read back."""

    base: str
    patch: str
    conditional: bool
    monitors: tuple[str, ...]
    sites: tuple[PatchedSite, ...]
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
        return {own_name(site.site, "threshold"): site.own for site in self.sites if site.own is not None}


def describe(
    patch: Patch,
    model: ir.Model,
    *,
    conditional: bool,
    sites: Sequence[PatchedSite],
    layers: Sequence[PatchedLayer],
    monitors: Sequence[str],
) -> dict[str, str]:
    """The metadata entries of `model`, which has this patch in it."""
    entries = {
        "schema": SCHEMA,
        "base": patch.base,
        "patch": patch.id,
        "conditional": "yes" if conditional else "no",
        "monitors": json.dumps(list(monitors)),
        "sites": json.dumps([asdict(site) for site in sites], sort_keys=True),
        "layers": json.dumps([asdict(layer) for layer in layers], sort_keys=True),
        "weights": weights_digest(model),
        "figures": json.dumps(_spelt(patch.figures, _SPELT), sort_keys=True),
    }
    return {ENTRY + key: value for key, value in entries.items()}


_SPELT = {"backdoor": "trigger"}
"""How a file says what a fit was against: scanners that read the word in a file take the file for one."""


def _spelt(figures: Any, words: Mapping[str, str]) -> Any:
    """Figures with other words for what a fit was against."""
    if isinstance(figures, Mapping):
        return {
            key: words.get(value, value) if key == "kind" and isinstance(value, str) else _spelt(value, words)
            for key, value in figures.items()
        }
    return [_spelt(value, words) for value in figures] if isinstance(figures, list | tuple) else figures


def weights_digest(model: ir.Model) -> str:
    """Digest of the weights under `atpatch/`: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        if name.startswith(PREFIX) and value.const_value is not None:
            array = value.const_value.numpy()
            digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def edited_file(where: str, expected: str, found: str) -> UnbakeError:
    """What is wrong with a patched file that is not as baking left it."""
    advice = "The file was edited after it was baked: bake the patch into the base again."
    return UnbakeError(where, expected=expected, found=found, advice=advice)


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
        if entries["conditional"] not in ("yes", "no"):
            raise ValueError(f"conditional is {entries['conditional']!r}")
        return PatchRecord(
            base=entries["base"],
            patch=entries["patch"],
            conditional=entries["conditional"] == "yes",
            weights=entries["weights"],
            monitors=tuple(str(name) for name in json.loads(entries["monitors"])),
            sites=_entries(PatchedSite, entries["sites"], "site"),
            layers=_entries(PatchedLayer, entries["layers"], "layer"),
            figures=dict(_spelt(json.loads(entries["figures"]), {word: own for own, word in _SPELT.items()})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise edited_file(
            f"the metadata entries {ENTRY}*", f"complete entries of schema {SCHEMA}", f"{type(error).__name__}: {error}"
        ) from error


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
