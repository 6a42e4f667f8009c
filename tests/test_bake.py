"""Baking: what is written into the graph, and that every way of writing it computes what the reference computes."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import (
    ALWAYS,
    NEVER,
    VARIANTS,
    Net,
    draw_patch,
    expected_output,
    fire_on_some,
    in_canonical_axes,
    margins,
    run,
    same_bits,
    site_values,
    with_outputs,
)
from onnx.reference import ReferenceEvaluator

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.invariants import violations
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.targets import TARGETS
from atpatch_onnx.errors import BakeError, PatchMismatchError
from atpatch_onnx.graph.names import DOMAIN
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Features, Patch

NETS = {
    "opset 15": Net(opset=15),
    "opset 17, grouped": Net(opset=17, heads=4, kv_heads=2),
    "opset 18, fixed": Net(opset=18, batch=3, tokens=5),
    "opset 18, masked": Net(opset=18, bias=True),
    "opset 18, guarded": Net(opset=18, form="guarded", bias=True),
    "opset 18, half": Net(opset=18, half=True),
    "opset 23, decomposed": Net(opset=23),
    "opset 26, decomposed": Net(opset=26),
    "opset 23, op": Net(opset=23, form="attention"),
    "opset 23, op, fixed": Net(opset=23, form="attention", batch=3, tokens=5),
    "opset 23, op, causal, grouped": Net(opset=23, form="attention", heads=4, kv_heads=2, causal=True),
    "opset 24, op, masked": Net(opset=24, form="attention", bias=True),
    "opset 24, op, past": Net(opset=24, form="attention", past=3),
    "opset 23, packed": Net(opset=23, form="packed", heads=4, kv_heads=2),
    "opset 24, packed, past": Net(opset=24, form="packed", past=3),
    "opset 23, op, scores of mode 0": Net(opset=23, form="attention", mode=0, bias=True),
    "opset 23, op, scores of mode 1": Net(opset=23, form="attention", mode=1, bias=True),
    "opset 23, op, scores of mode 2": Net(opset=23, form="attention", mode=2, bias=True),
    "opset 23, op, scores of mode 3": Net(opset=23, form="attention", mode=3, bias=True),
    "opset 24, packed, past, scores of mode 1": Net(opset=24, form="packed", past=3, mode=1),
    "Y is an output": Net(y_is_output=True),
    "Y of the op is an output": Net(opset=23, form="packed", y_is_output=True),
    "Y inside an If": Net(y_in_if=True),
    "Y of the op inside an If and an output": Net(opset=23, form="attention", y_in_if=True, y_is_output=True),
}

nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())


def tolerance(net: Net) -> dict[str, float]:
    """float32: values of the size of ten, some fifty roundings of 2**-24. float16: 2**-11 at each store."""
    return {"rtol": 2**-9, "atol": 2**-7} if net.half else {"rtol": 1e-5, "atol": 1e-5}


@nets
def test_all_ways_of_writing_agree_with_each_other_and_with_the_reference(net: Net) -> None:
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    patch = fire_on_some(model, draw_patch(model), feed)
    sites = find_sites(model)
    results = []
    for emission, inline in VARIANTS:
        baked = bake(model, patch, emission=emission, inline=inline, site_flags=True)
        for optimize in (True, False):
            where = f"{emission}, inline={inline}, optimize={optimize}"
            results.append(run(baked, feed, optimize=optimize))  # optimize=False: what is written, nothing rewritten
            for name, first in results[0].items():
                np.testing.assert_allclose(results[-1][name], first, **tolerance(net), err_msg=f"{name}, {where}")
        names = [site_values(baked, number) for number in range(len(sites))]
        dtype = sites[0].dtype
        seen = run(with_outputs(baked, [name for site in names for name in site.values()], dtype), feed)
        records = read_record(baked).sites
        for site, entry, values, record in zip(sites, patch.sites, names, records, strict=True):
            found = in_canonical_axes({key: seen[name] for key, name in values.items()}, record)
            wanted = expected_output(found, entry)
            np.testing.assert_allclose(found["Y"], wanted, **tolerance(net), err_msg=f"{site.name}, {where}")
            quiet = ~found["M"].any(-1)
            assert same_bits(found["Y"][quiet], found["base"][quiet])
            assert np.array_equal(results[-1][f"atpatch/{site.name}/flags"], found["M"])
    flagged = np.logical_or.reduce([results[0][f"atpatch/{site.name}/flags"].any(-1) for site in sites])
    assert flagged.any(), "the test is about something"
    assert np.array_equal(results[0]["atpatch/flagged"][:, 0], flagged)


@nets
def test_a_detector_that_never_fires_changes_no_bit(net: Net) -> None:
    model, feed = net.model(), net.feed(np.random.default_rng(2))
    patch = draw_patch(model, threshold=NEVER)
    for optimize, variants in ((True, VARIANTS), (False, VARIANTS[1:3])):
        base = run(model, feed, optimize=optimize)
        for emission, inline in variants:
            patched = run(bake(model, patch, emission=emission, inline=inline), feed, optimize=optimize)
            for name, value in base.items():
                assert same_bits(patched[name], value), f"{name}, {emission}, inline={inline}, optimize={optimize}"
            assert not patched["atpatch/flagged"].any()
            assert (patched["atpatch/score"] < 0).all()


@nets
def test_the_models_own_interface_stays(net: Net) -> None:
    model = net.model()
    patch = draw_patch(model)
    for emission, inline in VARIANTS[1:3]:
        baked = graph.to_bytes(bake(model, patch, emission=emission, inline=inline, site_flags=True))
        old, new = net.proto().graph, onnx.load_from_string(baked).graph
        assert list(new.input) == list(old.input)
        count = len(old.output)
        assert list(new.output)[:count] == list(old.output)
        added = list(new.output)[count:]
        flags = [f"atpatch/{site.name}/flags" for site in find_sites(model)]
        assert [value.name for value in added] == ["atpatch/flagged", "atpatch/score", *flags]
        types = [value.type.tensor_type for value in added]
        assert [kind.elem_type for kind in types] == [onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT] + [
            onnx.TensorProto.BOOL
        ] * len(flags)
        for kind in types[:2]:
            batch, one = kind.shape.dim
            assert (batch.dim_param or batch.dim_value) == net.batch
            assert one.dim_value == 1


@nets
def test_everything_that_is_added_is_named_as_ours(net: Net) -> None:
    model = net.model()
    own = _names(model)
    for emission, inline in VARIANTS:
        baked = bake(model, draw_patch(model), emission=emission, inline=inline, site_flags=True)
        added = _names(baked) - own
        assert added
        assert [name for name in added if not name.startswith("atpatch/")] == []
        assert own <= _names(baked)
        assert bool(baked.functions) is not inline
        assert (DOMAIN in baked.opset_imports) is not inline
        assert violations(baked) == ()
        onnx.checker.check_model(onnx.load_from_string(graph.to_bytes(baked)), full_check=True)


def _names(model: ir.Model) -> set[str]:
    """Names of all nodes, values and weights, branches included."""
    names = {node.name for node in model.graph.all_nodes()}
    for part in model.graphs():
        names |= {value.name for value in (*part.inputs, *part.initializers.values())}
        names |= {value.name for node in part for value in node.outputs}
    return {str(name) for name in names if name}


def test_the_base_is_left_alone() -> None:
    model = Net(y_in_if=True).model()
    before = graph.to_bytes(model)
    patch = draw_patch(model)
    first = graph.to_bytes(bake(model, patch))
    assert graph.to_bytes(model) == before
    assert graph.to_bytes(bake(model, patch)) == first, "the same patch gives the same bytes"


def test_the_file_says_what_it_is() -> None:
    model = Net().model()
    patch = draw_patch(model).with_figures({"asr": 0.01})
    baked = graph.to_bytes(bake(model, patch, emission=Emission.BRANCHLESS, site_flags=True))
    record = read_record(ir.from_proto(onnx.load_from_string(baked)))
    assert record.base == graph.fingerprint(model) == patch.base
    assert record.patch == patch.id
    assert record.emission == "branchless"
    assert record.figures == {"asr": 0.01}
    names = [site.name for site in find_sites(model)]
    assert [site.site for site in record.sites] == names
    assert record.monitors == ("atpatch/flagged", "atpatch/score", *(f"atpatch/{name}/flags" for name in names))
    proto = onnx.load_from_string(baked)
    assert all(json.dumps(entry.value) for entry in proto.metadata_props if entry.key.startswith("atpatch."))


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str) -> None:
    model = Net().model()
    baked = bake(model, draw_patch(model), target=target)
    conditional = any(node.op_type == "If" for node in baked.graph.all_nodes())
    assert conditional is (TARGETS[target].emission is Emission.CONDITIONAL)
    assert bool(baked.functions) is not TARGETS[target].inline


@pytest.mark.parametrize("ir_version", [4, 7, 8])
def test_files_from_before_model_local_functions_get_none(ir_version: int) -> None:
    net = Net(opset=15, ir_version=ir_version)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = fire_on_some(Net(opset=15, ir_version=8).model(), draw_patch(Net(opset=15, ir_version=8).model()), feed)
    baked = bake(model, replace(patch, base=graph.fingerprint(model)), inline=False)
    assert bool(baked.functions) is (ir_version == 8)
    assert baked.ir_version == ir_version
    assert run(baked, feed)["atpatch/flagged"].any()


def test_without_monitors_the_outputs_are_the_bases() -> None:
    model = Net().model()
    baked = bake(model, draw_patch(model), monitor=False)
    assert [value.name for value in baked.graph.outputs] == ["logits", "hidden"]
    assert violations(baked) == ()


def test_the_score_is_the_largest_margin_over_all_sites() -> None:
    net = Net()
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = draw_patch(model, threshold=NEVER)
    wanted = np.maximum(*(margins(model, patch, number, feed).max(-1, keepdims=True) for number in (0, 1)))
    assert np.array_equal(run(bake(model, patch), feed)["atpatch/score"], wanted)


@pytest.mark.parametrize(("emission", "inline"), VARIANTS)
def test_flags_are_carried_along_the_token_axis(emission: Emission, inline: bool) -> None:
    """The second site does not detect: its flags are the first site's."""
    net = Net(layers=3)
    model, feed = net.model(), net.feed(np.random.default_rng(3))
    patch = fire_on_some(model, draw_patch(model, detects=(True, False, True)), feed)
    baked = bake(model, patch, emission=emission, inline=inline, site_flags=True)
    flags = [run(baked, feed)[f"atpatch/site_{number}/flags"] for number in range(3)]
    assert np.array_equal(flags[0], flags[1])
    own = margins(model, patch, 2, feed) > 0
    assert np.array_equal(flags[2], own | flags[0])
    assert flags[0].any()
    assert (flags[2] != flags[0]).any(), "the third site adds flags of its own"


def test_flags_are_not_carried_to_another_token_axis() -> None:
    """With a past, the keys of the first site are more positions than those of the second."""
    model = Net(opset=24, form="attention", past=2).model()
    with pytest.raises(PatchMismatchError, match="a detecting site before it on its token axis"):
        bake(model, draw_patch(model, detects=(True, False)))


@pytest.mark.parametrize(("emission", "inline"), VARIANTS)
def test_a_site_may_detect_only(emission: Emission, inline: bool) -> None:
    net = Net()
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = draw_patch(model, threshold=ALWAYS, redistributes=False)
    baked = bake(model, patch, emission=emission, inline=inline)
    base, patched = run(model, feed), run(baked, feed)
    assert patched["atpatch/flagged"].all()
    assert all(same_bits(patched[name], value) for name, value in base.items())
    assert read_record(baked).outputs == {}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, "profile"])
@pytest.mark.parametrize("neutral", [True, False], ids=["neutral", "own"])
@pytest.mark.parametrize("name", ["opset 18, fixed", "opset 23, op, fixed"])
def test_benign_attention_and_values(name: str, neutral: bool, beta: float | str) -> None:
    net = NETS[name]
    model, feed = net.model(), net.feed(np.random.default_rng(4))
    value = np.random.default_rng(5).random((2, 5, 1)) if beta == "profile" else beta
    patch = fire_on_some(model, draw_patch(model, neutral=neutral, beta=value), feed)
    for number, (emission, inline) in enumerate(VARIANTS):
        baked = bake(model, patch, emission=emission, inline=inline, site_flags=True)
        site = number % 2
        names = site_values(baked, site)
        seen = run(with_outputs(baked, list(names.values())), feed)
        found = in_canonical_axes({key: seen[name] for key, name in names.items()}, read_record(baked).sites[site])
        wanted = expected_output(found, patch.sites[site])
        np.testing.assert_allclose(found["Y"], wanted, **tolerance(net))


def test_onnxs_own_evaluator_agrees() -> None:
    """Another implementation of every operator: nothing here hangs by onnxruntime."""
    net = NETS["opset 18, masked"]
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    patch = fire_on_some(model, draw_patch(model), feed)
    for emission, inline in VARIANTS:
        baked = bake(model, patch, emission=emission, inline=inline)
        evaluator = ReferenceEvaluator(onnx.load_from_string(graph.to_bytes(baked)))
        found = dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))
        for name, wanted in run(baked, feed).items():
            np.testing.assert_allclose(found[name], wanted, **tolerance(net), err_msg=name)


# What is refused


def test_unknown_targets() -> None:
    model = Net().model()
    with pytest.raises(BakeError, match="one of cpu"):
        bake(model, draw_patch(model), target="toaster")


def test_patched_models_are_not_patched_again() -> None:
    model = Net().model()
    baked = bake(model, draw_patch(model))
    with pytest.raises(BakeError, match="patched already"):
        bake(baked, draw_patch(model))
    for key in [key for key in baked.metadata_props if key.startswith("atpatch.")]:
        del baked.metadata_props[key]
    with pytest.raises(BakeError, match="no names under"):
        bake(baked, draw_patch(model))


@pytest.mark.parametrize("kind", ["value", "initializer", "input"])
def test_names_of_ours_that_are_taken(kind: str) -> None:
    """A base that has our names already would be mixed up with the patch by `unbake`."""
    model = Net().model()
    value = {
        "value": next(node.outputs[0] for node in model.graph),
        "initializer": next(iter(model.graph.initializers.values())),
        "input": model.graph.inputs[0],
    }[kind]
    value.name = "atpatch/site_0/margin"
    with pytest.raises(BakeError, match="no names under"):
        bake(model, draw_patch(model))


def test_old_opsets() -> None:
    model = Net().model()
    patch = draw_patch(model)
    model.graph.opset_imports[""] = 14
    with pytest.raises(BakeError, match="opset 15 or later"):
        bake(model, patch)


def test_another_model() -> None:
    patch = draw_patch(Net(seed=1).model())
    with pytest.raises(PatchMismatchError, match="the model it was fitted on"):
        bake(Net(seed=2).model(), patch)


def test_unknown_sites() -> None:
    model = Net().model()
    patch = draw_patch(model)
    stranger = replace(patch.sites[0], site="nowhere")
    with pytest.raises(PatchMismatchError, match="nowhere"):
        bake(model, replace(patch, sites=(stranger,)))


def _with_first_site(patch: Patch, **changes: object) -> Patch:
    return replace(patch, sites=(replace(patch.sites[0], **changes), *patch.sites[1:]))  # type: ignore[arg-type]


def test_arrays_that_do_not_fit_the_site() -> None:
    model = Net(batch=3, tokens=5).model()
    patch = draw_patch(model)
    wider = draw_patch(Net(heads=3, kv_heads=3, batch=3, tokens=5).model()).sites[0]
    redistribution = patch.sites[0].redistribution
    assert redistribution is not None
    with pytest.raises(PatchMismatchError, match="column features"):
        bake(model, _with_first_site(patch, detector=wider.detector))
    with pytest.raises(PatchMismatchError, match="neutral value"):
        bake(model, _with_first_site(patch, redistribution=wider.redistribution))
    profile = replace(redistribution, beta=np.full((2, 4, 1), 0.5, np.float32))
    with pytest.raises(PatchMismatchError, match="profile"):
        bake(model, _with_first_site(patch, redistribution=profile))


def test_whole_columns_of_a_free_length() -> None:
    fixed, free = Net(batch=3, tokens=5).model(), Net().model()
    detector = draw_patch(fixed, features=Features.WHOLE).sites[0].detector
    with pytest.raises(PatchMismatchError, match="free length"):
        bake(free, _with_first_site(draw_patch(free), detector=detector))


def test_a_patch_without_sites() -> None:
    model = Net().model()
    with pytest.raises((BakeError, PatchMismatchError)):
        bake(model, Patch(graph.fingerprint(model), ()))


def test_a_patch_with_one_site_twice() -> None:
    model = Net().model()
    patch = draw_patch(model)
    with pytest.raises((BakeError, PatchMismatchError)):
        bake(model, replace(patch, sites=(patch.sites[0], patch.sites[0])))
