"""A fix that is exchanged or switched off while requests are served: every answer is one patch's, and none is lost."""

import gc
import resource
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from models import draw_patch
from models import session as model_session
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx import Patch, PatchedSession
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.errors import PatchMismatchError, ServingError
from atpatch_onnx.patches.patch import Detector, LayerEdit, Redistribution
from atpatch_onnx.running.sessions import FileSession
from atpatch_onnx.serving import drift

PLANTED = Planted()
SITE = "layer1.attention"


def inputs(count: int = 40) -> dict[str, np.ndarray]:
    """Clean and triggered ones, one after the other."""
    debug = PLANTED.debug(count // 2, seed=7)
    return {name: np.concatenate([array, debug.counterfactual[name]]) for name, array in debug.clean.items()}


def changed(patch: Patch, detector: dict | None = None, redistribution: dict | None = None) -> Patch:
    """The patch with other fields at its only site."""
    [site] = patch.sites
    return replace(
        patch,
        sites=(
            replace(
                site,
                detector=replace(site.detector, **(detector or {})),
                redistribution=replace(site.redistribution, **(redistribution or {})),
            ),
        ),
    )


def written(patch: Patch, folder: Path, **options: object) -> Path:
    path = folder / f"{patch.id}.onnx"
    atp.save(atp.bake(PLANTED.model(), patch, **options), path)
    return path


def answers(session: PatchedSession | ort.InferenceSession, of: dict[str, np.ndarray]) -> list[bytes]:
    return [array.tobytes() for array in session.run(None, of)]


def plain(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def first():
    return fitted(PLANTED)


@pytest.fixture(scope="module")
def second(first):
    """Does something else at every step."""
    return changed(first, *other_numbers(first))


def other_numbers(patch: Patch) -> tuple[dict, dict]:
    rng = np.random.default_rng(3)
    [site] = patch.sites
    detector: Detector = site.detector
    redistribution: Redistribution = site.redistribution
    return (
        {"threshold": detector.threshold - 0.05, "bias_2": detector.bias_2 + np.float32(0.01)},
        {
            "beta": redistribution.beta * np.float32(0.5),
            "neutral": rng.normal(size=redistribution.neutral.shape).astype(np.float32),
        },
    )


def test_it_is_an_inference_session(first, tmp_path):
    path = written(first, tmp_path)
    session, expected = PatchedSession(path), plain(path)
    assert answers(session, inputs()) == answers(expected, inputs())
    assert [array.tobytes() for array in session.run(["logits"], inputs())] == answers(expected, inputs())[:1]
    assert [value.name for value in session.get_inputs()] == [value.name for value in expected.get_inputs()]
    assert [value.name for value in session.get_outputs()] == [value.name for value in expected.get_outputs()]
    assert session.patch == first.id
    with pytest.raises(ValueError, match="Required inputs"):
        session.run(None, {})


@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("emission", Emission)
def test_a_swapped_patch_answers_as_a_file_of_it(first, second, tmp_path, emission, inline):
    options = {"emission": emission, "inline": inline, "site_flags": True}
    path = written(first, tmp_path, **options)
    before, other = path.read_bytes(), plain(written(second, tmp_path, **options))
    session = PatchedSession(path)
    own = answers(session, inputs())
    session.swap(second)
    assert session.patch == second.id
    assert answers(session, inputs()) == answers(other, inputs()) != own
    assert answers(PatchedSession(path, second), inputs()) == answers(other, inputs())
    session.swap(first)
    assert answers(session, inputs()) == own
    assert path.read_bytes() == before


NEUTRAL = np.zeros((2, 4), np.float32)
FOLDABLE = {
    "threshold": ({"threshold": 0.0}, {}, {"threshold": 0.5}, {}),
    "reach": ({"threshold": 0.3, "reach": 0.1}, {}, {"threshold": 0.3, "reach": 1.5}, {}),
    "beta": ({"threshold": 0.0}, {"beta": np.ones((1, 1, 1), np.float32)}, {"threshold": 0.0}, {"beta": 0.25}),
    "neutral": ({"threshold": 0.0}, {"neutral": NEUTRAL}, {"threshold": 0.0}, {"neutral": NEUTRAL + 3}),
    "biases": ({"bias_1": 0, "bias_2": 0}, {}, {"bias_1": 0.2, "bias_2": -0.3}, {}),
    "scale and mean": ({"scale": 1, "mean": 0}, {}, {"scale": 2, "mean": 1}, {}),
}


@pytest.mark.parametrize("emission", Emission)
@pytest.mark.parametrize("case", FOLDABLE)
def test_no_optimizer_has_used_up_what_is_exchanged(first, tmp_path, case, emission):
    """The values in the file are those that optimizers drop: nothing added, all multiplied by one."""
    before, after = (
        changed(first, *(sized(fields, of) for fields, of in zip(numbers, parts(first), strict=True)))
        for numbers in (FOLDABLE[case][:2], FOLDABLE[case][2:])
    )
    session = PatchedSession(written(before, tmp_path, emission=emission))
    session.swap(after)
    assert answers(session, inputs()) == answers(plain(written(after, tmp_path, emission=emission)), inputs())


def parts(patch: Patch) -> tuple[Detector, Redistribution]:
    return patch.sites[0].detector, patch.sites[0].redistribution


def sized(fields: dict, of: Detector | Redistribution) -> dict:
    """Numbers as arrays of the size that the patch has."""
    return {
        name: np.full_like(getattr(of, name), value)
        if isinstance(getattr(of, name), np.ndarray) and np.isscalar(value)
        else value
        for name, value in fields.items()
    }


def test_a_site_is_switched_off_and_on(first, second, tmp_path):
    session = PatchedSession(written(first, tmp_path))
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


def test_one_of_several_sites_is_switched_off(tmp_path):
    planted = Planted(drawn=(0, 1), harmful=(1, 2))
    patch = fitted(planted)
    path = tmp_path / "patched.onnx"
    atp.save(atp.bake(planted.model(), patch, site_flags=True), path)
    session, debug = PatchedSession(path), planted.debug(20, seed=7)
    assert len(session.sites) > 1
    before = session.run(["logits"], debug.counterfactual)[0]
    redistributing = [site.site for site in patch.sites if site.redistribution is not None]
    session.disable(redistributing[-1])
    after = session.run(["logits"], debug.counterfactual)[0]
    assert not np.array_equal(before, after)
    atp.save(planted.model(), tmp_path / "base.onnx")
    base = plain(tmp_path / "base.onnx").run(["logits"], debug.counterfactual)[0]
    assert not np.array_equal(base, after)


def test_what_other_numbers_cannot_say_is_refused(first, tmp_path):
    session = PatchedSession(written(first, tmp_path))
    own = answers(session, inputs())
    [site] = first.sites
    hidden = {
        name: np.repeat(getattr(site.detector, name), 2, axis)
        for name, axis in (("weight_1", 0), ("bias_1", 0), ("weight_2", 1))
    }
    refused = {
        "neutral values": changed(first, {}, {"neutral": None}),
        "of shape": changed(first, hidden),
        "others": replace(first, sites=(replace(site, site="layer0.attention"),)),
        "reach": changed(first, {"reach": 0.2}),
        "fitted on": replace(first, base="sha256:0"),
    }
    for patch in refused.values():
        with pytest.raises(PatchMismatchError):
            session.swap(patch)
    assert session.patch == first.id
    assert answers(session, inputs()) == own


@pytest.mark.parametrize("ignored", ["threshold", "beta", "neutral", "bias_2"])
def test_a_session_that_ignores_a_weight_never_serves(first, second, tmp_path, monkeypatch, ignored):
    path = written(first, tmp_path)
    session = PatchedSession(path)
    own = answers(session, inputs())
    usual = FileSession.__init__

    def forgetful(self, path, weights, **options):
        usual(self, path, {name: array for name, array in weights.items() if not name.endswith(ignored)}, **options)

    monkeypatch.setattr(FileSession, "__init__", forgetful)
    with pytest.raises(ServingError, match="did not take all of them"):
        session.swap(second)
    assert session.patch == first.id
    assert answers(session, inputs()) == own


def test_what_it_counts(first, tmp_path):
    session = PatchedSession(written(first, tmp_path, site_flags=True))
    flagged = session.run(None, inputs())[1]
    session.run(["logits"], inputs(10))
    stats = session.stats()
    assert (stats.requests, stats.inferences) == (2, 50)
    assert stats.flagged == stats.flagged_by_site[SITE] == flagged.sum() + 5
    assert drift(stats, session.figures["goal"]["clean_flag_rate"]).alarm


def test_without_monitoring_outputs_it_is_refused(first, tmp_path):
    path = written(first, tmp_path, monitor=False)
    with pytest.raises(ServingError, match="monitoring output"):
        PatchedSession(path)


def test_options_and_probe_are_the_callers(first, second, tmp_path):
    made = []

    def options() -> ort.SessionOptions:
        made.append(ort.SessionOptions())
        made[-1].intra_op_num_threads = 1
        return made[-1]

    session = PatchedSession(written(first, tmp_path), options=options, probe=inputs(4))
    session.swap(second)
    assert len(made) == 3
    assert answers(session, inputs()) == answers(PatchedSession(written(second, tmp_path)), inputs())


THREADS, REQUESTS, SWAPS = 8, 2000, 20


def test_under_load_every_answer_is_one_patchs_and_none_is_lost(first, second, tmp_path, monkeypatch):
    """20 swaps while 8 threads ask 2,000 times; of all sessions that were opened only the live one is left.

    The process's memory is looked at as well, but 20 sessions of so small a model could hide in it.
    """
    opened, usual = weakref.WeakSet(), FileSession.__init__

    def opening(self, *args, **options):
        usual(self, *args, **options)
        opened.add(self)

    path, asked = written(first, tmp_path), inputs(8)
    session = PatchedSession(path, options=one_thread)
    expected = {tuple(answers(PatchedSession(path, patch, options=one_thread), asked)) for patch in (first, second)}
    assert len(expected) == 2
    monkeypatch.setattr(FileSession, "__init__", opening)
    permits, memory = threading.Semaphore(0), []

    def ask() -> tuple[bytes, ...]:
        permits.acquire()
        return tuple(answers(session, asked))

    with ThreadPoolExecutor(THREADS) as pool:
        requests = [pool.submit(ask) for _ in range(REQUESTS)]
        for swap in range(SWAPS):
            swapping = threading.Thread(target=session.swap, args=[second if swap % 2 == 0 else first])
            swapping.start()
            for _ in range(REQUESTS // SWAPS):
                permits.release()
                if swapping.is_alive():
                    time.sleep(0.001)
            swapping.join()
            gc.collect()
            memory.append(resident())
    seen = {request.result() for request in requests}
    assert seen == expected, "both patches answered, and nothing else did"
    assert session.stats().requests == REQUESTS
    gc.collect()
    assert set(opened) == {session._live}, "old sessions go when their last request has"
    assert min(memory[-4:]) <= 1.05 * max(memory[:8]), memory


def one_thread() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_neuron_edits_are_swapped_with_the_rest_of_a_patch(tmp_path):
    planted = Planted(mlp=4)
    model = planted.model()
    base = atp.fingerprint(model)

    def neurons(unit: int, constant: float) -> Patch:
        arrays = (np.array([value], np.float32) for value in (0, constant))
        return Patch(base, (), {}, (LayerEdit("layer1.mlp.hidden", np.array([unit]), *arrays),))

    attention = fitted(planted)
    one, other = (atp.compose([neurons(unit, constant), attention]) for unit, constant in ((0, 0.5), (3, 2.0)))
    paths = []
    for patch in (one, other):
        paths.append(tmp_path / f"{patch.id}.onnx")
        atp.save(atp.bake(model, patch), paths[-1])
    session = PatchedSession(paths[0])
    own = answers(session, inputs())
    session.swap(other)
    assert answers(session, inputs()) == answers(plain(paths[1]), inputs()) != own
    with pytest.raises(PatchMismatchError, match="each doing the same"):
        session.swap(attention)


def test_a_file_of_neuron_edits_alone_has_nothing_to_count(tmp_path):
    model = Planted(mlp=4).model()
    arrays = np.zeros(1, np.float32), np.ones(1, np.float32)
    patch = Patch(atp.fingerprint(model), (), {}, (LayerEdit("layer1.mlp.hidden", np.array([0]), *arrays),))
    atp.save(atp.bake(model, patch), tmp_path / "patched.onnx")
    with pytest.raises(ServingError, match="edits of hidden units alone"):
        PatchedSession(tmp_path / "patched.onnx")


# Sites that decide together

LATE = Planted(drawn=(2,), harmful=(0,), harm=400)


@pytest.fixture(scope="module")
def joint():
    """Detects at one site and redistributes at another, with a second site that detects a little."""
    model = LATE.model()
    patch = fitted(LATE)
    drawn = draw_patch(model).sites[1]
    [redistributing, detecting] = patch.sites
    sites = (redistributing, replace(drawn, redistribution=None), detecting)
    weights = np.array([0.1, 0.9], np.float32)
    return replace(patch, sites=sites, joint=replace(patch.joint, weights=weights))


def joint_file(patch: Patch, folder: Path) -> Path:
    path = folder / f"{patch.id}.onnx"
    atp.save(atp.bake(LATE.model(), patch, site_flags=True), path)
    return path


def test_a_joint_decision_is_swapped(joint, tmp_path):
    other = replace(joint, joint=replace(joint.joint, weights=np.array([0.2, 0.8], np.float32), threshold=0.3))
    session, expected = PatchedSession(joint_file(joint, tmp_path)), plain(joint_file(other, tmp_path))
    feed = LATE.debug(20, seed=7).counterfactual
    session.swap(other)
    assert session.patch == other.id
    assert answers(session, feed) == answers(expected, feed)
    with pytest.raises(PatchMismatchError, match="each doing the same"):
        session.swap(replace(joint, joint=None, sites=joint.sites[1:]))


def test_sites_of_a_joint_decision_are_switched_off(joint, tmp_path):
    session, feed = PatchedSession(joint_file(joint, tmp_path)), LATE.debug(20, seed=7).counterfactual
    flagged = session.run(["atpatch/flagged"], feed)[0]
    assert flagged.all()
    own = answers(session, feed)
    session.disable("layer0.attention")  # flags are still raised, and nothing is done
    logits, still = session.run(["logits", "atpatch/flagged"], feed)
    assert still.all()
    expected = model_session(LATE.model()).run(["logits"], feed)[0]
    assert logits.tobytes() == expected.tobytes()
    session.enable("layer0.attention")
    assert answers(session, feed) == own
    session.disable("layer1.attention")  # the other one decides alone, its weight 1 now
    assert session.run(["atpatch/flagged"], feed)[0].all()
    assert not session.run(["atpatch/flagged"], LATE.debug(20, seed=7).clean)[0].any()
    session.disable("layer2.attention")
    assert not session.run(["atpatch/flagged"], feed)[0].any()
