"""What is read back from a patched file, and maps of samples from the maps of a graph."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from form_nets import FORMS as FORM_NETS
from form_nets import HEADS, TOKENS
from models import FORMS, Net, draw_patch, margins, run, same_bits, with_outputs

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.maps import canonical_map, map_outputs, mean_maps, sample_maps, with_maps
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.read_back import baked_detector, baked_weight
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.inspect import axis_sites, last_margin
from atpatch_onnx.measuring.inspect import margins as margins_of

MAPS = np.arange(1, 25, dtype=np.float64).reshape(4, 2, 3)


def test_one_map_a_sample_stays_as_it_is() -> None:
    assert sample_maps(MAPS, 4) is MAPS


def test_windows_of_a_sample_stand_along_the_diagonal() -> None:
    found = sample_maps(MAPS, 2)
    assert found.shape == (2, 4, 6)
    for sample in range(2):
        assert np.array_equal(found[sample, :2, :3], MAPS[2 * sample])
        assert np.array_equal(found[sample, 2:, 3:], MAPS[2 * sample + 1])
    assert np.count_nonzero(found) == MAPS.size, "a window sees no key of another"


def test_samples_that_share_a_map_get_their_own_queries_and_keys() -> None:
    shared = np.arange(24, dtype=np.float64).reshape(1, 4, 6)
    found = sample_maps(shared, 2)
    assert np.array_equal(found, [shared[0, :2, :3], shared[0, 2:, 3:]])


@pytest.mark.parametrize("name", ["plain", "heads in the batch", "windows in the batch", "transposed"])
def test_maps_of_a_graph_are_brought_to_the_same_axes(name: str) -> None:
    """Rows are those of a softmax, whatever order the graph has its axes in."""
    form = FORM_NETS[name]
    model, feed = form.model(), form.feed(3)
    sites = find_sites(model)
    shown = with_maps(model, sites, [])
    found = run(shown, feed)
    for site in sites:
        maps = canonical_map(found[map_outputs(sites)[site.name]], site)
        assert maps.shape == (3 * form.parts, HEADS, form.keys, form.keys)
        np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)  # float32 rounding of sixteen weights
        means = mean_maps(found[map_outputs(sites)[site.name]], site, 3)
        assert means.shape == (3, TOKENS, TOKENS)
        np.testing.assert_allclose(means.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("mode", [None, 0, 3])
def test_an_op_is_asked_for_its_map(mode: int | None) -> None:
    """It hands it out beside its own outputs, which keep their bits, whatever stage of it is one already."""
    net = Net(opset=23, form="attention", mode=mode)
    decomposed = Net(opset=23)
    feed = net.feed(np.random.default_rng(0))
    maps = []
    for model in (net.model(), decomposed.model()):
        sites = find_sites(model)
        found, base = run(with_maps(model, sites, []), feed), run(model, feed)
        names = [map_outputs(sites)[site.name] for site in sites]
        assert all(same_bits(found[output], array) for output, array in base.items())
        maps.append([mean_maps(found[name], site, 3) for site, name in zip(sites, names, strict=True)])
    for one, other in zip(*maps, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # the same weights, computed in one operator or in three


@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize("conditional", FORMS)
def test_a_baked_detector_gives_the_margins_that_the_graph_gives(kind: str, conditional: bool) -> None:
    net = Net()
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = draw_patch(model, kind=kind, threshold=0.1)
    baked = bake(model, patch, conditional=conditional)
    site = find_sites(model)[0]
    keys = run(with_outputs(model, [site.key.value]), feed)[site.key.value]
    expected, allowed = margins_of(baked_detector(baked, site.name), keys, site.key, len(keys))
    found = margins(model, patch, 0, feed)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= allowed).all()
    assert (allowed < 1e-3).all(), "rounding, not more"


def test_weights_that_are_not_there_are_named() -> None:
    model = Net().model()
    baked = bake(model, draw_patch(model, kind="hidden"))
    with pytest.raises(UnbakeError, match="the weight atpatch/site_0/nothing"):
        baked_weight(baked, "site_0", "nothing")
    short = ir.tensor(np.zeros(2, np.float32), name="atpatch/site_0/detector_bias")
    baked.graph.initializers["atpatch/site_0/detector_bias"].const_value = short
    with pytest.raises(UnbakeError, match="one product or one hidden layer"):
        baked_detector(baked, "site_0")


def test_sites_of_the_token_axes_that_a_patch_works_on() -> None:
    model = Net(layers=3).model()
    patch = draw_patch(model)
    record = read_record(bake(model, replace(patch, sites=patch.sites[:1])))
    assert [site.name for site in axis_sites(model, record)] == ["site_0", "site_1", "site_2"], "one axis"
    assert last_margin(record.sites) == "atpatch/site_0/margin"
    windows = FORM_NETS["windows in the batch"].model()
    patch = draw_patch(windows)
    record = read_record(bake(windows, replace(patch, sites=patch.sites[1:])))
    assert [site.name for site in axis_sites(windows, record)] == [patch.sites[1].site]
    with pytest.raises(UnbakeError, match="at least one patched site"):
        last_margin(())
