"""Complete nets, one form of attention each: found with its axes, patched, run, verified and unbaked."""

from dataclasses import replace

import numpy as np
import pytest
from form_nets import FORMS, TOKENS, WIDTH, Batch, Form, softmax_in_float32
from models import (
    NEVER,
    draw_joint_patch,
    draw_patch,
    expected_output,
    fire_on_some,
    in_canonical_axes,
    run,
    same_bits,
    site_values,
    with_outputs,
)

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.read import features_output, map_output, probe, values_output
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.matching.layout import canonical
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import Features

SAMPLES = 3

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
batches = pytest.mark.parametrize("batch", ["batch", SAMPLES], ids=["free", "fixed"])


def tolerance(form: Form) -> dict[str, float]:
    """float32: sums of sixteen values of the size of one. float16: 2**-11 at each store."""
    return {"rtol": 2**-9, "atol": 2**-8} if form.half else {"rtol": 1e-5, "atol": 1e-5}


@forms
@batches
def test_its_axes_are_found(form: Form, batch: Batch) -> None:
    matches = explain(form.model(batch))
    assert [miss.reason for miss in matches.near_misses] == []
    assert len(matches.sites) == 2
    for site in matches.sites:
        assert (site.map_layout, site.value_layout, site.output_layout) == (form.map, form.values, form.output)
        assert (site.parts, site.heads, site.kv_heads) == (form.parts, form.heads, form.kv_heads)
        assert (site.depth, site.masked) == (WIDTH // form.heads, form.masked)
        assert site.self_attention
        if form.keys is not None:
            assert (site.queries, site.keys) == (form.keys, form.keys)
    shared = matches.sites[0].token_axis == matches.sites[1].token_axis
    assert shared is (form.parts in (0, 1)), "flags are not carried from part to part"


@forms
@batches
def test_map_times_values_is_the_output(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    sites = find_sites(model)
    names = [str(name) for site in sites for name in (site.map, site.value, site.output)]
    seen = run(with_outputs(model, names, sites[0].dtype), feed)
    for site in sites:
        P = canonical(seen[str(site.map)], site.map_layout, {"h": form.heads, "w": form.parts}).astype(np.float64)
        V = canonical(seen[site.value], site.value_layout, {"h": form.kv_heads, "w": form.parts}).astype(np.float64)
        Y = canonical(seen[site.output], site.output_layout, {"h": form.heads, "w": form.parts})
        assert len(P) == SAMPLES * form.parts if form.parts else len(P) == 1
        np.testing.assert_allclose(P @ np.repeat(V, form.heads // form.kv_heads, axis=1), Y, **tolerance(form))
        sums = P.sum(-1)
        assert (sums < 1 + 1e-3).all()
        assert form.sums_to_one is bool((sums > 1 - 1e-3).all())


@forms
@batches
def test_a_detector_that_never_fires_changes_no_bit(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    patch = draw_patch(model, threshold=NEVER)
    for optimize, written in ((True, emissions(form)), (False, (Emission.BRANCHLESS,))):
        base = run(model, feed, optimize=optimize)["out"]
        for emission in written:
            patched = run(bake(model, patch, emission=emission), feed, optimize=optimize)
            assert same_bits(patched["out"], base), f"{emission}, optimize={optimize}"
            assert not patched["atpatch/flagged"].any()


@forms
@batches
def test_chosen_columns_give_what_the_reference_gives(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.04)
    base = run(model, feed)["out"]
    for emission in emissions(form):
        baked = bake(model, patch, emission=emission, inline=emission is Emission.BRANCHLESS, site_flags=True)
        names = [site_values(baked, number) for number in (0, 1)]
        seen = run(with_outputs(baked, [name for site in names for name in site.values()], record_type(form)), feed)
        for entry, values, site in zip(patch.sites, names, read_record(baked).sites, strict=True):
            flags = seen[values["M"]]
            assert flags.shape == (SAMPLES, TOKENS), "the columns of all parts, one after the other"
            assert flags.any(), "the test is about something"
            assert not flags.all()
            found = in_canonical_axes({key: seen[name] for key, name in values.items()}, site)
            wanted = expected_output(found, entry)
            np.testing.assert_allclose(found["Y"], wanted, **tolerance(form), err_msg=f"{site.site}, {emission}")
            quiet = ~found["M"].any(-1)
            assert same_bits(found["Y"][quiet], found["base"][quiet]), "maps without a flag keep their bits"
        flagged = np.any([seen[values["M"]].any(-1) for values in names], axis=0)
        assert np.array_equal(seen["atpatch/flagged"][:, 0], flagged)
        assert np.array_equal(seen["atpatch/score"][:, 0] > 0, flagged)
        own = run(baked, feed)["out"]
        for sample in np.flatnonzero(~flagged):
            if form.parts:
                assert same_bits(own[sample], base[sample]), "an unflagged sample keeps its bits beside flagged ones"
            else:  # the samples share one map: all of its product is computed anew
                np.testing.assert_allclose(own[sample], base[sample], **tolerance(form))


def emissions(form: Form) -> tuple[Emission, ...]:
    """Half precision is written branchless: what runtimes cast around an `If` may change the bits."""
    return (Emission.BRANCHLESS,) if form.half else tuple(Emission)


def record_type(form: Form) -> str:
    return "FLOAT16" if form.half else "FLOAT"


@forms
def test_drawn_flags_leave_some_samples_alone(form: Form) -> None:
    """Or the test above would say nothing about batch-mates."""
    model, feed = form.model(), form.feed(12)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.02)
    flagged = run(bake(model, patch), feed)["atpatch/flagged"]
    assert 0 < flagged.mean() < 1


@forms
@batches
def test_unbaking_gives_the_base_back(form: Form, batch: Batch) -> None:
    model = form.model(batch)
    for emission in Emission:
        for inline in (False, True):
            baked = bake(model, draw_patch(model), emission=emission, inline=inline)
            assert graph.fingerprint(unbake(baked)) == graph.fingerprint(model)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.parts in (0, 1)])
def test_it_verifies_with_a_joint_decision(name: str) -> None:
    form = FORMS[name]
    model = form.model()
    patch = draw_joint_patch(model, form.feed(12), share=0.1)
    clean, changed = form.feed(6, seed=2), form.feed(6, seed=3)
    for emission in emissions(form):
        baked = bake(model, patch, emission=emission)
        result = verify(model, baked, DebugSet.from_pairs(clean, changed), batch_size=4)
        assert result.passed, result.failures


@forms
@pytest.mark.parametrize("neutral", [True, False], ids=["neutral", "own"])
def test_it_verifies(form: Form, neutral: bool) -> None:
    model = form.model()
    patch = fire_on_some(model, draw_patch(model, neutral=neutral), form.feed(12), share=0.02)
    clean, changed = form.feed(6, seed=2), form.feed(6, seed=3)
    for emission in emissions(form):
        result = verify(model, bake(model, patch, emission=emission), DebugSet.from_pairs(clean, changed), batch_size=4)
        assert result.passed, result.failures


@forms
@batches
def test_the_probe_hands_out_columns_sample_by_sample(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    sites = find_sites(model)
    kinds = dict.fromkeys(sites, Features.WHOLE)
    seen = run(probe(model, kinds, maps=sites), feed)
    inner = run(with_outputs(model, [site.value for site in sites], record_type(form)), feed)
    for site in sites:
        P = seen[map_output(site)]
        _, heads, queries, keys = P.shape
        columns = TOKENS
        V = canonical(inner[site.value], site.value_layout, {"h": form.kv_heads, "w": form.parts}).astype(np.float32)
        features, values = seen[features_output(site)], seen[values_output(site)]
        assert features.shape == (SAMPLES, heads * queries, columns)
        assert values.shape == (SAMPLES, form.kv_heads, columns, V.shape[3])
        for sample in range(SAMPLES):
            for column in range(columns):
                if form.parts:  # the columns of a sample are those of all its parts, one after the other
                    of_map, key = sample * form.parts + column // keys, column % keys
                else:  # the keys of the one map are those of all samples, one after the other
                    of_map, key = 0, sample * columns + column
                assert np.array_equal(features[sample, :, column], P[of_map, :, :, key].reshape(-1))
                assert np.array_equal(values[sample, :, column], V[of_map, :, key])


@pytest.mark.parametrize("name", [*(name for name in FORMS if not FORMS[name].half), "softmax in float32"])
def test_half_precision_that_is_not_flagged_keeps_its_bits(name: str) -> None:
    form = replace(FORMS.get(name, Form(softmax_in_float32)), half=True)
    model, feed = form.model(), form.feed(SAMPLES)
    patched = run(bake(model, draw_patch(model, threshold=NEVER)), feed)
    assert same_bits(patched["out"], run(model, feed)["out"])
