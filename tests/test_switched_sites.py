"""Sites of a served file that are switched off and on, with an `If` in the file or without."""

from dataclasses import replace

import numpy as np
import pytest
from models import FORMS, NEVER, Net, draw_patch, fire_on_some
from planted import fitted
from test_patched_session import PLANTED, SITE, answers, inputs, other_numbers, plain, saved, written

import atpatch_onnx as atp
from atpatch_onnx import PatchedSession
from atpatch_onnx.errors import ServingError


@pytest.mark.parametrize("conditional", FORMS)
def test_a_site_is_switched_off_and_on(tmp_path, conditional):
    first = fitted(PLANTED)
    second = other_numbers(first)
    session = PatchedSession(written(first, tmp_path, conditional=conditional))
    own = answers(session, inputs())
    base = PLANTED.model()
    atp.save(base, tmp_path / "base.onnx")
    session.disable(SITE)
    assert session.disabled == {SITE}
    logits, flagged, score = session.run(None, inputs())
    assert logits.tobytes() == answers(plain(tmp_path / "base.onnx"), inputs())[0]
    assert not flagged.any()
    assert (score < 0).all()
    session.swap(second)
    assert session.disabled == {SITE}
    assert session.run(["logits"], inputs())[0].tobytes() == logits.tobytes()
    session.swap(first)
    session.enable(SITE)
    assert not session.disabled
    assert answers(session, inputs()) == own
    with pytest.raises(ServingError, match=SITE):
        session.disable("layer7.attention")


ROLES = ((True, True), (False, True), (True, False), (True, True))
"""Of four sites: whether each detects, and whether it redistributes."""


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("off", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)], ids=str)
def test_a_site_that_is_off_does_nothing_and_the_others_go_on(tmp_path, off, conditional):
    """As in a file without it; flags are carried past it."""
    net = Net(layers=4)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = draw_patch(model, 2)
    patch = fire_on_some(model, patch, feed, share=0.2)
    sites = tuple(
        replace(site, detector=site.detector if detects else None, neutral=site.neutral if redistributes else None)
        for site, (detects, redistributes) in zip(patch.sites, ROLES, strict=True)
    )
    idle = tuple(
        replace(site, detector=site.detector and replace(site.detector, threshold=NEVER), neutral=None)
        if number in off
        else site
        for number, site in enumerate(sites)
    )
    paths = [tmp_path / "patched.onnx", tmp_path / "without.onnx"]
    for path, chosen in zip(paths, (sites, idle), strict=True):
        kept = tuple(site for site in chosen if site.detector or site.neutral)
        atp.save(atp.bake(model, replace(patch, sites=kept), conditional=conditional), path)
    session = PatchedSession(paths[0])
    outputs = ["logits", "hidden", "atpatch/flagged"]
    own, base = (each.run(outputs[:2], feed) for each in (session, saved(model, tmp_path)))
    assert not np.array_equal(own[0], base[0])
    for number in off:
        session.disable(patch.sites[number].site)
    found = session.run(outputs, feed)
    expected = plain(paths[1]).run(outputs, feed)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in expected]
    for number in off:
        session.enable(patch.sites[number].site)
    assert [array.tobytes() for array in session.run(outputs[:2], feed)] == [array.tobytes() for array in own]


@pytest.mark.parametrize("conditional", FORMS)
def test_half_precision(tmp_path, conditional):
    """A neutral token is stored in the type of the keys. Outside of a branch, onnxruntime's optimizer has converted it
    before another one is handed in; where it does, the old session goes on. Sites are switched in either case.
    """
    net = Net(half=True)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    one, other = (fire_on_some(model, draw_patch(model, seed), feed) for seed in (1, 2))
    paths = [tmp_path / "one.onnx", tmp_path / "other.onnx"]
    for path, patch in zip(paths, (one, other), strict=True):
        atp.save(atp.bake(model, patch, conditional=conditional), path)
    session = PatchedSession(paths[0])
    own = answers(session, feed)
    for site in session.sites:
        session.disable(site)
    assert answers(session, feed)[:2] == answers(saved(model, tmp_path), feed) != own[:2]
    for site in session.sites:
        session.enable(site)
    if conditional:
        session.swap(other)
        assert answers(session, feed) == answers(plain(paths[1]), feed) != own
    else:
        with pytest.raises(ServingError, match="did not take all of them"):
            session.swap(other)
        assert answers(session, feed) == own
