"""Complete nets, one form of attention each: found with its axes, patched, run, verified and unbaked."""

from dataclasses import replace

import numpy as np
import pytest
from form_nets import FORMS as NETS
from form_nets import REFUSED, TOKENS, WIDTH, Batch, Form, softmax_in_float32
from models import FORMS, draw_patch, fire_on_some, in_axes, run, same_bits, see, with_outputs
from nudge import assert_places

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.probe import key_output, probe, value_output
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.measuring.verify import verify

SAMPLES = 3

nets = pytest.mark.parametrize("form", NETS.values(), ids=NETS.keys())
batches = pytest.mark.parametrize("batch", ["batch", SAMPLES], ids=["free", "fixed"])


@nets
@batches
def test_its_axes_are_found(form: Form, batch: Batch) -> None:
    model = form.model(batch)
    matches = explain(model)
    assert [miss.reason for miss in matches.near_misses] == []
    assert len(matches.sites) == 2
    for site in matches.sites:
        assert (site.map_layout, site.parts, site.heads) == (form.map, form.parts, form.heads)
        assert site.masked == form.masked
        assert site.self_attention is form.self_attention
        for place in (site.key, site.value):
            assert (place.heads, place.depth) == (form.kv_heads, WIDTH // form.heads)
            assert place.whole
            assert find_value(model.graph, place.value).producer().op_type == form.projection, "behind its bias"
        if form.keys is not None:
            assert (site.queries, site.keys) == (form.keys, form.keys)
    shared = matches.sites[0].token_axis == matches.sites[1].token_axis
    assert shared is (form.parts in (0, 1)), "flags are not carried from part to part"


@pytest.mark.parametrize("name", REFUSED)
@batches
def test_what_has_no_tokens_of_its_own_is_refused(name: str, batch: Batch) -> None:
    form, reason = REFUSED[name]
    matches = explain(form.model(batch))
    assert matches.sites == ()
    assert [miss.attention for miss in matches.near_misses] == [True, True]
    assert all(reason in miss.reason for miss in matches.near_misses)


@nets
@batches
def test_keys_and_values_are_where_a_site_says(form: Form, batch: Batch) -> None:
    # float32: sums of sixteen values of the size of one; float16: 2**-11 at each store
    assert_places(form.model(batch), form.feed(SAMPLES), atol=2**-7 if form.half else 1e-5)


@nets
@batches
def test_a_detector_that_never_fires_changes_no_bit(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    patch = draw_patch(model)
    for optimize in (True, False):
        base = run(model, feed, optimize=optimize)["out"]
        for conditional in FORMS:
            patched = run(bake(model, patch, conditional=conditional), feed, optimize=optimize)
            assert same_bits(patched["out"], base), f"conditional={conditional}, optimize={optimize}"
            assert not patched["atpatch/flagged"].any()


@nets
@batches
def test_chosen_tokens_are_neutral_and_all_others_the_bases(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.04)
    base = run(model, feed)["out"]
    kind = np.float16 if form.half else np.float32
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional, site_flags=True)
        found, outputs = see(baked, model, feed), run(baked, feed)
        flagged = np.zeros(SAMPLES, bool)
        for entry in patch.sites:
            seen, flags = found[entry.site], outputs[f"atpatch/{entry.site}/flags"]
            assert flags.shape == (SAMPLES, TOKENS), "the tokens of all parts, one after the other"
            assert flags.any(), "the test is about something"
            assert not flags.all()
            for neutral, own, replaced in (
                (entry.neutral.key, seen.key, seen.replaced_key),
                (entry.neutral.value, seen.value, seen.replaced_value),
            ):
                wanted = np.where(seen.flags[:, None, :, None], neutral[None, :, None].astype(kind), own)
                assert same_bits(replaced, wanted), f"{entry.site}, conditional={conditional}"
            flagged |= flags.any(axis=1)
        assert np.array_equal(outputs["atpatch/flagged"][:, 0], flagged)
        assert np.array_equal(outputs["atpatch/score"][:, 0] > 0, flagged)
        for sample in np.flatnonzero(~flagged):
            if form.parts:
                assert same_bits(outputs["out"][sample], base[sample]), "a quiet sample keeps its bits beside others"
            else:  # the samples share one map, whose product is computed with other keys
                np.testing.assert_allclose(outputs["out"][sample], base[sample], rtol=1e-5, atol=1e-5)
        assert not same_bits(outputs["out"], base)


@nets
def test_drawn_flags_leave_some_samples_alone(form: Form) -> None:
    """Or the test above would say nothing about batch-mates."""
    model, feed = form.model(), form.feed(12)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.02)
    flagged = run(bake(model, patch), feed)["atpatch/flagged"]
    assert 0 < flagged.mean() < 1


@nets
@batches
def test_unbaking_gives_the_base_back(form: Form, batch: Batch) -> None:
    model = form.model(batch)
    for conditional in FORMS:
        baked = bake(model, draw_patch(model), conditional=conditional)
        assert graph.fingerprint(unbake(baked)) == graph.fingerprint(model)


@nets
@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_it_verifies(form: Form, kind: str) -> None:
    model = form.model()
    patch = fire_on_some(model, draw_patch(model, kind=kind), form.feed(12), share=0.02)
    clean, changed = form.feed(6, seed=2), form.feed(6, seed=3)
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional)
        result = verify(model, baked, DebugSet.from_pairs(clean, changed), batch_size=4)
        assert result.passed, result.failures


@nets
@batches
def test_the_probe_hands_out_keys_and_values_sample_by_sample(form: Form, batch: Batch) -> None:
    model, feed = form.model(batch), form.feed(SAMPLES)
    sites = find_sites(model)
    seen = run(probe(model, sites), feed)
    names = [place.value for site in sites for place in (site.key, site.value)]
    inner = run(with_outputs(model, names, sites[0].key.dtype), feed)
    for site in sites:
        for place, name in ((site.key, key_output(site)), (site.value, value_output(site))):
            own, found = in_axes(inner[place.value], place, SAMPLES * form.parts or 1).astype(np.float32), seen[name]
            _, heads, tokens, depth = own.shape
            assert found.shape == (SAMPLES, TOKENS, heads * depth)
            for sample in range(SAMPLES):
                for token in range(TOKENS):
                    if form.parts:  # the tokens of a sample are those of all its parts, one after the other
                        of_map, key = sample * form.parts + token // tokens, token % tokens
                    else:  # the keys of the one map are those of all samples, one after the other
                        of_map, key = 0, sample * TOKENS + token
                    wanted = own[of_map, :, key].reshape(-1)
                    # in half precision a runtime may read keys before it has rounded them
                    assert np.allclose(found[sample, token], wanted, rtol=2**-10 if form.half else 0, atol=0)


ROUNDED = {"one head", "one head on an axis", "Einsum"}
"""Where nothing stands between projection and product that onnxruntime's CPU has a half precision kernel for."""


@pytest.mark.parametrize("name", [*(name for name in NETS if not NETS[name].half), "softmax in float32"])
def test_half_precision_that_is_not_flagged_keeps_its_bits(name: str) -> None:
    form = replace(NETS.get(name, Form(softmax_in_float32)), half=True)
    model, feed = form.model(), form.feed(SAMPLES)
    base = run(model, feed)["out"]
    for conditional in FORMS:
        found = run(bake(model, draw_patch(model), conditional=conditional), feed)["out"]
        if name in ROUNDED:  # the base's keys stay in float32 there, and ours are stored in between
            np.testing.assert_allclose(found, base, rtol=2**-8, atol=2**-8)
        else:
            assert same_bits(found, base)
