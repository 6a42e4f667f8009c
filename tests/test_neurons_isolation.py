"""IDNN: the planted unit is ranked first, and freezing it removes what it does."""

import json
from dataclasses import replace

import numpy as np
import pytest
from models import run
from test_neurons_nets import GUILTY, Guilty, ids

from atpatch_onnx.baking.edits import edited
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError, TargetMissedError
from atpatch_onnx.fitting.goal import Goal, Outcome
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.neurons import Isolated, IsolationOptions, NeuronTrial, Unit, edits_of, isolate
from atpatch_onnx.neurons.isolation import slots
from atpatch_onnx.neurons.measures import JudgedPart
from atpatch_onnx.neurons.subject import prepare_units
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.sessions import silent

QUICK = IsolationOptions(inputs=40, most=4)

NETS = [Guilty(), Guilty(kind="attribute"), Guilty(masked=True), Guilty(kind="attribute", one_logit=True)]


@pytest.mark.parametrize("net", NETS, ids=ids)
def test_the_guilty_unit_is_frozen_and_its_harm_is_gone(net):
    model = net.model()
    patch = isolate(model, net.debug(), QUICK)
    (edit,) = patch.edits
    (unit,) = patch.figures["units"]
    assert (edit.layer, edit.units.tolist()) == (net.layers()[GUILTY.layer].name, [GUILTY.unit])
    assert unit["rank"] == 1
    assert patch.sites == ()
    assert patch.base == fingerprint(model)
    inputs, labels, places = net.inputs(300, seed=5)  # never seen
    other = net.changed(inputs, places)
    healed = edited(model, patch.edits)
    before, clean, after = (
        predicted(run(graph, side)["logits"]) for graph, side in ((model, inputs), (healed, inputs), (healed, other))
    )
    assert np.mean(clean == labels) >= np.mean(before == labels) - 0.005
    assert np.mean(after == labels) > 0.95
    if net.kind == "attribute":
        assert np.mean(clean != after) == 0


def predicted(logits: np.ndarray) -> np.ndarray:
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(axis=1)


def test_a_unit_is_frozen_at_its_mean_over_clean_validation_inputs():
    net = Guilty()
    (edit,) = isolate(net.model(), net.debug(), QUICK).edits
    x = net.debug().split(seed=0).validation.clean["x"].astype(np.float64)
    w1, b1, w2 = net.weights(0)
    x = x + np.maximum(x @ w1 + b1, 0) @ w2
    w1, b1, _ = net.weights(1)
    mean = np.maximum(x @ w1 + b1, 0).mean(axis=(0, 1))[GUILTY.unit]
    assert edit.factor.tolist() == [0.0]
    assert edit.constant[0] == pytest.approx(mean, rel=1e-5)  # float32 activations


def test_figures_say_what_was_found():
    net = Guilty()
    debug = net.debug()
    figures = isolate(net.model(), debug, QUICK).figures
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["method"], figures["kind"], figures["target"]) == ("isolation", "backdoor", 2)
    assert figures["pairs"] == {"fit": 100, "calibration": 50, "validation": 50}
    assert figures["meets_target"]
    assert figures["shortfalls"] == []
    assert figures["of_target"] == (debug.split(seed=0).validation.labels == 2).sum() > 0
    assert figures["candidates"] == 20
    assert figures["base"]["remaining"] > 0.95
    assert figures["outcome"]["remaining"] == 0
    assert [one["units"] for one in figures["tried"]] == [1, 2, 3, 4]
    assert figures["tried"][0]["outcome"] == figures["outcome"]
    (unit,) = figures["units"]
    assert unit["lowers"] > 0.95
    assert unit["costs"] == 0
    assert unit["trace"] < 0.1
    assert unit["factor"] == 0


def test_figures_tell_that_no_input_is_of_the_target():
    """Then nothing shows whether the model still knows that class."""
    net = Guilty()
    debug = net.debug()
    figures = isolate(net.model(), debug.take(debug.labels != net.target), QUICK).figures
    assert figures["of_target"] == 0
    assert (
        isolate(Guilty(kind="attribute").model(), Guilty(kind="attribute").debug(), QUICK).figures["of_target"] is None
    )


def test_the_same_input_gives_the_same_bytes(tmp_path):
    net = Guilty()
    options = replace(QUICK, epsilon=0.5)
    first, second = (isolate(net.model(), net.debug(), options) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    first.save(tmp_path / "edits.safetensors")
    assert Patch.load(tmp_path / "edits.safetensors").id == first.id


def test_it_reads_a_model_from_its_path(tmp_path):
    net = Guilty()
    (tmp_path / "model.onnx").write_bytes(net.proto().SerializeToString())
    assert isolate(tmp_path / "model.onnx", net.debug(), QUICK).id == isolate(net.model(), net.debug(), QUICK).id


def test_screened_units_are_enough():
    """Two of twenty units are tried one by one."""
    net = Guilty()
    patch = isolate(net.model(), net.debug(), replace(QUICK, candidates=2))
    assert patch.figures["candidates"] == 2
    assert len(patch.figures["tried"]) == 2
    assert patch.edits[0].units.tolist() == [GUILTY.unit]


# Ranking


def isolated(lowers: float, costs: float = 0.0, trace: float = 0.5, unit: int = 0) -> Isolated:
    return Isolated(Unit(0, unit), 0.0, lowers, costs, trace, allowed=0.01)


def test_units_are_ranked_by_what_they_lower_and_cost_and_then_by_probabilities():
    wanted = [
        isolated(0.5, costs=0.01),  # one input, for nothing
        isolated(0.495),
        isolated(0.5, costs=0.05, trace=0.1),
        isolated(0.4),
        isolated(0.3, trace=0.1),
        isolated(0.1 + 0.2, trace=0.2),  # equal but for rounding
        isolated(0.3, trace=0.2, unit=1),
        isolated(0.0, trace=0.9),
        isolated(-0.1, trace=0.0),
    ]
    shuffled = [wanted[place] for place in (4, 1, 8, 0, 6, 2, 5, 3, 7)]
    assert sorted(shuffled, key=lambda one: one.order) == wanted


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_what_does_not_move_a_prediction_is_told_by_probabilities(kind):
    """So much harm that half of it would do as well."""
    net = Guilty(kind=kind)
    debug = net.debug(60)
    if kind == "backdoor":
        labels = np.where(np.arange(60) < 5, net.target, debug.labels)  # of which the base says something else
        debug = replace(debug, labels=labels).with_target(net.target)
    trial = NeuronTrial(net.model(), net.layers(), "logits")
    part = JudgedPart(trial, debug)
    sides = part.run(edits_of(net.layers(), [GUILTY], 0.9, 0.0))
    assert part.trace(sides) < part.trace(part.base)
    clean, other = (softmax(net.numpy(side["x"])) for side in (debug.clean, debug.counterfactual))
    counted = (debug.labels != net.target) & (clean.argmax(axis=1) != net.target)
    trace = other[counted, net.target].mean() if kind == "backdoor" else np.abs(other - clean).max(axis=1).mean()
    assert part.trace(part.base) == pytest.approx(trace, abs=1e-5)  # float32 logits
    own = clean[np.arange(60), debug.labels].mean()
    assert part.confidence(part.base) == pytest.approx(own, abs=1e-5)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def test_pairs_to_rank_on_are_drawn_from_the_fit_part():
    net = Guilty()
    subject = prepare_units(net.model(), net.debug(), QUICK, silent)
    fit = subject.parts.fit.clean["x"]
    drawn = subject.some(10).clean["x"]
    rows = [int(np.flatnonzero((fit == one).all(axis=(1, 2)))[0]) for one in drawn]
    assert rows == sorted(set(rows))
    assert rows != list(range(10))
    assert len(subject.some(1000)) == len(fit)


# How many


def test_as_few_as_do_as_well(monkeypatch):
    """Of K that are equally near to the goal the smallest."""
    net = Guilty()
    outcomes = []

    def pretended(part, sides):
        found = Outcome("backdoor", 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
        outcomes.append(replace(found, remaining=0.3 if sides is part.base else 0.0))
        return outcomes[-1]

    monkeypatch.setattr(JudgedPart, "outcome", pretended)
    patch = isolate(net.model(), net.debug(), QUICK)
    assert patch.figures["setting"]["units"] == 1


def test_as_many_as_do_best(monkeypatch):
    net = Guilty()
    left = {1: 0.5, 2: 0.2, 3: 0.1, 4: 0.1}

    def pretended(part, sides):
        return Outcome("backdoor", left.get(getattr(sides, "count", 1), 0.5), 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)

    class Counted:
        def __init__(self, sides, count):
            self.clean, self.counterfactual, self.count = sides.clean, sides.counterfactual, count

    ran = JudgedPart.run
    monkeypatch.setattr(JudgedPart, "outcome", pretended)
    monkeypatch.setattr(
        JudgedPart,
        "run",
        lambda part, edits=(): Counted(ran(part, edits), sum(edit.units.size for edit in edits) or 1),
    )
    patch = isolate(net.model(), net.debug(), replace(QUICK, force=True))
    assert patch.figures["setting"]["units"] == 3
    assert sum(edit.units.size for edit in patch.edits) == 3
    assert not patch.meets_target


def test_without_epsilon_the_first_ranks_are_taken():
    assert slots(3, 20, 0.0, np.random.default_rng(0)) == [0, 1, 2]


def test_epsilon_draws_from_the_next_ranks_only():
    drawn = [slots(5, 20, 0.1, np.random.default_rng(seed)) for seed in range(2000)]
    assert all(len(set(ranks)) == 5 and max(ranks) < 20 and ranks == sorted(ranks) for ranks in drawn)
    exchanged = np.array([sum(rank >= 5 for rank in ranks) for ranks in drawn])
    assert exchanged.mean() / 5 == pytest.approx(0.1, abs=0.01)  # three standard deviations
    assert {rank for ranks in drawn for rank in ranks} == set(range(20))
    assert slots(5, 20, 0.1, np.random.default_rng(3)) == slots(5, 20, 0.1, np.random.default_rng(3))


def test_where_there_are_no_next_ranks_none_is_drawn():
    assert slots(20, 20, 1.0, np.random.default_rng(0)) == list(range(20))
    assert slots(3, 4, 1.0, np.random.default_rng(0)) == [1, 2, 3]  # one to draw


def test_the_epsilon_variant_is_of_units_up_to_rank_20():
    net = Guilty(units=20)
    options = replace(QUICK, most=20, epsilon=0.3, force=True, goal=Goal(accuracy_loss=1, asr_above_floor=1))
    figures = isolate(net.model(), net.debug(), options).figures
    assert figures["setting"]["epsilon"] == 0.3
    assert all(unit["rank"] <= 20 for unit in figures["units"])


def test_several_epsilons_are_tried_and_the_first_that_does_as_well_is_kept():
    net = Guilty()
    figures = isolate(net.model(), net.debug(), replace(QUICK, most=2, epsilon=(0.0, 1.0))).figures
    assert [(one["units"], one["epsilon"]) for one in figures["tried"]] == [(1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)]
    assert figures["setting"] == {"units": 1, "epsilon": 0.0}
    assert figures["tried"][1]["outcome"]["remaining"] > 0.9  # the second rank instead of the first


# What goes wrong


def test_a_missed_goal_says_by_how_much():
    net = Guilty()
    out_of_reach = replace(QUICK, goal=Goal(accuracy_loss=-0.5))
    with pytest.raises(TargetMissedError, match=r"accuracy lost .*over the bound of -50\.00%") as raised:
        isolate(net.model(), net.debug(), out_of_reach)
    assert "--force" in raised.value.advice
    patch = isolate(net.model(), net.debug(), replace(out_of_reach, force=True))
    assert not patch.meets_target
    assert patch.figures["shortfalls"]
    assert patch.edits[0].units.tolist() == [GUILTY.unit]


def test_a_model_without_hidden_layers_is_refused():
    net = Guilty(blocks=0)
    with pytest.raises(NoSiteError, match="at least one hidden layer"):
        isolate(net.model(), net.debug())


def test_pairs_without_effect_are_refused():
    net = Guilty(kind="attribute", harm=0.0)
    with pytest.raises(DebugSetError, match="pairs whose prediction changes"):
        isolate(net.model(), net.debug())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"candidates": 0}, "option candidates: expected at least 1, or None; found 0"),
        ({"inputs": 0}, "option inputs"),
        ({"batch_size": 0}, "option batch_size"),
        ({"most": 0}, "option most"),
        ({"epsilon": ()}, "option epsilon"),
        ({"epsilon": 1.5}, "option epsilon: expected a number from 0 to 1, or some such numbers; found 1.5"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(FitError, match=text):
        IsolationOptions(**options)


def test_progress_is_told_of_every_stage():
    stages: dict[str, list[tuple[int, int]]] = {}
    net = Guilty()
    isolate(
        net.model(),
        net.debug(),
        QUICK,
        progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)),
    )
    assert {"measuring activations", "measuring mean activations", "isolating units"} < set(stages)
    assert stages["isolating units"] == [(number, 20) for number in range(1, 21)]
    assert stages["freezing units together"] == [(number, 4) for number in range(1, 5)]
    for told in stages.values():
        assert [done for done, _ in told] == sorted({done for done, _ in told})
