"""A fix that is exchanged or switched off while requests are served: every answer is one patch's, and none is lost."""

import gc
import os
import resource
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from models import FORMS, Net, draw_patch
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx import Patch, PatchedSession
from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import BakeError, PatchMismatchError, ServingError, UnbakeError
from atpatch_onnx.patches.patch import Detector, LayerEdit, Neutral
from atpatch_onnx.running.sessions import FileSession
from atpatch_onnx.serving import drift

PLANTED = Planted()
SITE = "layer1.attention"


def inputs(count: int = 40) -> dict[str, np.ndarray]:
    """Clean and triggered ones, one after the other."""
    debug = PLANTED.debug(count // 2, seed=7)
    return {name: np.concatenate([array, debug.counterfactual[name]]) for name, array in debug.clean.items()}


def changed(patch: Patch, detector: dict | None = None, neutral: dict | None = None) -> Patch:
    """The patch with other fields at its only site."""
    [site] = patch.sites
    other = replace(
        site,
        detector=replace(site.detector, **(detector or {})),
        neutral=replace(site.neutral, **(neutral or {})),
    )
    return replace(patch, sites=(other,))


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
    return other_numbers(first)


def other_numbers(patch: Patch) -> Patch:
    rng = np.random.default_rng(3)
    [site] = patch.sites
    detector, neutral = site.detector, site.neutral
    return changed(
        patch,
        {"weights": detector.weights * np.float32(1.01), "threshold": detector.threshold - 0.05},
        {name: rng.normal(size=getattr(neutral, name).shape).astype(np.float32) for name in ("key", "value")},
    )


def hidden(patch: Patch) -> Patch:
    """The same scores from a hidden layer: the positive part less the negative one."""
    weights = patch.sites[0].detector.weights
    arrays = np.concatenate([weights, -weights], axis=1), np.zeros(2, np.float32), np.array([1, -1], np.float32)
    return changed(patch, dict(zip(("weights", "bias", "output"), arrays, strict=True)))


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


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_a_swapped_patch_answers_as_a_file_of_it(first, second, tmp_path, kind, conditional):
    if kind == "hidden":
        first, second = hidden(first), hidden(second)
    options = {"conditional": conditional, "site_flags": True}
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


FOLDABLE = {
    "neutral key": ({}, {"key": 0}, {}, {"key": 3}),
    "neutral value": ({}, {"value": 0}, {}, {"value": 3}),
    "biases": ({"bias": 0}, {}, {"bias": 0.2}, {}),
    "output": ({"output": 1}, {}, {"output": -3}, {}),
    "weights": ({"weights": 0, "output": 1}, {}, {"weights": 1, "output": 1}, {}),
}


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("case", FOLDABLE)
def test_no_optimizer_has_used_up_what_is_exchanged(first, tmp_path, case, conditional):
    """The values in the file are those that optimizers drop: nothing added, all multiplied by one."""
    patch = hidden(first) if case in ("biases", "output", "weights") else first
    before, after = (
        changed(patch, *(sized(fields, of) for fields, of in zip(numbers, parts(patch), strict=True)))
        for numbers in (FOLDABLE[case][:2], FOLDABLE[case][2:])
    )
    session = PatchedSession(written(before, tmp_path, conditional=conditional))
    own = answers(session, inputs())
    session.swap(after)
    expected = answers(plain(written(after, tmp_path, conditional=conditional)), inputs())
    assert answers(session, inputs()) == expected != own


def parts(patch: Patch) -> tuple[Detector, Neutral]:
    return patch.sites[0].detector, patch.sites[0].neutral


def sized(fields: dict, of: Detector | Neutral) -> dict:
    """Numbers as arrays of the size that the patch has."""
    return {
        name: np.full_like(getattr(of, name), value) if isinstance(getattr(of, name), np.ndarray) else value
        for name, value in fields.items()
    }


def saved(model: ir.Model, folder: Path) -> ort.InferenceSession:
    atp.save(model, folder / "base.onnx")
    return plain(folder / "base.onnx")


def test_a_probe_of_one_token_proves_neutral_values_too(tmp_path, monkeypatch):
    """It must be flagged, and half of one token is none."""
    net = Net(batch=1, tokens=1, layers=1)
    model = net.model()
    one, other = (draw_patch(model, seed, threshold=0.5) for seed in (1, 21))
    atp.save(atp.bake(model, one), tmp_path / "patched.onnx")
    session = PatchedSession(tmp_path / "patched.onnx")
    forget(monkeypatch, "neutral_value")
    with pytest.raises(ServingError, match="did not take all of them"):
        session.swap(other)


def test_what_other_numbers_cannot_say_is_refused(first, tmp_path):
    session = PatchedSession(written(first, tmp_path))
    own = answers(session, inputs())
    [site] = first.sites
    refused = {
        "without a neutral token": replace(first, sites=(replace(site, neutral=None),)),
        "a hidden layer": hidden(first),
        "another site": replace(first, sites=(replace(site, site="layer0.attention"),)),
        "another base": replace(first, base="sha256:0"),
    }
    for patch in refused.values():
        with pytest.raises(PatchMismatchError):
            session.swap(patch)
    assert session.patch == first.id
    assert answers(session, inputs()) == own


def forget(monkeypatch: pytest.MonkeyPatch, ignored: str) -> None:
    """Let sessions ignore one of the weights that they are handed."""
    usual = FileSession.__init__

    def forgetful(self, path, weights, **options):
        usual(self, path, {name: array for name, array in weights.items() if not name.endswith(ignored)}, **options)

    monkeypatch.setattr(FileSession, "__init__", forgetful)


@pytest.mark.parametrize("ignored", ["threshold", "neutral_key", "neutral_value", "detector"])
def test_a_session_that_ignores_a_weight_never_serves(first, second, tmp_path, monkeypatch, ignored):
    path = written(first, tmp_path)
    session = PatchedSession(path)
    own = answers(session, inputs())
    forget(monkeypatch, ignored)
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
    session.disable("layer1.mlp.hidden")
    atp.save(atp.bake(model, attention), tmp_path / "attention.onnx")
    assert answers(session, inputs()) == answers(plain(tmp_path / "attention.onnx"), inputs())
    session.enable("layer1.mlp.hidden")
    assert answers(session, inputs()) == answers(plain(paths[1]), inputs())


def test_a_file_of_neuron_edits_alone_has_nothing_to_count(tmp_path):
    model = Planted(mlp=4).model()
    arrays = np.zeros(1, np.float32), np.ones(1, np.float32)
    patch = Patch(atp.fingerprint(model), (), {}, (LayerEdit("layer1.mlp.hidden", np.array([0]), *arrays),))
    atp.save(atp.bake(model, patch), tmp_path / "patched.onnx")
    with pytest.raises(ServingError, match="edits of hidden units alone"):
        PatchedSession(tmp_path / "patched.onnx")


# Nothing gets past


NO_NUMBERS = {
    "neutral key": (None, {"key": np.nan}),
    "neutral value": (None, {"value": np.inf}),
    "weights": ({"weights": np.nan}, None),
    "threshold": ({"threshold": np.nan}, None),
    "threshold that no float32 holds": ({"threshold": 1e39}, None),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_patch_of_no_numbers_is_not_swapped_in(first, tmp_path, name):
    """It would serve NaN, or flag nothing."""
    detector, neutral = NO_NUMBERS[name]
    site = first.sites[0]
    if neutral:
        neutral = {key: np.full_like(getattr(site.neutral, key), number) for key, number in neutral.items()}
    if detector and "weights" in detector:
        detector = {"weights": np.full_like(site.detector.weights, np.nan)}
    session = PatchedSession(written(first, tmp_path))
    own = answers(session, inputs())
    with pytest.raises(BakeError, match="finite numbers"):
        session.swap(changed(first, detector, neutral))
    assert answers(session, inputs()) == own


def test_numbers_too_large_for_the_models_precision_are_refused():
    model = Net(half=True).model()
    patch = draw_patch(model, 1)
    [site, *rest] = patch.sites
    large = replace(site, neutral=Neutral(np.full_like(site.neutral.key, 1e30), site.neutral.value))
    with pytest.raises(BakeError, match="finite numbers of float16"):
        atp.bake(model, replace(patch, sites=(large, *rest)))


def test_a_file_that_was_edited_does_not_serve(first, tmp_path):
    patched = atp.bake(PLANTED.model(), first)
    node = next(node for node in patched.graph if node.name == f"atpatch/{SITE}/flagged")
    node.op_type = "GreaterOrEqual"
    atp.save(patched, tmp_path / "edited.onnx")
    with pytest.raises(UnbakeError, match="not as baking writes it"):
        PatchedSession(tmp_path / "edited.onnx")


@pytest.mark.parametrize("data", [False, True], ids=["model", "external data"])
def test_a_file_that_was_exchanged_is_not_taken(first, second, tmp_path, data):
    """What was proven goes on: the model, which is in memory, or where its data is another, the session."""
    model = PLANTED.model()
    path = tmp_path / "model.onnx"
    onnx.save(
        ir.to_proto(model), tmp_path / "base.onnx", save_as_external_data=data, location="data", size_threshold=200
    )
    patch = replace(first, base=graphs.fingerprint(atp.load(tmp_path / "base.onnx")))
    atp.save(atp.bake(atp.load(tmp_path / "base.onnx"), patch), path)
    session = PatchedSession(path)
    own = answers(session, inputs())
    exchanged = tmp_path / "data" if data else path
    other = exchanged.with_suffix(".other")
    other.write_bytes(exchanged.read_bytes() if data else b"something else")
    other.replace(exchanged)
    if not data:
        session.swap(patch)
    else:
        with pytest.raises(ServingError, match="exchanged"):
            session.swap(replace(second, base=patch.base))
    assert answers(session, inputs()) == own
    assert session.patch == patch.id


def test_a_closed_session_says_so(first, second, tmp_path):
    with PatchedSession(written(first, tmp_path)) as session:
        session.run(None, inputs())
    for use in (lambda: session.run(None, inputs()), session.get_inputs, lambda: session.swap(second), session.close):
        if use == session.close:
            use()
        else:
            with pytest.raises(ServingError, match="closed"):
                use()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # newer Pythons warn of forks beside threads
def test_a_forked_child_is_told_and_does_not_hang(first, second, tmp_path):
    session = PatchedSession(written(first, tmp_path))
    with session._changing:  # as in the middle of a swap
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                session.swap(second)
            except ServingError as error:
                os._exit(7 if "after the fork" in str(error) else 1)
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize("site_flags", [False, True])
def test_a_batch_of_none_is_served(first, tmp_path, site_flags):
    path = written(first, tmp_path, site_flags=site_flags)
    nothing = {name: array[:0] for name, array in inputs().items()}
    with PatchedSession(path) as session:
        found = dict(zip([output.name for output in session.get_outputs()], session.run(None, nothing), strict=True))
        assert found["logits"].shape == (0, PLANTED.classes)
        assert found["atpatch/flagged"].shape == (0, 1)
        assert (session.stats().inferences, session.stats().requests) == (0, 1)
