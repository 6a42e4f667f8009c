"""The sample on tables: parts, pairs, the model, and a small run from end to end."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import atpatch_onnx as atp
from atpatch_onnx.discovery import Attribute, SearchOptions
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Session
from samples import tables
from samples.bounds import Bound
from samples.ft_transformer import FTTransformer, Recipe, WithGradients, build, export_onnx, predict, train
from samples.table_data import TableData, TableError

RECIPE = Recipe(layers=2, width=16, heads=2, hidden=16, epochs=12, batch=64, learning_rate=5e-3)
SIZE = tables.Size(
    train=400,
    debug=300,
    tune=150,
    evaluation=200,
    recipe=RECIPE,
    search=SearchOptions(seeds=50, walks=10, steps=2, sample=10),
    goal=atp.Goal(flip_rate=0.0, accuracy_loss=0.5, clean_flag_rate=0.03),
    bounds=(*tables.FAIR, Bound("accuracy lost", 0.5)),
)


@pytest.fixture(scope="module")
def table() -> TableData:
    """The label is the income, higher for one sex; the colour says nothing."""
    generator = np.random.default_rng(0)
    sex, colour = generator.integers(0, 2, 1500), generator.integers(0, 5, 1500)
    income, debt = generator.integers(0, 50, 1500), generator.integers(0, 1000, 1500)
    return TableData(
        attributes=(
            Attribute.categorical("sex", 2),
            Attribute.categorical("colour", 5),
            Attribute.numeric("income", 0, 49),
            Attribute.numeric("debt", 0, 999),
        ),
        rows=np.stack([sex, colour, income, debt], axis=1).astype(np.float32),
        labels=(income + 10 * sex > 30).astype(np.int64),
        categories={"sex": ("f", "m"), "colour": tuple("abcde")},
        logarithmic=("debt",),
        protected=("sex",),
    )


@pytest.fixture(scope="module")
def model(table) -> FTTransformer:
    return train(new(table), table.rows[:800], table.labels[:800], RECIPE, seed=0)


def new(table: TableData, seed: int = 0) -> FTTransformer:
    return build(table.attributes, table.rows[:800], table.logarithmic, RECIPE, seed).eval()


# Parts and pairs


def test_parts_share_no_row_not_even_with_another_protected_value(table):
    parts = tables.divide(table, SIZE, seed=0)
    groups = [{tuple(row) for row in table.rows[rows, 1:]} for rows in vars(parts).values()]
    for number, group in enumerate(groups):
        assert not group & set().union(*groups[number + 1 :])
    assert [len(rows) for rows in vars(parts).values()] == pytest.approx([400, 300, 150, 200], abs=3)


def test_another_seed_divides_otherwise_but_for_the_evaluation_part(table):
    first, again, *others = (tables.divide(table, SIZE, seed) for seed in (0, 0, 1, 100))
    for part in vars(first):
        np.testing.assert_array_equal(vars(first)[part], vars(again)[part])
    evaluated = {tuple(row) for row in table.rows[first.evaluation, 1:]}
    for other in others:
        np.testing.assert_array_equal(first.evaluation, other.evaluation)
        for part in ("train", "debug", "tune"):
            assert set(vars(first)[part]) != set(vars(other)[part])
            assert not evaluated & {tuple(row) for row in table.rows[vars(other)[part], 1:]}


def test_a_table_that_is_too_small_for_its_parts_is_refused(table):
    with pytest.raises(TableError, match="found 200, of which 0 are left to train on"):
        tables.divide(replace(table, rows=table.rows[:200], labels=table.labels[:200]), SIZE, seed=0)


def test_a_counterfactual_has_any_other_value_and_nothing_else_changed(table):
    pairs = tables.pairs(table, np.arange(500), table.column("colour"), seed=0)
    clean, other = pairs.clean["table"], pairs.counterfactual["table"]
    np.testing.assert_array_equal(np.delete(clean, 1, axis=1), np.delete(other, 1, axis=1))
    assert (clean[:, 1] != other[:, 1]).all()
    drawn = {(before, after) for before, after in zip(clean[:, 1], other[:, 1], strict=True)}
    assert len(drawn) == 20
    np.testing.assert_array_equal(pairs.sensitive, clean[:, 1])
    assert pairs.kind == "attribute"


def test_searched_pairs_flip_and_are_like_no_row_of_another_part(table, model):
    rows = tables.divide(table, SIZE, seed=0).debug
    found, _ = tables.searched(model, table, rows, "sex", SIZE.search, lambda *news: None)
    clean, other = found.clean["table"].copy(), found.counterfactual["table"].copy()
    assert (predict(model, clean).argmax(axis=1) != predict(model, other).argmax(axis=1)).all()
    elsewhere = {tuple(row) for row in np.delete(table.rows, rows, axis=0)[:, 1:]}
    assert not elsewhere & {tuple(row) for row in clean[:, 1:]}
    debug = tables.pairs(table, rows, 0, seed=0)
    assert len(tables.joined(debug, found)) == len(debug) + len(found)
    assert tables.joined(debug, None) is debug


def test_the_search_tells_how_much_the_model_discriminates_in_general_and_on_the_rows(table, model):
    rows = tables.divide(table, SIZE, seed=0).debug
    _, figures = tables.searched(model, table, rows, "sex", replace(SIZE.search, sample=400), lambda *news: None)
    flipped = table.rows[rows].copy()
    flipped[:, 0] = 1 - flipped[:, 0]
    flips = predict(model, table.rows[rows]).argmax(axis=1) != predict(model, flipped).argmax(axis=1)
    assert figures["discrimination_rate_rows"] == asdict(Rate.of(flips))
    assert figures["discrimination_rate"]["count"] == 400
    assert figures["discrimination_rate"]["value"] > 0.05


# The model


def test_the_model_learns_and_leans(table, model):
    rows, flipped = table.rows[800:], table.rows[800:].copy()
    flipped[:, 0] = 1 - flipped[:, 0]
    before, after = predict(model, rows).argmax(axis=1), predict(model, flipped).argmax(axis=1)
    assert (before == table.labels[800:]).mean() > 0.9
    assert (before != after).mean() > 0.1


def test_training_depends_on_the_seed_only(table, model):
    torch.manual_seed(99)
    again = train(new(table), table.rows[:800], table.labels[:800], RECIPE, seed=0)
    np.testing.assert_array_equal(predict(again, table.rows), predict(model, table.rows))
    other = train(new(table, seed=1), table.rows[:800], table.labels[:800], RECIPE, seed=1)
    assert (predict(other, table.rows) != predict(model, table.rows)).any()


def test_a_table_of_numbers_alone_is_read(table):
    left = [place for place, attribute in enumerate(table.attributes) if attribute.kind == "numeric"]
    names = [table.attributes[place].name for place in left]
    rows = table.rows[:, left]
    logarithmic = [name for name in table.logarithmic if name in names]
    found = build([table.attributes[place] for place in left], rows[:800], logarithmic, replace(RECIPE, epochs=1), 0)
    train(found, rows[:200], table.labels[:200], replace(RECIPE, epochs=1), seed=0)
    assert predict(found, rows[:7]).shape == (7, 2)


def test_a_hidden_token_says_nothing(table, model):
    rows, flipped = torch.from_numpy(table.rows[:50]), torch.from_numpy(table.rows[:50].copy())
    flipped[:, 0] = 1 - flipped[:, 0]
    hidden = torch.tensor([False, True, False, False, False]).expand(50, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(rows, hidden), model(flipped, hidden))
        assert not torch.allclose(model(rows), model(flipped))


def test_categories_get_gradients_that_lead_to_the_next_one(table, model):
    smooth = WithGradients(model)
    np.testing.assert_allclose(predict(smooth, table.rows), predict(model, table.rows), atol=1e-5)
    rows = torch.from_numpy(table.rows[:20].copy()).requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(rows)[:, 1].sum(), rows)
    assert (gradient != 0).all()
    share, rows = 1e-2, table.rows[:20].copy()
    rows[:, 0] = 0
    further = rows + np.float32([share, 0, 0, 0])
    (gradient,) = torch.autograd.grad(smooth(start := torch.from_numpy(rows).requires_grad_())[:, 1].sum(), start)
    slope = (predict(smooth, further) - predict(smooth, rows))[:, 1] / share
    np.testing.assert_allclose(gradient[:, 0], slope, rtol=0.1, atol=0.02)


@pytest.mark.nightly
def test_the_exported_model_answers_the_same_and_all_its_sites_are_found(table, model, tmp_path):
    export_onnx(model, 4, tmp_path / "base.onnx")
    onnx = atp.load(tmp_path / "base.onnx")
    logits = Session(onnx).run({"table": table.rows[:7]})["logits"]
    np.testing.assert_allclose(logits, predict(model, table.rows[:7]), atol=1e-5)
    assert [site.name for site in atp.find_sites(onnx)] == ["layers.0.attention", "layers.1.attention"]
    assert not any("stack_trace" in key for node in onnx.graph for key in node.metadata_props)


# From end to end


@pytest.fixture
def small(table, monkeypatch):
    """The sample over the small table in place of German credit."""
    monkeypatch.setattr(tables, "load_table", lambda name, folder: table)
    monkeypatch.setattr(tables, "FULL", {"german": SIZE})
    monkeypatch.setattr(tables, "FAST", {"german": replace(SIZE, train=200)})


@pytest.mark.nightly
def test_a_case_runs_from_end_to_end_and_trains_its_base_once(small, tmp_path, capsys):
    arguments = ["--case", "german/sex", "--out", str(tmp_path), "--data", str(tmp_path), "--tune"]
    assert tables.main(arguments) == 0, capsys.readouterr()
    result = json.loads((tmp_path / "german-sex-0" / "result.json").read_text())
    assert result["evaluation"]["fairness"]["uf_base"]["value"] > 0.1
    assert result["more"]["uf_any_patched"]["value"] == 0
    assert result["unbake_identical"]
    assert result["training"]["accuracy_boosting"] > result["training"]["accuracy_majority"]
    assert result["training"]["discrimination_rate"]["value"] > 0
    base = tmp_path / "base-german-0" / "base.onnx"
    written = base.stat().st_mtime_ns
    again = tables.prepare("german/sex", seed=0, fast=False, folder=tmp_path / "x", data=tmp_path, tune=True)
    assert dict(again.training) == result["training"]
    assert (again.base, base.stat().st_mtime_ns) == (base, written)
    (base.parent / "model.safetensors").write_bytes(b"damaged")
    tables.prepare("german/sex", seed=0, fast=False, folder=tmp_path / "x", data=tmp_path)
    assert base.stat().st_mtime_ns > written


def test_tune_and_evaluation_are_different_rows(small, tmp_path):
    cases = [
        tables.prepare("german/sex", seed=0, fast=True, folder=tmp_path / "x", data=tmp_path, tune=tune)
        for tune in (True, False)
    ]
    tune, evaluation = ({tuple(row) for row in case.unseen.clean["table"]} for case in cases)
    assert not tune & evaluation


def test_a_base_is_used_again_for_the_same_rows_and_labels_only(table, tmp_path):
    recipe, rows = replace(RECIPE, epochs=1), np.arange(100)

    def trains(table: TableData) -> bool:
        news = []
        tables.trained(table, rows, recipe, tmp_path, 0, lambda *told: news.append(told))
        return bool(news)

    assert trains(table)
    assert not trains(table)
    assert trains(replace(table, labels=1 - table.labels))
    assert trains(replace(table, rows=table.rows[::-1].copy()))


def test_a_base_whose_notes_are_damaged_is_trained_again(table, tmp_path):
    for _ in range(2):
        _, figures = tables.trained(table, np.arange(50), replace(RECIPE, epochs=1), tmp_path, 0, lambda *told: None)
        assert figures == json.loads((tmp_path / "base.json").read_text())
        (tmp_path / "base.json").write_text("[]")


def test_there_is_no_trigger_to_search_for_in_a_table(small, tmp_path, capsys):
    arguments = ["--case", "german/sex", "--out", str(tmp_path), "--data", str(tmp_path), "--fast", "--inverted"]
    assert tables.main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "expected images (pixel_values) or texts (input_ids); found table" in line


def test_an_unknown_case_is_refused(tmp_path):
    with pytest.raises(TableError, match="adult/sex"):
        tables.prepare("adult/shoes", seed=0, fast=True, folder=tmp_path)


def test_uf_is_counted_over_all_values(table, model, tmp_path):
    export_onnx(model, 4, tmp_path / "base.onnx")
    rows = np.arange(200)
    both = tables.flips_with_any(tmp_path / "base.onnx", tmp_path / "base.onnx", table.rows[rows], 1, 5)
    predicted = []
    for value in range(5):
        varied = table.rows[rows].copy()
        varied[:, 1] = value
        predicted.append(predict(model, varied).argmax(axis=1))
    rate = asdict(Rate.of((np.stack(predicted) != predicted[0]).any(axis=0)))
    assert both == {"uf_any_base": rate, "uf_any_patched": rate}
