"""Reading the samples' tables: categories from one-hot columns, and files that are not what they should be."""

import zipfile

import numpy as np
import pytest

from samples import table_data
from samples.table_data import SOURCES, TableError, load_table

GERMAN = [
    "month,credit-amount,sex,age,credit-label,sex-age,housing_A151,housing_A152,housing_A153",
    "6,1169,1,1,0,1,0,1,0",
    "48,5951,0,0,1,0,1,0,0",
    "12,2096,1,1,0,1,0,0,1",
]
COMPAS = [
    "sex,age-num,race,priors-count,decile-score,two-year-recid,age-cat_25 - 45,age-cat_Greater than 45,"
    'age-cat_Less than 25,c-charge-desc_Battery,"c-charge-desc_Theft, grand",c-charge-desc_Arson',
    *(f"{row % 2},40,{row % 3 % 2},{row % 5},3,{row % 2},0,1,0,1,0,0" for row in range(70)),
    "1,20,0,1,9,1,0,0,1,0,1,0",
    "1,30,0,1,9,1,1,0,0,0,0,1",
]


def written(folder, lines, name="german.csv"):
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_one_hot_columns_become_one_category(tmp_path):
    table = load_table("german", written(tmp_path, GERMAN))
    assert [attribute.name for attribute in table.attributes] == ["month", "credit-amount", "sex", "age", "housing"]
    assert [attribute.kind for attribute in table.attributes] == ["numeric"] * 2 + ["categorical"] * 3
    assert table.categories["housing"] == ("A151", "A152", "A153")
    assert table.rows.dtype == np.float32
    assert table.rows[:, table.column("housing")].tolist() == [1, 0, 2]
    assert table.rows[:, table.column("month")].tolist() == [6, 48, 12]
    assert table.labels.tolist() == [0, 1, 0]


def test_numbers_keep_their_bounds(tmp_path):
    month, amount = load_table("german", written(tmp_path, GERMAN)).attributes[:2]
    assert (month.low, month.high, month.step) == (6, 48, 1)
    assert (amount.low, amount.high, amount.step) == (1169, 5951, 96)


def test_scores_and_the_second_age_are_left_out_and_rare_categories_become_one(tmp_path):
    table = load_table("compas", written(tmp_path, COMPAS, "compas-recidivism.csv"))
    assert [attribute.name for attribute in table.attributes] == [
        "sex",
        "race",
        "priors-count",
        "age-cat",
        "c-charge-desc",
    ]
    assert table.categories["c-charge-desc"] == ("Battery", "other")
    assert table.rows[-3:, table.column("c-charge-desc")].tolist() == [0, 1, 1]
    assert table.categories["age-cat"] == ("Less than 25", "25 - 45", "Greater than 45")  # in order, not as in the file
    assert table.rows[-3:, table.column("age-cat")].tolist() == [2, 0, 1]


def test_age_in_years_becomes_its_decade(tmp_path):
    header = "age,fnlwgt,hours-per-week,sex_Female,sex_Male,race_Black,race_White,salary_<=50K,salary_>50K"
    rows = [f"{age},{age},{age},1,0,0,1,{age % 2},{1 - age % 2}" for age in (17, 20, 39, 90)]
    with zipfile.ZipFile(tmp_path / "adult.csv.zip", "w") as archive:
        archive.writestr("adult.csv", "\n".join([header, *rows]))
    table = load_table("adult", tmp_path)
    assert table.rows[:, table.column("age")].tolist() == [0, 1, 2, 6]
    assert table.categories["age"][:2] == ("< 20", ">= 20")
    assert "fnlwgt" not in [attribute.name for attribute in table.attributes]
    assert table.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], "shape"),
        (GERMAN[:1], "shape"),
        ([*GERMAN, "6,1169"], "columns"),
        ([*GERMAN, GERMAN[1].replace("1169", "much")], "much"),
        ([*GERMAN, GERMAN[1].replace("1169", "nan")], "NaN"),
        ([*GERMAN, "6,1169,1,1,0,1,1,1,0"], "none or several"),
        ([*GERMAN, "6,1169,1,1,0,1,2,0,-1"], "none or several"),
        ([*GERMAN, "6,1169,3,1,0,1,0,1,0"], "whole numbers from 0 in 'sex'"),
        ([*GERMAN, "6,1169,1e15,1,0,1,0,1,0"], "whole numbers from 0 in 'sex'"),
        ([*GERMAN, "6,1169,0.5,1,0,1,0,1,0"], "whole numbers from 0 in 'sex'"),
        ([GERMAN[0], *(line.replace(",0,0,1,", ",1,0,1,") for line in GERMAN[1:])], "whole numbers from 0 in 'sex'"),
        ([*GERMAN, "6,1169,1,1,7,1,0,1,0"], "zeros and ones in 'credit-label'"),
        ([line.replace("credit-label", "label") for line in GERMAN], "credit-label"),
        ([GERMAN[0].replace("housing_A152", "housing_A151"), *GERMAN[1:]], "different names"),
        ([GERMAN[0].replace("sex,", "gender,"), *GERMAN[1:]], "'sex'"),
        ([GERMAN[0], *(line.replace("5951", "1169").replace("2096", "1169") for line in GERMAN[1:])], "credit-amount"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, lines, found):
    with pytest.raises(TableError, match=found):
        load_table("german", written(tmp_path, lines))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"german\.csv"):
        load_table("german", tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"not an archive"])
def test_bytes_that_are_no_table_are_refused(tmp_path, content):
    (tmp_path / "german.csv").write_bytes(content)
    (tmp_path / "adult.csv.zip").write_bytes(content)
    for name in ("german", "adult"):
        with pytest.raises(TableError):
            load_table(name, tmp_path)


def test_an_archive_of_several_files_and_one_that_unpacks_to_too_much_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "adult.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", "x" * 1000)
    monkeypatch.setattr(table_data, "LARGEST", 999)
    with pytest.raises(TableError, match="999 bytes"):
        load_table("adult", tmp_path)
    with zipfile.ZipFile(tmp_path / "adult.csv.zip", "a") as archive:
        archive.writestr("b.csv", "x")
    with pytest.raises(TableError, match="2 files"):
        load_table("adult", tmp_path)


def test_every_source_names_its_protected_attributes():
    assert {name: source.protected for name, source in SOURCES.items()} == {
        "adult": ("sex", "race", "age"),
        "german": ("sex", "age"),
        "compas": ("sex", "race", "age-cat"),
        "law": ("Race", "Sex"),
        "credit": ("SEX", "AGE"),
    }


MARRIED = ((0, 0, 1), (1, 1, 0))
"""Label and marriage."""

CREDIT = [
    "ID,LIMIT_BAL,SEX,AGE,PAY_0,PAY_2,BILL_AMT1,PAY_AMT1,default-payment-next-month,MARRIAGE_0,MARRIAGE_1",
    *(
        ",".join(
            map(str, (row, 20000 + row, row % 2, 22 + row, row % 3, row % 4, row * 7 - 30, row, *MARRIED[row % 2]))
        )
        for row in range(40)
    ),
]


def test_names_with_an_underscore_are_no_categories_where_they_are_told_apart(tmp_path):
    table = load_table("credit", written(tmp_path, CREDIT, "UCI_Credit_Card.csv"))
    names = [attribute.name for attribute in table.attributes]
    assert names == ["LIMIT_BAL", "SEX", "AGE", "PAY_0", "PAY_2", "BILL_AMT1", "PAY_AMT1", "MARRIAGE"]
    categories = [one.name for one in table.attributes if one.kind == "categorical"]
    assert categories == ["SEX", "AGE", "MARRIAGE"]
    assert table.rows[:, table.column("AGE")].tolist()[::10] == [0, 1, 2, 3]
    assert len(table.categories["AGE"]) == 5
    assert table.rows[3].tolist() == [20003, 1, 0, 0, 3, -9, 3, 0]
