"""The page on scale: it is what its figures say, its arithmetic holds, and its command runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from samples import scale
from samples.scale_simulation import AHEAD, NETWORK, WORKERS, arithmetic, simulate

DOCS = Path(__file__).parents[1] / "docs" / "evidence"


def pieces(map_seconds: float, fold_seconds: float, size: int = 0) -> dict:
    one = {"map_seconds": [map_seconds], "fold_seconds": [fold_seconds], "bytes": [size], "inputs_a_piece": 256}
    return {name: value * 10 if isinstance(value, list) else value for name, value in one.items()}


@pytest.mark.parametrize("workers", WORKERS)
def test_equal_pieces_are_simulated_as_on_paper(workers):
    of_one = pieces(1.0, 0.02, size=int(0.01 * NETWORK))
    found = arithmetic(of_one, 0.02)
    assert found.most_workers == pytest.approx(20)
    rate, efficiency = simulate(of_one, 0.02, workers)
    # a worker's first piece has no other behind it, and the last ones end one after the other
    assert rate == pytest.approx(found.rate(workers), rel=0.05)
    assert efficiency == pytest.approx(min(1, 20 / workers), rel=0.05)


def test_a_slow_piece_holds_up_no_more_than_is_let_ahead():
    one = pieces(0.01, 0.0)
    one["map_seconds"] = [0.01] * 9 + [1.0]
    rate, _ = simulate(one, 0.0, 4)
    mean = np.mean(one["map_seconds"])
    assert 0.3 * 256 * 4 / mean < rate <= 256 * 4 / mean
    assert AHEAD > 1


@pytest.fixture(scope="module")
def figures() -> dict:
    if not (DOCS / "scale.json").is_file():
        pytest.skip("not measured yet: python -m samples.scale")
    return json.loads((DOCS / "scale.json").read_text())


def test_the_page_is_rendered_from_its_figures(figures):
    assert (DOCS / "scale.md").read_text() == scale.page(figures)


@pytest.mark.nightly
@pytest.mark.xdist_group("ray")
def test_the_command_runs_and_what_is_collected_is_the_same(tmp_path):
    pytest.importorskip("ray", reason="extra scale")
    assert scale.main(["--fast", "--docs", str(tmp_path), "--inputs", "600"]) == 0
    found = json.loads((tmp_path / "scale.json").read_text())
    assert set(found["models"]) == {"minilm", "vit"}
    for one in found["models"].values():
        assert one["same"] is True
        assert all(rate > 0 for rates in one["rates"].values() for rate in rates)
        assert len(one["pieces"]["map_seconds"]) == 4
    assert found["memory"]["pairs"] > 100
    page = (tmp_path / "scale.md").read_text()
    assert "byte for byte" in page
    assert page == scale.page(found)
    assert scale.main(["--render", "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "scale.md").read_text() == page
