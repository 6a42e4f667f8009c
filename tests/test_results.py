"""From the figures of single runs to the page: means, ranges, pooled intervals, goals that can be missed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atpatch_onnx.running.metrics import wilson
from samples import results_page
from samples import tasks as tasks_module
from samples import work as work_module
from samples.bounds import FIGURES, Bound, shortfalls
from samples.pieces import SEEDS, Piece, run_pieces, take_over
from samples.pieces import TASKS as CHAINS
from samples.results import chain, main
from samples.summary import GOALS, Spread, spread, verdicts
from samples.tasks import TASKS


def rate(hits: int, count: int) -> dict[str, Any]:
    low, high = wilson(hits, count)
    return {"value": hits / count, "low": low, "high": high, "count": count}


def backdoor(case: str, seed: int, left: int, *, patched: int = 90, work: str = "measured") -> dict[str, Any]:
    """A run of 100 inputs of which `left` still go to the target and `patched` are right after the fix."""
    curve = {"precision": [0.5, 1.0], "recall": [1.0, 0.0], "average_precision": 0.9}
    detection = {"precision": rate(99, 100), "recall": rate(100, 100), "curve": curve}
    return {
        "case": case,
        "seed": seed,
        "training": {"accuracy_twin": 0.91, "robust_accuracy_twin": 0.905},
        "evaluation": {
            "accuracy_base": rate(90, 100),
            "accuracy_patched": rate(patched, 100),
            "accuracy_lost": {"value": (90 - patched) / 100, "low": -patched / 1000, "high": 0.05},
            "clean_flag_rate": rate(1, 100),
            "clean_changed": rate(1, 100),
            "columns": detection,
            "input_level": detection,
            "backdoor": {
                "asr_base": rate(99, 100),
                "asr_patched": rate(left + 2, 100),
                "asr_floor": rate(2, 100),
                "asr_above_floor": rate(left, 100),
                "robust_accuracy_patched": rate(89, 100),
                "robust_accuracy_lost": {"value": 0.01, "low": 0.0, "high": 0.02},
            },
            "fairness": None,
        },
        "fit": {
            "outcome": {"remaining": 0.0},
            "sites": [{"site": "layer0", "without": {"detect": {"remaining": 1.0}}}],
        },
        "seconds": {"fit": 10.0},
        "core_seconds": 60.0,
    }


def test_a_spread_is_mean_range_and_the_interval_at_one_seeds_inputs():
    runs = [backdoor("vit/badnets-fixed", seed, left) for seed, left in enumerate((0, 1, 5))]
    found = spread(runs, FIGURES["ASR above floor"])
    assert found is not None
    assert (found.mean, found.smallest, found.largest, found.seeds) == (pytest.approx(0.02), 0.0, 0.05, 3)
    assert (found.low, found.high) == wilson(2, 100)  # seeds may share inputs: no more than those of one count
    assert spread(runs, FIGURES["UF"]) is None
    lost = spread([backdoor("x/y", 0, 0, patched=89), backdoor("x/y", 1, 0, patched=91)], FIGURES["accuracy lost"])
    assert lost is not None
    assert (lost.mean, lost.smallest, lost.largest) == tuple(map(pytest.approx, (0, -0.01, 0.01)))
    assert (lost.low, lost.high) == tuple(map(pytest.approx, (-0.09, 0.05))), "the means of the seeds' own"
    assert spread(runs, FIGURES["core seconds"]) == Spread(60.0, 60.0, 60.0, None, None, 3)


def even(value: float) -> Spread:
    return Spread(value, value, value, None, None, 1)


def test_a_goal_that_is_missed_or_not_measured_is_not_met():
    figures = {"ASR above floor": even(0.002), "accuracy lost": even(0.0006), "recall": even(0.999)}
    judged = verdicts({("measured", "vit/badnets-fixed"): figures})
    found = {verdict.bound.figure: verdict for verdict in judged if verdict.goal == GOALS[0].name}
    assert found["ASR above floor"].met
    assert not found["accuracy lost"].met
    assert found["recall"].met
    assert found["precision"].value is None
    assert not found["precision"].met


def test_the_tables_lose_accuracy_on_average_and_flip_nowhere():
    cases = next(goal.cases for goal in GOALS if goal.name.startswith("tables"))
    figures = {
        ("measured", case): {"UF, patched": even(0.0), "accuracy lost": even(0.004 if case == "adult/age" else 0.0)}
        for case in cases
    }
    found = [verdict for verdict in verdicts(figures) if verdict.goal.startswith("tables")]
    assert [(v.bound.figure, v.case) for v in found][-1] == ("accuracy lost", "average")
    assert found[-1].value == pytest.approx(0.0005)
    assert all(verdict.met for verdict in found)
    figures["measured", "german/sex"]["UF, patched"] = even(0.001)
    assert [v.case for v in verdicts(figures) if v.goal.startswith("tables") and not v.met] == ["german/sex"]


def test_bounds_hold_at_their_limit():
    assert Bound("recall", 0.5, at_least=True).met(0.5)
    assert Bound("UF", 0.5).met(0.5)
    assert not Bound("UF", 0.5).met(0.501)


def test_shortfalls_name_what_was_found():
    run = backdoor("vit/badnets-fixed", 0, 3)
    kept = (Bound("ASR above floor", 0.03), Bound("recall", 0.99, at_least=True))
    assert shortfalls(run, kept) == []
    missed = (Bound("ASR above floor", 0.02), Bound("precision", 0.995, at_least=True), Bound("UF", 0.1))
    assert shortfalls(run, missed) == [
        "MISSED: ASR above floor at most 2.00%, found 3.00%",
        "MISSED: precision at least 99.50%, found 99.00%",
        "MISSED: UF at most 10.00%, found nothing",
    ]


def written(folder: Path, runs: list[tuple[Piece, dict[str, Any]]]) -> str:
    for piece, figures in runs:
        piece.file(folder).parent.mkdir(parents=True, exist_ok=True)
        piece.file(folder).write_text(json.dumps(figures))
    results_page.write_page(folder, folder / "docs", [piece for piece, _ in runs])
    return (folder / "docs" / "results.md").read_text()


def test_the_hours_are_those_of_all_pieces_and_of_every_training(tmp_path):
    case = "vit/badnets-fixed"
    for name in ("vit-badnets-fixed-0", "vit-clean-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base.json").write_text('{"seconds": 1800.0}')
    known = {"case": case, "seed": 0, "training": {}, "core_seconds": 1700.0}
    page = written(tmp_path, [(Piece(case, 0, "trained"), known), (Piece(case, 0, "measured"), backdoor(case, 0, 0))])
    assert json.loads((tmp_path / "docs" / "results.json").read_text())["core_hours"] == round(1 + 60 / 3600, 2)
    assert "1.0 hours of one core in all" in page


def test_the_page_says_what_was_found(tmp_path):
    rows = [
        {
            "variant": variant,
            "count": 200,
            "remaining": left,
            "accuracy_base": 0.9,
            "accuracy": 0.89,
            "robust_accuracy_loss": 0.02,
            "clean_flag_rate": 0.01,
            "recall": 1.0,
            "precision": 0.5,
        }
        for variant, left in (("as it is", 0.0), ("without carry", 0.7), ("threshold at 1.00% of clean inputs", 0.1))
    ]
    case = "vit/badnets-fixed"
    page = written(
        tmp_path,
        [
            (Piece(case, 0, "measured"), backdoor(case, 0, 0)),
            (Piece(case, 1, "measured"), backdoor(case, 1, 3)),
            (Piece(case, 0, "ablated"), {"case": case, "seed": 0, "rows": rows, "core_seconds": 5.0}),
        ],
    )
    assert "| vit/badnets-fixed | 1.50% [0.00%, 3.00%] (0.55%, 7.00%) | +0.00 [+0.00, +0.00] (-9.00, +5.00) |" in page
    assert "| BadNets fixed, ViT | vit/badnets-fixed | ASR above floor | <= 0.200% | 1.500% | **no** |" in page
    assert "| without carry | 70.00% (63.32%, 75.93%) | +1.00 | +2.00 |" in page
    assert "| robust accuracy beside the twin's | vit/badnets-fixed |" in page
    assert "<= 1.000 points | +1.500 points | **no** |" in page
    assert "not measured" in page
    for picture in ("precision_recall", "thresholds", "contributions"):
        assert (tmp_path / "docs" / "results" / f"{picture}.png").stat().st_size > 5_000
        assert f"(results/{picture}.png)" in page
    document = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert len(document["runs"]["measured vit/badnets-fixed"]) == 2
    assert document["seeds"] == [0, 1]
    assert "curve" not in json.dumps(document)
    assert {goal["met"] for goal in document["goals"]} == {True, False}


def test_ablations_are_of_the_first_seed_and_every_case_is_measured_with_each():
    for task in CHAINS:
        for seed in SEEDS:
            pieces = list(chain(task, seed))
            assert [piece.case for piece in pieces if piece.work == "measured"] == list(TASKS[task].CASES)
            assert any(piece.work == "ablated" for piece in pieces) == (seed == SEEDS[0])


def test_what_was_found_of_an_unknown_trigger_is_shown(tmp_path):
    case = "minilm/token"
    search = {"target": 1, "tokens": ["cf"], "success": [0.45, 1.0]}
    run = {**backdoor(case, 2, 1), "training": {"accuracy_twin": 0.9, "inversion": search}}
    page = written(tmp_path, [(Piece(case, 2, "inverted"), run)])
    assert "| minilm/token | 2 | 1 | yes | 45%, 100% | cf |" in page
    assert "| minilm/token, trigger inverted | 1 | 90.00%" in page


class StubTask:
    """A task whose pieces cost nothing; its base may stand in another folder than the case's, as of tables."""

    CASES = ("vit/badnets-fixed",)

    @staticmethod
    def prepare(case, *, seed, fast, folder, tune, progress):
        return SimpleNamespace(name=case, seed=seed, training={"seconds": 1.0})


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(tmp_path, monkeypatch):
    done: list[str] = []

    def work(name: str) -> work_module.Work:
        def piece(case, folder, fast):
            assert fast
            done.append(name)
            return backdoor(case.name, case.seed, 0) | {"rows": [], "training": {"inversion": SEARCH}}

        return piece

    for table in (tasks_module.TASKS, tasks_module.CASES):
        monkeypatch.setitem(table, "fashion" if table is tasks_module.TASKS else "vit/badnets-fixed", StubTask)
    monkeypatch.setattr(work_module, "WORK", {name: work(name) for name in work_module.WORK})
    pieces = list(chain("fashion", 0))
    run_pieces(pieces, tmp_path, True)
    assert done == ["trained", "measured", "inverted", "ablated"]
    Piece("vit/badnets-fixed", 0, "inverted").file(tmp_path).unlink()
    run_pieces(pieces, tmp_path, True)
    assert done == ["trained", "measured", "inverted", "ablated", "inverted"]
    assert main(["--render", "--task", "fashion", "--seed", "0", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    assert "vit/badnets-fixed" in (tmp_path / "results.md").read_text()


SEARCH = {"target": 0, "stands_out": False, "success": [0.5]}


def test_pieces_that_are_not_there_are_left_out(tmp_path):
    case = "deit/badnets-random"
    piece = Piece(case, 0, "measured")
    piece.file(tmp_path).parent.mkdir(parents=True)
    piece.file(tmp_path).write_text(json.dumps(backdoor(case, 0, 0)))
    results_page.write_page(tmp_path, tmp_path / "docs", [piece, Piece(case, 1, "measured")])
    assert "with the seed 0;" in (tmp_path / "docs" / "results.md").read_text()


def test_pieces_from_before_are_taken_over(tmp_path):
    done, other = Piece("vit/badnets-fixed", 1, "measured"), Piece("vit/trojan", 1, "measured")
    before, out = tmp_path / "before", tmp_path / "out"
    for folder, piece, text in ((before, done, "1"), (before, other, "2"), (out, other, "3")):
        piece.file(folder).parent.mkdir(parents=True, exist_ok=True)
        piece.file(folder).write_text(text)
    take_over([done, other, Piece("vit/blended", 1, "measured")], before, out)
    assert done.file(out).read_text() == "1"
    assert other.file(out).read_text() == "3", "what is there stays"
    assert not Piece("vit/blended", 1, "measured").file(out).is_file()


def test_the_page_is_rendered_from_its_figures():
    docs = Path(__file__).parents[1] / "docs" / "evidence"
    document = json.loads((docs / "results.json").read_text())
    assert (docs / "results.md").read_text() == results_page.render(document), "run python -m samples.results --render"
