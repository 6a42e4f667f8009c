"""CARE: causal effects equal their closed form, the planted unit is ranked first, and scaling removes what it does."""

import json
from dataclasses import replace

import numpy as np
import pytest
from models import run
from test_neurons_nets import GUILTY, Guilty, ids

from atpatch_onnx.baking.edits import edited
from atpatch_onnx.errors import FitError, MissingExtraError, NoSiteError, TargetMissedError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.neurons import NeuronTrial, RepairOptions, Unit, causal_effects, causality, measure_activations
from atpatch_onnx.neurons.causality import ALPHA, BOUNDS, UNITS, VALUES, repair
from atpatch_onnx.neurons.swarm import minimise
from atpatch_onnx.patches.patch import Patch

QUICK = RepairOptions(
    inputs=40, search_inputs=80, particles=10, iterations=15, goal=Goal(0.03, flip_rate=0.03, accuracy_loss=0.03)
)
"""One in fifty may go wrong: the searched factors fit 80 pairs."""

NETS = [
    Guilty(),
    Guilty(kind="attribute"),
    Guilty(masked=True),
    Guilty(kind="attribute", one_logit=True),
]


def predicted(logits: np.ndarray) -> np.ndarray:
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(axis=1)


# Causal effects


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


UNDER_TEST = [Unit(1, 2), GUILTY, Unit(1, 0)]
RANGES = [(-1.0, 2.0), (0.0, 3.0), (0.5, 0.5)]
"""Of the last block, whose units the logits are linear in: `z + v s`, the units' mean over tokens being v."""


def linear(net: Guilty, x: np.ndarray, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """The logits z with the unit at 0, and by how much they grow with it."""
    return net.numpy(x, {unit: 0.0}), net.weights(unit.layer)[2][unit.unit].astype(np.float64) @ net.readout


def test_the_effect_on_a_backdoor_is_its_closed_form():
    """The target's probability rises, or falls, with v: softmax at one end less softmax at the other."""
    net = Guilty()
    debug = net.debug(30).with_target(net.target)
    effects = causal_effects(NeuronTrial(net.model(), net.layers(), "logits"), debug, UNDER_TEST, RANGES)
    for effect, unit, (low, high) in zip(effects, UNDER_TEST, RANGES, strict=True):
        z, s = linear(net, debug.clean["x"], unit)
        ends = [softmax(z + v * s)[:, net.target].mean() for v in (low, high)]
        assert effect == pytest.approx(abs(ends[1] - ends[0]), abs=1e-5)  # float32 logits
    assert effects[1] > 0.6  # two of three inputs are of another class
    assert effects[2] == 0


@pytest.mark.parametrize("one_logit", [True, False])
def test_the_effect_on_an_attribute_is_its_closed_form(one_logit):
    """Of two classes: differences of sigmoids of the difference of the logits."""
    net = Guilty(kind="attribute", one_logit=one_logit, harm=2.0)
    debug = net.debug(30)
    trial = NeuronTrial(net.model(), net.layers(), "logits")
    effects = causal_effects(trial, debug, UNDER_TEST, RANGES)

    def difference(logits):
        return logits[:, 0] if one_logit else logits[:, 1] - logits[:, 0]

    alone = [difference(net.numpy(side["x"])) for side in (debug.clean, debug.counterfactual)]
    for effect, unit, (low, high) in zip(effects, UNDER_TEST, RANGES, strict=True):
        figures = [np.abs(sigmoid(alone[1]) - sigmoid(alone[0])).mean()]
        for v in np.linspace(low, high, 16):
            sides = []
            for side in (debug.clean, debug.counterfactual):
                z, s = linear(net, side["x"], unit)
                sides.append(sigmoid(difference(z + v * s)))
            figures.append(np.abs(sides[1] - sides[0]).mean())
        assert effect == pytest.approx(max(figures) - min(figures), abs=1e-5)  # float32 logits
    # what alone carries the attribute, set to anything, makes both sides equal; left alone, it does not
    assert effects[1] == pytest.approx(np.abs(sigmoid(alone[1]) - sigmoid(alone[0])).mean(), abs=1e-5)
    assert effects.argmax() == 1


@pytest.mark.parametrize("net", NETS, ids=ids)
def test_the_guilty_unit_has_the_largest_effect(net):
    model, layers = net.model(), net.layers()
    debug = net.debug(60)
    if net.kind == "backdoor":
        debug = debug.with_target(net.target)
    measured = measure_activations(model, layers, debug)
    units = [Unit(layer, unit) for layer in range(2) for unit in range(net.units)]
    ranges = [
        (float(measured[u.layer].low_of_both[u.unit]), float(measured[u.layer].high_of_both[u.unit])) for u in units
    ]
    effects = causal_effects(NeuronTrial(model, layers, "logits"), debug, units, ranges)
    first, second = np.argsort(-effects)[:2]
    assert units[first] == GUILTY
    assert effects[first] > 3 * effects[second]


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_so_many_values_are_tried(kind, monkeypatch):
    net = Guilty(kind=kind)
    debug = net.debug(10) if kind == "attribute" else net.debug(10).with_target(net.target)
    trial, runs = NeuronTrial(net.model(), net.layers(), "logits"), []
    ran = NeuronTrial.run
    monkeypatch.setattr(NeuronTrial, "run", lambda *args, **more: (runs.append(args[2]), ran(*args, **more))[1])
    causal_effects(trial, debug, [GUILTY], [(0.0, 3.0)])
    sides = 2 if kind == "attribute" else 1
    assert len(runs) == 2 + sides * VALUES[kind]  # and the base
    runs.clear()
    causal_effects(trial, debug, [GUILTY], [(0.0, 0.0)])
    assert len(runs) == 2 + sides  # the range is one value


# Repair


@pytest.mark.parametrize("net", NETS, ids=ids)
@pytest.mark.parametrize("optimizer", ["swarm", "evolution"])
def test_the_guilty_unit_is_scaled_and_its_harm_is_gone(net, optimizer):
    model = net.model()
    patch = repair(model, net.debug(), replace(QUICK, optimizer=optimizer))
    units = patch.figures["units"]
    layer = net.layers()[GUILTY.layer].name
    assert (units[0]["layer"], units[0]["unit"], units[0]["rank"]) == (layer, GUILTY.unit, 1)
    assert len(units) == UNITS[net.kind]
    assert patch.base == fingerprint(model)
    assert patch.sites == ()
    low, high = BOUNDS[net.kind]
    for edit in patch.edits:
        assert (edit.constant == 0).all()
        assert ((edit.factor >= low) & (edit.factor <= high)).all()
    inputs, labels, places = net.inputs(300, seed=5)  # never seen
    other = net.changed(inputs, places)
    healed = edited(model, patch.edits)
    before, clean, after = (
        predicted(run(graph, side)["logits"]) for graph, side in ((model, inputs), (healed, inputs), (healed, other))
    )
    assert np.mean(clean == labels) >= np.mean(before == labels) - 0.02
    if net.kind == "backdoor":
        assert np.mean(after[labels != net.target] == net.target) <= 0.02
    else:
        assert np.mean(clean != after) <= 0.02


def test_a_unit_that_is_silent_on_clean_inputs_is_found():
    """Its range is that of both sides."""
    net = Guilty(leak=0.0)
    first = repair(net.model(), net.debug(), QUICK).figures["units"][0]
    assert (first["layer"], first["unit"]) == (net.layers()[GUILTY.layer].name, GUILTY.unit)
    assert first["effect"] > 0.5


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_the_cost_is_of_rates_and_then_of_probabilities(kind, monkeypatch):
    """By this test's own arithmetic, from numpy's logits; the search starts at the network as it is."""
    net, asked = Guilty(kind=kind, blocks=2), []

    def remember(cost, low, high, dimensions, **settings):
        asked.append((cost(np.ones(1)), settings["start"]))
        return minimise(cost, low, high, dimensions, **settings)

    monkeypatch.setattr(causality, "minimise", remember)
    repair(net.model(), net.debug(), replace(QUICK, units=1, alpha=0.25, search_inputs=1000))
    part = net.debug().split(seed=0).fit
    clean, other = (softmax(net.numpy(side["x"])) for side in (part.clean, part.counterfactual))
    before, after = clean.argmax(axis=1), other.argmax(axis=1)
    if kind == "backdoor":
        counted = (part.labels != net.target) & (before != net.target)
        left, trace = np.mean(after[counted] == net.target), other[counted, net.target].mean()
    else:
        left, trace = np.mean(before != after), np.abs(other - clean).max(axis=1).mean()
    wrong, unsure = np.mean(before != part.labels), 1 - clean[np.arange(len(clean)), part.labels].mean()
    cost = 0.75 * left + 0.25 * wrong + 1e-4 * (0.75 * trace + 0.25 * unsure)
    assert asked == [(pytest.approx(cost, abs=1e-8), 1.0)]  # float32 logits, weighed by 1e-4


def test_figures_say_what_was_found():
    net = Guilty()
    figures = repair(net.model(), net.debug(), QUICK).figures
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["method"], figures["kind"], figures["target"]) == ("repair", "backdoor", 2)
    assert figures["pairs"] == {"fit": 100, "calibration": 50, "validation": 50}
    assert figures["meets_target"]
    (tried,) = figures["tried"]
    assert tried["outcome"] == figures["outcome"]
    assert {name: tried[name] for name in ("units", "alpha", "optimizer")} == {
        "units": 5,
        "alpha": 0.1,
        "optimizer": "swarm",
    }
    assert tried["cost"] < 0.05
    assert 1 <= tried["iterations"] <= 15
    effects = [unit["effect"] for unit in figures["units"]]
    assert effects == sorted(effects, reverse=True)
    assert [unit["rank"] for unit in figures["units"]] == [1, 2, 3, 4, 5]


def test_factors_of_the_file_are_those_of_the_figures():
    net = Guilty()
    patch = repair(net.model(), net.debug(), QUICK)
    stated = {(unit["layer"], unit["unit"]): unit["factor"] for unit in patch.figures["units"]}
    written = {
        (edit.layer, int(unit)): float(factor)
        for edit in patch.edits
        for unit, factor in zip(edit.units, edit.factor, strict=True)
    }
    assert stated == written


@pytest.mark.parametrize("optimizer", ["swarm", "evolution"])
def test_the_same_input_gives_the_same_bytes(tmp_path, optimizer):
    net = Guilty(kind="attribute")
    options = replace(QUICK, optimizer=optimizer)
    first, second = (repair(net.model(), net.debug(), options) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    first.save(tmp_path / "edits.safetensors")
    assert Patch.load(tmp_path / "edits.safetensors").id == first.id


def test_several_settings_are_tried_and_the_nearest_is_kept():
    net = Guilty(kind="attribute")
    figures = repair(net.model(), net.debug(), replace(QUICK, units=(1, 2), alpha=(1.0, 0.3))).figures
    assert [(one["units"], one["alpha"]) for one in figures["tried"]] == [(1, 1.0), (1, 0.3), (2, 1.0), (2, 0.3)]

    def nearness(one):
        outcome = one["outcome"]
        over = max(outcome["remaining"] - 0.03, 0)
        return over + max(outcome["accuracy_base"] - outcome["accuracy"] - 0.03, 0), outcome["remaining"]

    best = min(figures["tried"], key=nearness)
    assert figures["setting"] == {name: value for name, value in best.items() if name != "outcome"}
    assert figures["outcome"] == best["outcome"]
    assert len(figures["units"]) == best["units"]


def test_defaults_are_the_papers():
    assert VALUES == {"attribute": 16, "backdoor": 4}
    assert UNITS == {"attribute": 3, "backdoor": 5}
    assert ALPHA == {"attribute": 0.3, "backdoor": 0.1}
    assert BOUNDS == {"attribute": (0, 2), "backdoor": (-10, 10)}  # 1 + w, and w
    assert (RepairOptions().particles, RepairOptions().iterations) == (20, 100)


def test_it_is_never_worse_than_the_base_on_the_pairs_it_searches_on():
    """One particle starts there."""
    net = Guilty()
    options = replace(QUICK, particles=5, iterations=1, alpha=1.0, force=True)
    figures = repair(net.model(), net.debug(), options).figures
    assert figures["setting"]["cost"] <= 1 - figures["base"]["accuracy"] + 0.05


# What goes wrong


def test_a_missed_goal_says_by_how_much():
    net = Guilty()
    out_of_reach = replace(QUICK, goal=Goal(accuracy_loss=-0.5))
    with pytest.raises(TargetMissedError, match=r"accuracy lost .*over the bound of -50\.00%") as raised:
        repair(net.model(), net.debug(), out_of_reach)
    assert "--force" in raised.value.advice
    patch = repair(net.model(), net.debug(), replace(out_of_reach, force=True))
    assert not patch.meets_target
    assert patch.figures["shortfalls"]


def test_a_model_without_hidden_layers_is_refused():
    net = Guilty(blocks=0)
    with pytest.raises(NoSiteError, match="at least one hidden layer"):
        repair(net.model(), net.debug())


def test_without_scipy_evolution_is_refused_before_anything_runs(monkeypatch):
    import atpatch_onnx.neurons.subject as subject_module
    from atpatch_onnx import errors

    monkeypatch.setattr(errors, "find_spec", lambda package: None)
    monkeypatch.setattr(subject_module, "find_hidden_layers", lambda model: pytest.fail("too late"))
    with pytest.raises(MissingExtraError, match="the package scipy"):
        repair(Guilty().model(), Guilty().debug(), replace(QUICK, optimizer="evolution"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"units": 0}, "option units"),
        ({"units": ()}, "option units: expected at least 1, or some such numbers"),
        ({"alpha": 1.5}, "option alpha"),
        ({"alpha": (0.1, -0.1)}, "option alpha"),
        ({"search_inputs": 0}, "option search_inputs"),
        ({"optimizer": "gradient"}, "option optimizer: expected 'swarm' or 'evolution'; found 'gradient'"),
        ({"particles": 4}, "option particles"),
        ({"iterations": 0}, "option iterations"),
        ({"inputs": 0}, "option inputs"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(FitError, match=text):
        RepairOptions(**options)


def test_progress_is_told_of_every_stage():
    stages: dict[str, list[tuple[int, int]]] = {}
    net = Guilty(kind="attribute")
    repair(
        net.model(),
        net.debug(),
        replace(QUICK, units=(1, 2)),
        progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)),
    )
    assert stages["intervening on units"] == [(number, 20) for number in range(1, 21)]
    assert {"scaling 1 units, alpha 0.3", "scaling 2 units, alpha 0.3"} < set(stages)
    for told in stages.values():
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert all(done <= total for done, total in told)
