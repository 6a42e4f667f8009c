"""An in-toto statement of a patched file: which file was made of which base and patch, and what the fit measured.

The statement is one of SLSA provenance (https://slsa.dev/spec/v1.0/provenance). Its subjects are the patched file and
those with its external data. Its dependencies are the base, known by its fingerprint, and the patch, known by its id;
where their files are at hand, by SHA-256 as well. It holds no time: the same files give the same bytes.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import PatchMismatchError, SignatureError
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.provenance.manifest import Manifest, digest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
PACKAGE = "pkg:pypi/atpatch-onnx"
"""The package URL of what bakes: a URI, as a builder and its type have to be."""

_LARGEST = 2**24
"""Bytes of a statement; more is refused unread."""


def statement(manifest: Manifest, *, base: Path | None = None, patch: Path | None = None) -> bytes:
    """The statement of a patched file, JSON in UTF-8.

    Args:
        manifest: Of the patched file.
        base: The file of the base, whose SHA-256 is to be stated.
        patch: The file of the patch, whose SHA-256 is to be stated.

    Raises:
        PatchMismatchError: `base` is not the base that the patched file names, or `patch` not its patch.
        AtPatchError: One of them cannot be read.
    """
    record = manifest.record
    digests: dict[str, dict[str, str]] = {"base": {}, "patch": {}}
    if base is not None:
        _same("base", base, graphs.fingerprint(graphs.load(base)), record.base)
        digests["base"] = {"sha256": digest(base)}
    if patch is not None:
        _same("patch", patch, Patch.load(patch).id, record.patch)
        digests["patch"] = {"sha256": digest(patch)}
    found = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in manifest.files.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{PACKAGE}#bake",
                "externalParameters": {"base": record.base, "patch": record.patch},
                "internalParameters": {
                    "conditional": record.conditional,
                    "monitors": list(record.monitors),
                    "figures": dict(record.figures),
                },
                "resolvedDependencies": [
                    {"name": "base", "digest": digests["base"] | {"atpatchFingerprint": record.base}},
                    {"name": "patch", "digest": digests["patch"] | {"atpatchId": record.patch}},
                ],
            },
            "runDetails": {"builder": {"id": f"{PACKAGE}@{version('atpatch-onnx')}"}},
        },
    }
    return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()


def check_statement(path: Path, manifest: Manifest) -> None:
    """Hold a statement beside the file that it is about.

    Raises:
        SignatureError: It is missing or damaged, or says other things than the file.
    """
    advice = "Sign the patched file again."
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        build = found["predicate"]["buildDefinition"]
        said = {
            "files": {entry["name"]: entry["digest"]["sha256"] for entry in found["subject"]},
            "base": build["externalParameters"]["base"],
            "patch": build["externalParameters"]["patch"],
            "figures": build["internalParameters"]["figures"],
            "type": (found["_type"], found["predicateType"]),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(
            str(path),
            expected="the statement of a patched file",
            found=f"{type(error).__name__}: {error}",
            advice=advice,
        ) from error
    record = manifest.record
    true: Mapping[str, Any] = {
        "files": manifest.files,
        "base": record.base,
        "patch": record.patch,
        "figures": dict(record.figures),
        "type": (STATEMENT, PREDICATE),
    }
    wrong = [name for name, value in true.items() if said[name] != value]
    if wrong:
        raise SignatureError(
            str(path), expected="what the patched file says", found=f"other {', '.join(wrong)}", advice=advice
        )


def _same(what: str, path: Path, found: str, named: str) -> None:
    if found != named:
        raise PatchMismatchError(
            str(path),
            expected=f"the {what} that the patched file names, {named}",
            found=found,
            advice=f"Give the {what} that was baked, or leave it out.",
        )
