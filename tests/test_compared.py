"""AtPatch beside neuron edits: the sample's pairs and effort, and what the page makes of its figures."""

import json
from types import SimpleNamespace

import pytest
from planted import QUICK, Planted

from samples import compared as sample
from samples.case import Case
from samples.compared_page import HEADER, compared_section

GUILTY = Planted(mlp=4, guilty=True)


def case(tmp_path, **options) -> Case:
    (tmp_path / "base.onnx").write_bytes(GUILTY.proto().SerializeToString())
    debug, unseen = GUILTY.debug(), GUILTY.debug(120, seed=9)
    return Case("minilm/token", 0, tmp_path / "base.onnx", debug, unseen, QUICK, **options)


def test_every_fix_of_a_case_from_its_files_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "UNSEEN", 100)
    found = json.loads(json.dumps(sample.compared(case(tmp_path), tmp_path, True)))
    assert (found["case"], found["seed"], found["pairs"]) == ("minilm/token", 0, 100)
    assert [fix["name"] for fix in found["fixes"]] == ["IDNN", "CARE", "AtPatch", "IDNN + AtPatch", "CARE + AtPatch"]
    title, *rows = compared_section([[found]])[1:]
    assert title == "## minilm/token, seed 0"
    assert "| base, ASR |" in rows[0]
    assert "could not be made" in rows[0], "nothing is left to patch behind an edit that repaired all"
    assert f"Recommended, a seed each: {found['recommended']}." in rows[1]


def test_neuron_edits_see_the_targets_class_where_the_fit_does_not(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        sample.atp, "compare", lambda base, seen, *rest, **more: given.append(seen) or SimpleNamespace(to_json=dict)
    )
    whole = GUILTY.debug(60, seed=4)
    sample.compared(case(tmp_path, whole=whole), tmp_path, False)
    assert given[0].clean["x"].tobytes() == whole.clean["x"].tobytes()


def rate(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value, "count": 100}


def fix(name: str, left: float, accuracy: float, *, attribute: bool = False, shortfalls=()) -> dict[str, object]:
    fairness = {"uf_base": rate(0.2), "uf_patched": rate(left)} | {
        f"{metric}_difference_{side}": 0.1
        for metric in ("demographic_parity", "equalized_odds")
        for side in ("base", "patched")
    }
    return {
        "name": name,
        "seconds": 12.0,
        "time": 1.25,
        "shortfalls": list(shortfalls),
        "evaluation": {
            "accuracy_base": rate(0.9),
            "accuracy_patched": rate(accuracy),
            "clean_changed": rate(1.0),
            "backdoor": None if attribute else {"asr_base": rate(0.99), "asr_above_floor": rate(left)},
            "fairness": fairness if attribute else None,
        },
    }


@pytest.mark.parametrize("attribute", [False, True])
def test_the_page_says_whether_redistribution_repairs_better_and_keeps_more(attribute):
    def run(seed: int, ours: float) -> dict[str, object]:
        fixes = [
            fix("IDNN", 0.3, 0.85, attribute=attribute, shortfalls=["left"]),
            fix("CARE", 0.0, 0.9, attribute=attribute),
            fix("AtPatch", ours, 0.89, attribute=attribute),
        ]
        return {"case": "some/case", "seed": seed, "fixes": fixes, "recommended": "CARE"}

    _, title, rows, verdict = compared_section([[run(0, 0.01), run(1, 0.03)]])
    assert title == "## some/case, seeds 0, 1"
    lines = [line.split(" | ") for line in rows.splitlines()]
    assert len(lines) == 2 + 1 + 3
    assert {len(line) for line in lines} == {len(HEADER)}
    ours = lines[-1]
    assert ours[2] == "+1.00 [+1.00, +1.00]"
    assert ours[3].startswith("2.00% [1.00%, 3.00%]")
    assert ours[5] == ("10.0% [10.0%, 10.0%]" if attribute else "-")
    assert ours[7:] == ["2 of 2", "12", "1.25 |"]
    assert lines[3][7] == "0 of 2"
    assert verdict == (
        "AtPatch alone leaves less than IDNN (2.00%, 30.00%) and loses less accuracy (+1.00, +5.00 points); "
        "leaves more than CARE (2.00%, 0.00%) and loses more accuracy (+1.00, +0.00 points). "
        "Recommended, a seed each: CARE, CARE."
    )


def test_small_differences_are_none():
    fixes = [fix("CARE", 0.001, 0.9), fix("AtPatch", 0.0, 0.9)]
    *_, verdict = compared_section([[{"case": "some/case", "seed": 0, "fixes": fixes, "recommended": "AtPatch"}]])
    assert "leaves about as much as CARE (0.00%, 0.10%) and loses about as much accuracy" in verdict


def test_nothing_measured_is_said():
    assert compared_section([])[-1] == "Not measured."
