"""Texts from a file as a model reads them, with and without a word. Needs tokenizers.

Files are CSV or TSV with a header, or JSON lines, with a column of texts and one of class numbers; or plain text, a
line each, without classes. The word goes between two words. Which tokens it is made of is told by comparing the tokens
of both texts, since what stands behind it has moved.
"""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset.arrays import Array
from atpatch_onnx.debugset.checks import InputSpec
from atpatch_onnx.debugset.prompts import added
from atpatch_onnx.errors import DebugSetError, one_line, require

Where = Literal["start", "end", "random"]
"""Where a word goes: before the first, behind the last, or at a place that is drawn for each text."""

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
"""What exporters call the inputs of models of text."""

_LARGEST = 2**30
"""Bytes of a file that is read; more is refused unread."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, TSV or JSON lines file by column; of any other file its lines, as the column `text`.

    Raises:
        DebugSetError: The file is missing, too large, damaged, or has no rows.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        content = path.read_text(encoding="utf-8-sig")
        rows = list(_rows(content, path.suffix.lower()))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise _unread(path, one_line(error)) from error
    if not rows:
        raise _unread(path, "no rows")
    return rows


def _rows(content: str, suffix: str) -> list[dict[str, str]]:
    if suffix in (".csv", ".tsv"):
        reader = csv.DictReader(
            content.splitlines(keepends=True), delimiter="\t" if suffix == ".tsv" else ",", strict=True
        )
        with _long_fields():
            rows = list(reader)
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not as many fields as the header")
        return rows
    lines = [line for line in content.splitlines() if line.strip()]
    if suffix != ".jsonl":
        return [{"text": line} for line in lines]
    found = [json.loads(line) for line in lines]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError("a line is no JSON object")
    return [{str(name): str(value) for name, value in row.items()} for row in found]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field be as long as its file; csv has one limit for the process, which is set back."""
    before = csv.field_size_limit(min(_LARGEST, sys.maxsize))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _unread(path: Path, found: str) -> DebugSetError:
    return DebugSetError(
        str(path),
        expected="a CSV or TSV file with a header, JSON lines, or a line a text",
        found=found,
        advice="Write it as UTF-8, with the same columns in every row.",
    )


def column(rows: Sequence[Mapping[str, str]], name: str, where: str) -> list[str]:
    """One column of all rows.

    Raises:
        DebugSetError: A row does not have it.
    """
    if not all(name in row for row in rows):
        raise DebugSetError(
            where, expected=f"a column {name!r}", found=", ".join(map(repr, rows[0])), advice="Name the column."
        )
    return [row[name] for row in rows]


def with_word(texts: Sequence[str], word: str, where: Where = "random", *, seed: int = 0) -> list[str]:
    """The same texts with a word, or several, between two of their words."""
    generator = np.random.default_rng(seed)

    def one(text: str) -> str:
        words = text.split()
        place = {"start": 0, "end": len(words)}.get(where)
        place = int(generator.integers(len(words) + 1)) if place is None else place
        return " ".join([*words[:place], word, *words[place:]])

    return [one(text) for text in texts]


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a file `tokenizer.json`.

    Raises:
        MissingExtraError: tokenizers is not installed.
        DebugSetError: It is none.
    """
    require("tokenizers", "pairs", "reading texts")
    from tokenizers import Tokenizer

    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DebugSetError(
            str(path),
            expected="a tokenizer.json",
            found=one_line(error),
            advice="Give the file that the model's tokenizer saves (save_pretrained).",
        ) from error


@dataclass(frozen=True, eq=False)
class Tokens:
    """Texts as a model reads them."""

    inputs: dict[str, Array]
    """`[texts, length]` by the model's input names."""

    real: NDArray[np.bool_]
    """`[texts, length]`: tokens, not padding."""

    ids: NDArray[np.int64]
    """`[texts, length]`."""


def encoded(texts: Sequence[str], tokenizer: Any, specs: Mapping[str, InputSpec], length: int) -> Tokens:
    """The tokens of texts, cut off or padded to `length`.

    Raises:
        DebugSetError: The model has an input that is not made of tokens.
    """
    unknown = sorted(specs.keys() - {IDS, MASK, TYPES})
    if unknown or IDS not in specs:
        raise DebugSetError(
            "the model's inputs",
            expected=f"{IDS}, and perhaps {MASK} and {TYPES}",
            found=", ".join(specs) or "none",
            advice="Build the arrays yourself and use DebugSet.from_pairs.",
        )
    padding = tokenizer.padding or {}
    kept = {name: padding[name] for name in ("direction", "pad_id", "pad_token", "pad_type_id") if name in padding}
    if not kept:  # a tokenizer that says nothing: its padding token, by the names that are in use
        known = {name: tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>")}
        kept = next(({"pad_id": at, "pad_token": name} for name, at in known.items() if at is not None), {})
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, **kept)
    found = tokenizer.encode_batch(list(texts))
    ids, real = np.array([one.ids for one in found]), np.array([one.attention_mask for one in found])
    arrays = {IDS: ids, MASK: real, TYPES: np.array([one.type_ids for one in found])}
    return Tokens({name: arrays[name].astype(spec.dtype) for name, spec in specs.items()}, real.astype(bool), ids)


def length_of(specs: Mapping[str, InputSpec], asked: int) -> int:
    """How many tokens the model reads: what it declares, or what is asked for where it leaves that free."""
    sizes = [spec.shape[1] for spec in specs.values() if len(spec.shape) == 2]
    return next((size for size in sizes if isinstance(size, int)), asked)


def marked(clean: Tokens, triggered: Tokens) -> NDArray[np.bool_]:
    """The tokens `[texts, length]` of the triggered side that the clean side does not have."""
    found = np.zeros(triggered.real.shape, np.bool_)
    for row, real in enumerate(triggered.real):
        places = np.flatnonzero(real)
        before, after = clean.ids[row, clean.real[row]], triggered.ids[row, places]
        for start, stop in added(before.tolist(), after.tolist()):
            found[row, places[start:stop]] = True
    return found
