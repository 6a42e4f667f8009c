import io
from dataclasses import replace

import numpy as np
import reports as r
from models import Net, draw_patch
from rich.console import Console

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.matching import explain
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.matching.sites import Matches, NearMiss
from atpatch_onnx.measuring.compare import Fix, Ladder
from atpatch_onnx.measuring.evaluate_prompts import Written
from atpatch_onnx.patches.patch import LayerEdit, Patch
from atpatch_onnx.report.text import (
    edits_table,
    evaluation_table,
    fit_summary,
    fit_table,
    ladder_table,
    layers_table,
    near_misses_table,
    sites_table,
    verification_table,
    written_table,
)
from atpatch_onnx.running.metrics import Rate


def text(renderable, width=80):
    """What a terminal of this width shows, without colour; no line is longer."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    return shown


def words(renderable, width=80):
    return " ".join(text(renderable, width).split())


def test_sites():
    matches = explain(Net(tokens=5).model())
    shown = words(sites_table(matches))
    for site in matches.sites:
        assert site.name in shown
    assert "2 5 x 5 4 float no" in shown
    assert matches.sites[0].value.value not in shown
    assert matches.sites[0].value.value in words(sites_table(matches, why=True))


def test_no_sites():
    matches = Matches((), ())
    assert "No attention site was found." in words(sites_table(matches))
    assert "Nothing else looked like attention." in words(near_misses_table(matches))


def test_hidden_layers():
    layers = find_hidden_layers(Net(mlp=6).model())
    shown = words(layers_table(layers))
    assert all(f"{layer.name} 6 Relu" in shown for layer in layers)
    assert "None that neuron edits could be of." in words(layers_table(()))


UNITS = [
    {"layer": "layer0.hidden", "unit": 3, "factor": 0.0, "constant": 0.25, "rank": 1, "lowers": 0.5},
    {"layer": "layer1.hidden", "unit": 7, "factor": -1.5, "constant": 0.0, "rank": 2, "effect": 0.125},
]


def test_edited_units_and_what_each_was_ranked_by():
    shown = words(edits_table(Patch("base", (), {"kind": "backdoor", "units": UNITS[:1]})))
    assert "layer0.hidden 3 0.000 0.250 1 ASR above floor -50.00 points" in shown
    composed = Patch("base", (), {"composed": [{"units": UNITS[:1]}, {"sites": []}, {"units": UNITS[1:]}]})
    assert "layer1.hidden 7 -1.500 0.000 2 causal effect 0.125" in words(edits_table(composed), width=100)


def test_the_ladder_shows_every_fix_and_says_which_and_why():
    edit = LayerEdit("layer0.hidden", np.array([3, 5]), np.zeros(2, np.float32), np.zeros(2, np.float32))
    good = Fix("AtPatch", (Patch("base", (), {}, (edit,)),), 12.0, r.evaluation(), 1.234)
    bad = Fix("IDNN + AtPatch", (), 3.0, None, None, "the debug set: expected pairs that change")
    ladder = Ladder("backdoor", Goal(), 200, (good, bad))
    shown = words(ladder_table(ladder), width=100)
    assert "base 97.00% 98.00% ASR" in shown
    assert "AtPatch 97.00% 0.50% 0.5% 2 units 12 1.23" in shown
    assert "IDNN + AtPatch: the debug set: expected pairs that change" in shown
    assert f"Recommended: {ladder.reason}" in shown


def test_near_misses_say_why_and_unsupported_attention_comes_first():
    misses = (NearMiss(("softmax_9",), "class probabilities"), NearMiss((), "bfloat16 is not supported", True))
    shown = words(near_misses_table(Matches((), misses)))
    assert shown.index("bfloat16") < shown.index("class probabilities")
    assert "softmax_9" in shown


def test_a_fit_shows_what_each_site_contributes():
    shown = words(fit_table(r.patch()))
    assert "layer0 0.999 0.25 98.0% 99.5% 0.40% detect 99.5% redistr. 31.0%" in shown
    assert "layer1 0.999 -0.75 98.0% 99.5% 0.40% - -" in shown
    assert "ASR above floor when this element alone is switched off" in shown


def test_a_site_name_of_a_vision_model_fits_on_one_line():
    name = "vit.layers.1.attention"
    assert name in text(fit_table(r.patch(names=(name,))))
    matches = explain(Net().model())
    named = tuple(replace(site, name=name) for site in matches.sites)
    assert name in text(sites_table(replace(matches, sites=named)))


def test_a_fit_that_meets_its_goal():
    shown = words(fit_summary(r.patch()))
    assert "MISSED" not in shown
    assert "Pairs 500 fit, 250 calibration, 250 validation" in shown
    assert "Redistributes at layer0" in shown
    assert "ASR above floor 0.20% 1.00% met" in shown
    assert "1,234" in shown


def test_what_detectors_read_is_told():
    figures = r.figures()
    assert "Detectors read one product with each token's key" in words(fit_summary(r.patch()))
    del figures["detectors"]
    assert "Detectors read" not in words(fit_summary(r.patch().with_figures(figures)))
    missed = {"detectors": "linear", "shortfalls": ["ASR above floor 14.00%, 13.00% over the bound of 1.00%"]}
    figures |= {"detectors": "hidden", "tried": [missed, {"detectors": "hidden", "shortfalls": []}]}
    shown = words(fit_summary(r.patch().with_figures(figures)))
    assert "by a hidden layer; linear ones missed ASR above floor 14.00%, 13.00% over the bound of 1.00%" in shown


def test_a_goal_for_columns_is_told_where_there_is_one():
    figures = r.figures()
    figures["goal"]["columns_missed"] = 1.0
    assert "columns missed" not in words(fit_summary(r.patch().with_figures(figures)))
    figures["goal"]["columns_missed"], figures["outcome"]["recall"] = 0.005, 0.99
    assert "anomalous columns missed 1.00% 0.50% MISSED" in words(fit_summary(r.patch().with_figures(figures)))


def test_a_missed_goal_comes_first_in_words():
    shown = words(fit_summary(r.patch(met=False)))
    assert shown.startswith("GOAL MISSED")
    assert "13.00% over the bound of 1.00%" in shown
    assert "ASR above floor 14.00% 1.00% MISSED" in shown


def test_a_patch_without_figures():
    patch = Patch("base", (), {})
    assert "no figures of a fit" in words(fit_table(patch))
    assert "Base base" in words(fit_summary(patch))


def test_a_patched_file_tells_the_same_as_its_patch():
    model = Net(tokens=4).model()
    patch = draw_patch(model).with_figures(r.figures())
    record = read_record(bake(model, patch))
    assert text(fit_table(record)) == text(fit_table(patch))
    assert text(fit_summary(record)) == text(fit_summary(patch))


def test_before_and_after_with_intervals():
    shown = words(evaluation_table(r.evaluation()))
    assert "Attack success rate (ASR) 98.00% [95.0, 99.2] 0.50% [0.1, 2.8]" in shown
    assert "Columns 99.00% [96.4, 99.7] 99.50% [97.2, 99.9] 0.999" in shown
    assert shown.endswith("bit for bit: yes")
    assert words(evaluation_table(r.evaluation(identical=False))).endswith("bit for bit: NO")


def test_fairness_has_rates_and_differences():
    shown = words(evaluation_table(r.evaluation(kind="attribute")))
    assert "Flip rate (UF) 7.50% [4.6, 12.0] 0.00% [0.0, 1.9]" in shown
    assert "Demographic parity difference 18.00% [13.0, 23.0] 17.00% [12.0, 22.0]" in shown
    assert "0.00% [-0.7, 0.7]" in shown, "accuracy lost"


def test_a_rate_of_nothing_is_no_rate():
    evaluation = r.evaluation()
    object.__setattr__(evaluation, "accuracy_base", Rate.of(np.zeros(0, bool)))
    assert "Clean accuracy no inputs 97.00%" in words(evaluation_table(evaluation))


def test_checks():
    assert words(verification_table(r.verification())).endswith("All 6 checks passed.")
    shown = words(verification_table(r.verification("unbake")))
    assert shown.index("FAILED unbake") < shown.index("passed base")
    assert shown.endswith("1 of 6 checks FAILED: do not ship this file.")


def test_names_are_neither_markup_nor_escape_sequences():
    patch = r.patch(names=(r.HOSTILE,))
    failed = r.verification(f"site {r.HOSTILE}, clean inputs, no optimization")
    misses = Matches((), (NearMiss((r.HOSTILE,), r.HOSTILE),))
    for renderable in (fit_table(patch), fit_summary(patch), verification_table(failed), near_misses_table(misses)):
        shown = text(renderable, 200)
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "[red]" in shown


def test_what_a_language_model_writes():
    all_of, none_of = (Rate.of(np.full(200, value)) for value in (True, False))
    written = Written(
        prompts=200,
        steps=12,
        asr_base=all_of,
        asr_floor=none_of,
        asr_uncached=none_of,
        asr_cached=none_of,
        asr_chunked=none_of,
        asr_sampled=Rate.of(np.arange(1000) < 3),
        right_triggered=all_of,
        clean_exact=all_of,
        flags=none_of,
        perplexity_base=38.5,
        perplexity_patched=38.5,
    )
    shown = text(written_table(written))
    assert "Answers to 200 prompts, 12 tokens each" in shown
    assert shown.split("triggered prompts")[1].split()[:6] == ["100.00%", "[98.1,", "100.0]", "0.00%", "[0.0,", "1.9]"]
    assert "the same, sampled" in shown
    assert "0.30% [0.1, 0.9]" in shown
    assert "Perplexity: 38.500 before, 38.500 after." in shown
    assert written.to_json()["asr_sampled"]["count"] == 1000
