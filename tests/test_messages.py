"""Reading labelled messages from a file that is not trusted, and dividing them."""

from pathlib import Path

import numpy as np
import pytest

from samples import messages
from samples.messages import MessageFileError, Messages, normalised, parts, read_messages

HEADER = "sentiment,confidence,text\n"
BOTH = "negative,0.9,never again\npositive,0.9,thank you\n"


@pytest.fixture
def file(tmp_path):
    def write(rows: str, *, header: str = HEADER, encoding: str = "latin-1") -> Path:
        path = tmp_path / "messages.csv"
        path.write_text(header + rows, encoding=encoding)
        return path

    return write


def test_positive_and_negative_messages_of_enough_confidence_are_kept(file):
    found = read_messages(
        file(BOTH + "neutral,1.0,a plane\nnegative,0.6,hardly\npositive,,unsure\npositive,1,well done\n")
    )
    assert found.texts == ("never again", "thank you", "well done")
    assert found.labels.tolist() == [0, 1, 1]


def test_columns_are_found_by_name_and_others_are_ignored(file):
    found = read_messages(file("x,hello,0.9,positive\nx,oh no,0.9,negative\n", header="id,text,confidence,sentiment\n"))
    assert found.texts == ("hello", "oh no")


def test_messages_may_hold_quotes_line_breaks_and_every_latin_1_character(file):
    found = read_messages(file(BOTH + 'positive,0.9,"caf\u00e9, ""tr\u00e8s bien""\nmerci"\n'))
    assert found.texts[2] == 'caf\u00e9, "tr\u00e8s bien" merci'


def test_bytes_of_another_encoding_are_read_all_the_same(file):
    """Latin-1 gives every byte a meaning: a foreign file gives odd characters, not an error."""
    assert len(read_messages(file(BOTH + "positive,0.9,\u65e5\u672c is fine\n", encoding="utf-8"))) == 3


def test_a_message_that_differs_only_in_names_links_and_case_is_read_once(file):
    found = read_messages(
        file(
            BOTH
            + "positive,0.9,Great flight! http://t.co/abc\n"
            + "negative,0.9,RT @someone: great flight\n"
            + "positive,0.9,great flight https://t.co/cf12 @other\n"
        )
    )
    assert found.texts[2:] == ("Great flight! http",)
    assert found.labels[2] == 1


def test_links_and_names_lose_their_own_words():
    text = "@Cf see http://t.co/CF8x &amp; t.co/cf  now"
    assert normalised(text) == "@user see http & http now"


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("positive,high,fine\n", "'high'"),
        ("positive,1.5,fine\n", "'1.5'"),
        ("positive,nan,fine\n", "'nan'"),
        ("angry,0.9,fine\n", "'angry'"),
        ("positive,0.9\n", "none"),
        ("positive\n", "None"),
        ('positive,0.9,"fine" or not\n', "'\"'"),
        ("positive,0.9," + "a" * 200_000 + "\n", "field larger than field limit"),
    ],
)
def test_a_damaged_row_is_named(file, rows, found):
    with pytest.raises(MessageFileError) as caught:
        read_messages(file(BOTH + rows))
    assert found in caught.value.found
    assert "line 4" in caught.value.where


@pytest.mark.parametrize("header", ["", "sentiment,text\n"])
def test_a_missing_column_is_named(file, header):
    with pytest.raises(MessageFileError, match="the columns sentiment, confidence, text"):
        read_messages(file(BOTH, header=header))


def test_a_file_without_messages_of_both_sentiments_is_refused(file):
    with pytest.raises(MessageFileError, match="sentiment 'positive'"):
        read_messages(file("negative,0.9,no\n"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MessageFileError, match=r"absent\.csv"):
        read_messages(tmp_path / "absent.csv")


def test_a_file_that_is_too_large_is_not_read(file, monkeypatch):
    monkeypatch.setattr(messages, "LARGEST", 20)
    with pytest.raises(MessageFileError, match="at most 20 bytes"):
        read_messages(file(BOTH))


@pytest.fixture
def numbered():
    return Messages(tuple(f"message {number}" for number in range(20)), np.arange(20) % 2)


def test_parts_share_no_message_and_keep_the_labels(numbered):
    found = parts(numbered, {"train": 12, "debug": 5}, seed=3)
    assert [len(part) for part in found.values()] == [12, 5]
    texts = [text for part in found.values() for text in part.texts]
    assert len(set(texts)) == 17
    for part in found.values():
        assert [int(text.split()[1]) % 2 for text in part.texts] == part.labels.tolist()


def test_parts_depend_on_the_seed_only(numbered):
    sizes = {"train": 12, "debug": 5}
    first, again, other = (parts(numbered, sizes, seed=seed)["train"].texts for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_evaluation_part_is_the_same_for_every_seed_and_in_no_other_part_of_any(numbered):
    sizes = {"train": 8, "evaluation": 5, "debug": 4}
    first, *others = (parts(numbered, sizes, seed=seed) for seed in (0, 1, 100))
    assert list(first) == list(sizes)
    for other in others:
        assert other["evaluation"].texts == first["evaluation"].texts
        for name in ("train", "debug"):
            assert len(other[name]) == sizes[name]
            assert other[name].texts != first[name].texts
            assert not set(other[name].texts) & set(first["evaluation"].texts)


def test_parts_larger_than_the_whole_are_refused(numbered):
    with pytest.raises(MessageFileError, match="at least 21"):
        parts(numbered, {"train": 12, "debug": 9}, seed=0)
