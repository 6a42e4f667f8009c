"""What other packages export: exported, rehearsed and written down; a run that was stopped is gone on with."""

import json

import pytest
import torch

from samples import exported
from samples.exported_model import Softmaxes, of_torch


class Twice(torch.nn.Module):
    def forward(self, x):
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return torch.softmax(y, dim=-1)


def test_softmaxes_are_counted_fused_ones_too():
    assert of_torch("none", "twice", Twice, 2, 4, 8).softmaxes() == 2
    with Softmaxes() as counter:
        torch.ones(2) + 1
    assert counter.count == 0


@pytest.mark.nightly
def test_models_of_packages_that_are_there(tmp_path):
    docs, folder = tmp_path / "docs", tmp_path / "graphs"
    docs.mkdir()
    (docs / "coverage.md").write_text("# Coverage\n\nof a corpus\n")
    given = ["--fast", "--docs", str(docs), "--folder", str(folder)]
    assert exported.main(given) == 0
    page = (docs / "coverage.md").read_text()
    assert page.startswith("# Coverage\n\nof a corpus\n\n# What other packages export\n")
    assert "| YOLO, by hand | C2PSA | 2 | 2 ok | 2 ok |" in page
    rows = json.loads((docs / "exported.json").read_text())["rows"]
    assert {row["way"]: row["sites"] for row in rows if row["name"] == "C2PSA"} == {"dynamo": 2, "torchscript": 2}
    (bert,) = [row for row in rows if row["name"] == "bert"]
    assert (bert["sites"], sum(bert["refused"].values())) == (0, 2), "its operator projects by itself"
    assert exported.main([*given, "--so-far"]) == 0
    assert (docs / "coverage.md").read_text() == page
    assert exported.main(["--render", "--docs", str(docs)]) == 0
    assert (docs / "coverage.md").read_text() == page


def test_a_model_whose_package_is_missing_is_named(tmp_path):
    model = of_torch("nobody's", "twice", Twice, 2, 4, 8, needs=("nobody_has_this",))
    figures = exported.run([model], tmp_path, 60)
    assert figures["left_out"] == ["nobody's needs nobody_has_this"]
    assert figures["rows"] == []
