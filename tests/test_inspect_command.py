"""`atpatch inspect`: what is in a patched file, node by node, held against the file."""

import hashlib
import json
import os
from pathlib import Path

import onnx
import pytest
from command_line import PLANTED, call, four_parts
from planted import fitted

import atpatch_onnx as atp
from atpatch_onnx.provenance.manifest import manifest


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those of branches too."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for one in inner for node in nodes_of(one))]


def test_every_node_and_weight_that_the_base_does_not_have(place):
    base, patched = (onnx.load(place / name).graph for name in ("base.onnx", "patched.onnx"))
    found = manifest(place / "patched.onnx")
    before = {node.name for node in nodes_of(base)}
    added = [(node.name, node.op_type, tuple(node.input)) for node in nodes_of(patched) if node.name not in before]
    assert sorted((node.name, node.operator, node.reads) for node in found.nodes) == sorted(added)
    assert found.base_nodes == len(nodes_of(base))
    known = {tensor.name for tensor in base.initializer}
    weights = {
        tensor.name: (tuple(tensor.dims), len(tensor.raw_data))
        for tensor in patched.initializer
        if tensor.name not in known
    }
    assert {one.name: (one.shape, one.bytes) for one in found.weights} == weights
    (site,) = found.record.sites
    assert {node.replaces for node in found.nodes} - {None} == {site.key, site.value}
    assert found.record.patch == fitted(PLANTED).id
    assert found.files == {"patched.onnx": hashlib.sha256((place / "patched.onnx").read_bytes()).hexdigest()}


def test_data_files_are_part_of_the_file(here):
    onnx.save(PLANTED.proto(), "base.onnx", save_as_external_data=True, location="base.data", size_threshold=100)
    base = atp.load("base.onnx")
    atp.save(atp.bake(base, fitted(PLANTED)), "patched.onnx", external="reference")
    assert list(manifest("patched.onnx").files) == ["patched.onnx", "base.data"]


def test_inspect(place, here, capsys):
    assert call(place, "inspect @patched.onnx") == 0
    shown = capsys.readouterr().out
    words, patch = "".join(shown.split()), fitted(PLANTED)
    for said in (patch.id, patch.base, "with If", "atpatch/flagged, atpatch/score", "no signature beside it", "Where"):
        assert said.replace(" ", "") in words
    assert shown.rstrip().endswith(f"Next: atpatch verify BASE.onnx {place}/patched.onnx --patch FIX.safetensors")


def test_a_signature_that_cannot_be_read_is_said_and_no_more(place, here, capsys):
    Path("patched.onnx").write_bytes((place / "patched.onnx").read_bytes())
    Path("patched.onnx.sig").write_text("{")
    assert call(place, "inspect patched.onnx") == 0
    assert "not known by whom: of patched.onnx.sig was expected a signature of OMS" in " ".join(
        capsys.readouterr().out.split()
    )


def test_inspect_as_json(place, here, capsys):
    assert call(place, "inspect @patched.onnx --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        **json.loads(json.dumps(manifest(place / "patched.onnx").to_json())),
        "signed": {"by": None, "checked": False},
    }


def test_no_word_in_a_file_that_scanners_take_for_an_attack(place):
    """The figures come back as they were: only the file has another word."""
    assert b"backdoor" not in (place / "patched.onnx").read_bytes()
    assert manifest(place / "patched.onnx").record.figures["kind"] == "backdoor"


def test_what_is_not_patched_has_no_manifest(place, here, capsys):
    assert call(place, "inspect @base.onnx") == 1
    assert four_parts(capsys.readouterr().err)["expected"] == "a patched model"


def test_a_statement_names_files_base_patch_and_figures(place, here):
    from atpatch_onnx.errors import PatchMismatchError, SignatureError
    from atpatch_onnx.provenance.statement import check_statement, statement

    found = manifest(place / "patched.onnx")
    content = statement(found, base=place / "base.onnx", patch=place / "fix.safetensors")
    assert content == statement(found, base=place / "base.onnx", patch=place / "fix.safetensors")
    stated = json.loads(content)
    assert [entry["digest"]["sha256"] for entry in stated["subject"]] == list(found.files.values())
    build = stated["predicate"]["buildDefinition"]
    dependencies = {entry["name"]: entry["digest"] for entry in build["resolvedDependencies"]}
    for name, file in (("base", "base.onnx"), ("patch", "fix.safetensors")):
        assert dependencies[name]["sha256"] == hashlib.sha256((place / file).read_bytes()).hexdigest()
    assert build["internalParameters"]["figures"] == fitted(PLANTED).figures
    Path("stated.json").write_bytes(content)
    check_statement(Path("stated.json"), found)
    for name in ("externalParameters", "internalParameters"):
        other = json.loads(content)
        other["predicate"]["buildDefinition"][name] = {"base": "x", "patch": "y", "figures": {}}
        Path("stated.json").write_text(json.dumps(other))
        with pytest.raises(SignatureError, match="found other"):
            check_statement(Path("stated.json"), found)
    fitted(PLANTED).with_figures({}).save("other.safetensors")
    with pytest.raises(PatchMismatchError, match="leave it out"):
        statement(found, patch=Path("other.safetensors"))
    with pytest.raises(PatchMismatchError, match="leave it out"):
        statement(found, base=place / "patched.onnx")


def test_a_bill_of_materials_has_the_base_as_pedigree(place):
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    from atpatch_onnx.provenance.bill import bill_of_materials

    found = manifest(place / "patched.onnx")
    content = bill_of_materials(found, "patched.onnx")
    assert content == bill_of_materials(found, "patched.onnx")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode()) is None
    model = json.loads(content)["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": found.files["patched.onnx"]}]
    (base,) = model["pedigree"]["ancestors"]
    assert base["properties"] == [{"name": "atpatch:fingerprint", "value": fitted(PLANTED).base}]
    assert os.path.basename(model["name"]) == "patched.onnx"
