"""A bill of materials of a patched model: CycloneDX, with the base as its pedigree. Needs cyclonedx-python-lib."""

import json
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from atpatch_onnx.errors import require
from atpatch_onnx.provenance.manifest import Manifest


def bill_of_materials(manifest: Manifest, name: str) -> bytes:
    """The bill of a patched file, CycloneDX 1.6 as JSON; the same file gives the same bytes.

    The model is a component of type machine-learning-model; its ancestor is the base, known by its fingerprint, and
    what lies between them is the patch. What the fit measured are properties of the model.

    Args:
        manifest: Of the patched file.
        name: Of the file, for people.

    Raises:
        MissingExtraError: cyclonedx-python-lib is not installed.
    """
    require("cyclonedx", "sign", "writing a bill of materials")
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType, Patch, PatchClassification, Pedigree
    from cyclonedx.output.json import JsonV1Dot6

    record, kind = manifest.record, ComponentType.MACHINE_LEARNING_MODEL
    base = Component(
        name="base",
        type=kind,
        bom_ref=f"base {record.base}",
        properties=[Property(name="atpatch:fingerprint", value=record.base)],
    )
    stated = {
        "atpatch:patch": record.patch,
        "atpatch:base": record.base,
        "atpatch:conditional": "yes" if record.conditional else "no",
        **{f"atpatch:figures:{key}": json.dumps(value, sort_keys=True) for key, value in record.figures.items()},
    }
    data = [
        Component(
            name=file,
            type=ComponentType.DATA,
            bom_ref=f"file {file}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        )
        for file, sha256 in list(manifest.files.items())[1:]
    ]
    model = Component(
        name=name,
        type=kind,
        version=record.patch,
        bom_ref=f"patched {record.patch}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=next(iter(manifest.files.values())))],
        components=data,
        properties=[Property(name=key, value=value) for key, value in stated.items()],
        pedigree=Pedigree(
            ancestors=[base],
            patches=[Patch(type=PatchClassification.UNOFFICIAL)],
            notes=f"atpatch-onnx baked patch {record.patch} into {record.base}; 'atpatch unbake' gives the base back.",
        ),
    )
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, " ".join(manifest.files.values())))
    bom.metadata.component = model
    found: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    found["metadata"].pop("timestamp", None)  # when it was written is nothing that the file knows
    return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()
