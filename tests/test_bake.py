"""Baking: what is written into the graph, and that the base does the rest, whichever way it is written."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from driving import driven
from form_nets import FORMS as FORM_NETS
from models import ALWAYS, FORMS, NEVER, Net, draw_patch, fire_on_some, margins, run, same_bits, see
from onnx.reference import ReferenceEvaluator

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.invariants import violations
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.targets import TARGETS
from atpatch_onnx.errors import BakeError, PatchMismatchError
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Patch

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
@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_outputs_are_the_bases_that_is_given_neutral_keys_and_values(net: Net, kind: str) -> None:
    """Bit for bit as the graph is written; where onnxruntime rewrites both graphs, but for rounding."""
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    patch = fire_on_some(model, draw_patch(model, kind=kind), feed)
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional, site_flags=True)
        wanted = driven(model, baked, feed)
        found = run(baked, feed, optimize=False)
        for name, value in wanted.items():
            assert same_bits(found[name], value), f"{name}, conditional={conditional}"
        optimized = run(baked, feed)
        for name, value in found.items():
            np.testing.assert_allclose(optimized[name], value, **tolerance(net), err_msg=name)
        flags = [found[f"atpatch/{site.name}/flags"] for site in find_sites(model)]
        assert flags[0].any(), "the test is about something"
        assert not flags[0].all()
        flagged = np.logical_or.reduce([one.any(-1) for one in flags])
        assert np.array_equal(found["atpatch/flagged"][:, 0], flagged)
        assert np.array_equal(found["atpatch/score"][:, 0] > 0, flagged)


@nets
def test_flagged_tokens_are_neutral_and_all_others_keep_their_bits(net: Net) -> None:
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    patch = fire_on_some(model, draw_patch(model), feed)
    for conditional in FORMS:
        found = see(bake(model, patch, conditional=conditional), model, feed)
        assert list(found) == [entry.site for entry in patch.sites]
        for entry in patch.sites:
            seen = found[entry.site]
            assert entry.neutral is not None
            for neutral, before, after in (
                (entry.neutral.key, seen.key, seen.replaced_key),
                (entry.neutral.value, seen.value, seen.replaced_value),
            ):
                chosen = seen.flags[:, None, :, None]
                assert same_bits(after, np.where(chosen, neutral.astype(before.dtype)[None, :, None], before))


@nets
def test_both_ways_of_writing_give_the_same_bits(net: Net) -> None:
    """No attention stands in the `If`: its outputs do not depend on it, on what is flagged either."""
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    patch = fire_on_some(model, draw_patch(model), feed)
    for optimize in (True, False):
        one, other = (run(bake(model, patch, conditional=form), feed, optimize=optimize) for form in FORMS)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert same_bits(other[name], value), f"{name}, optimize={optimize}"


@nets
def test_a_detector_that_never_fires_changes_no_bit(net: Net) -> None:
    model, feed = net.model(), net.feed(np.random.default_rng(2))
    patch = draw_patch(model, threshold=NEVER)
    for optimize in (True, False):
        base = run(model, feed, optimize=optimize)
        for conditional in FORMS:
            patched = run(bake(model, patch, conditional=conditional), feed, optimize=optimize)
            for name, value in base.items():
                assert same_bits(patched[name], value), f"{name}, conditional={conditional}, optimize={optimize}"
            assert not patched["atpatch/flagged"].any()
            assert (patched["atpatch/score"] < 0).all()


@nets
def test_the_models_own_interface_stays(net: Net) -> None:
    model = net.model()
    patch = draw_patch(model)
    for conditional in FORMS:
        baked = graph.to_bytes(bake(model, patch, conditional=conditional, site_flags=True))
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
    for conditional in FORMS:
        baked = bake(model, draw_patch(model), conditional=conditional, site_flags=True)
        added = _names(baked) - own
        assert added
        assert [name for name in added if not name.startswith("atpatch/")] == []
        assert own <= _names(baked)
        assert baked.functions == model.functions
        assert baked.opset_imports == model.opset_imports, "nothing but ONNX's own operators is added"
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


@pytest.mark.parametrize("conditional", FORMS)
def test_the_file_says_what_it_is(conditional: bool) -> None:
    model = Net().model()
    patch = draw_patch(model).with_figures({"asr": 0.01})
    baked = graph.to_bytes(bake(model, patch, conditional=conditional, site_flags=True))
    record = read_record(ir.from_proto(onnx.load_from_string(baked)))
    assert record.base == graph.fingerprint(model) == patch.base
    assert record.patch == patch.id
    assert record.conditional is conditional
    assert record.figures == {"asr": 0.01}
    sites = find_sites(model)
    assert [(one.site, one.key, one.value) for one in record.sites] == [
        (site.name, site.key.value, site.value.value) for site in sites
    ]
    assert all(one.redistributes and one.own is not None for one in record.sites)
    flags = [f"atpatch/{site.name}/flags" for site in sites]
    assert record.monitors == ("atpatch/flagged", "atpatch/score", *flags)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wanted", [None, *FORMS])
def test_replacements_stand_in_an_if_as_asked_or_as_the_target_has_it(target: str, wanted: bool | None) -> None:
    model = Net().model()
    patch = draw_patch(model)
    if wanted and "If" in TARGETS[target].without:
        with pytest.raises(BakeError, match="the operator If"):
            bake(model, patch, target=target, conditional=wanted)
        return
    baked = bake(model, patch, target=target, conditional=wanted)
    expected = TARGETS[target].conditional if wanted is None else wanted
    assert any(node.op_type == "If" for node in baked.graph.all_nodes()) is expected
    assert read_record(baked).conditional is expected


@pytest.mark.parametrize("ir_version", [4, 7, 8])
def test_old_files_are_patched_and_stay_what_they_are(ir_version: int) -> None:
    net = Net(opset=15, ir_version=ir_version)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    baked = bake(model, fire_on_some(model, draw_patch(model), feed))
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


@pytest.mark.parametrize("conditional", FORMS)
def test_flags_are_carried_along_the_token_axis(conditional: bool) -> None:
    """The second site does not detect: its flags are the first site's, and it acts on them."""
    net = Net(layers=3)
    model, feed = net.model(), net.feed(np.random.default_rng(3))
    patch = fire_on_some(model, draw_patch(model, detects=(True, False, True)), feed, share=0.3)
    baked = bake(model, patch, conditional=conditional, site_flags=True)
    found = run(baked, feed, optimize=False)
    flags = [found[f"atpatch/site_{number}/flags"] for number in range(3)]
    assert np.array_equal(flags[0], flags[1])
    own = margins(model, patch, 2, feed) > 0
    assert np.array_equal(flags[2], own | flags[0])
    assert flags[0].any()
    assert (flags[2] != flags[0]).any(), "the third site adds flags of its own"
    seen = see(baked, model, feed)
    assert all(np.array_equal(seen[f"site_{number}"].flags, flags[number]) for number in range(3))
    for name, value in driven(model, baked, feed).items():
        assert same_bits(found[name], value), name


def test_flags_are_not_carried_to_another_token_axis() -> None:
    """Windows attend on their own: the tokens of one are not those of the other."""
    model = FORM_NETS["windows in the batch"].model()
    with pytest.raises(PatchMismatchError, match="a detecting site before it on its token axis"):
        bake(model, draw_patch(model, detects=(True, False)))


@pytest.mark.parametrize("conditional", FORMS)
def test_keys_in_a_cache_are_not_flagged_again(conditional: bool) -> None:
    """Their own run replaced them: flags are of the tokens that are computed here, at every site."""
    net = Net(opset=24, form="attention", past=2)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = fire_on_some(model, draw_patch(model, detects=(True, False)), feed)
    found = run(bake(model, patch, conditional=conditional, site_flags=True), feed)
    for site in find_sites(model):
        assert found[f"atpatch/{site.name}/flags"].shape == feed["x"].shape[:2]


@pytest.mark.parametrize("conditional", FORMS)
def test_a_site_may_detect_only(conditional: bool) -> None:
    net = Net()
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = draw_patch(model, threshold=ALWAYS, redistributes=False)
    baked = bake(model, patch, conditional=conditional)
    base, patched = run(model, feed), run(baked, feed)
    assert patched["atpatch/flagged"].all()
    assert all(same_bits(patched[name], value) for name, value in base.items())
    assert not any(site.redistributes for site in read_record(baked).sites)


@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_onnxs_own_evaluator_agrees(kind: str) -> None:
    """Another implementation of every operator: nothing here hangs by onnxruntime."""
    net = NETS["opset 18, masked"]
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    patch = fire_on_some(model, draw_patch(model, kind=kind), feed)
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional)
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
    model.graph.opset_imports[""] = 12
    with pytest.raises(BakeError, match="opset 13 or later"):
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
    neutral = patch.sites[0].neutral
    assert neutral is not None
    assert wider.neutral is not None
    with pytest.raises(PatchMismatchError, match="a detector of 8 features"):
        bake(model, _with_first_site(patch, detector=wider.detector))
    with pytest.raises(PatchMismatchError, match="a neutral key of 2 x 4; found one of 3 x 4"):
        bake(model, _with_first_site(patch, neutral=replace(neutral, key=wider.neutral.key)))
    with pytest.raises(PatchMismatchError, match="a neutral value of 2 x 4; found one of 3 x 4"):
        bake(model, _with_first_site(patch, neutral=replace(neutral, value=wider.neutral.value)))


def test_a_patch_without_sites() -> None:
    model = Net().model()
    with pytest.raises(PatchMismatchError, match="at least one site or neuron edit"):
        bake(model, Patch(graph.fingerprint(model), ()))


def test_a_patch_with_one_site_twice() -> None:
    model = Net().model()
    patch = draw_patch(model)
    with pytest.raises(PatchMismatchError, match="each site once"):
        bake(model, replace(patch, sites=(patch.sites[0], patch.sites[0])))
