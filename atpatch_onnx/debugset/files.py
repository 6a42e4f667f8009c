"""A debug set on disk: arrays by key, in one `.npz` file, in a folder of `.npy` files, or in Parquet or Arrow files.

| key                      | holds                                                                                   |
|--------------------------|-----------------------------------------------------------------------------------------|
| `clean/<input>`          | an input's clean array `[pairs, ...]`                                                   |
| `counterfactual/<input>` | the same input's counterfactual array, of the same shape and dtype                      |
| `labels`                 | optional: whole numbers `[pairs]`                                                       |
| `suspects`               | optional: bool `[pairs, tokens]`                                                        |
| `sensitive`              | optional: the protected attribute's clean values `[pairs]`                              |
| `payload`                | of kind "generation": the tokens that the attack makes a model write, `[pairs, tokens]` |
| `debugset.json`          | `{"format": "atpatch-onnx debug set", "version": 1, "kind": "backdoor", "target": 3}`   |

In a `.npz` file a key is an entry, the json a text array without axes. In a folder a key is the file `<key>.npy`, the
json a file of that name; the arrays are memory-mapped. In Parquet and Arrow files (`columns`) a key is a column, the
json stands in the schema under its "format", and both sides are read row by row. `kind` is "backdoor", "attribute" or
"generation", `target` a class or null. `"found": true` says that a search
found the pairs, so that they resemble the attack.

Where there is a json, `<input>` is the input's name with every character but letters, digits and `_.-~` written as `%`
and two hex digits for each UTF-8 byte. Files written by hand may leave the json out and use plain names; they are taken
as kind "backdoor" without a target. Nothing is pickled, and nothing pickled is read.

Files are untrusted and written aside: a damaged or foreign one is refused, and a save that fails changes nothing.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import ArrayLike

from atpatch_onnx.debugset import column_files, columns
from atpatch_onnx.debugset.archives import map_file, read_member
from atpatch_onnx.debugset.arrays import Array
from atpatch_onnx.debugset.rows import as_stored
from atpatch_onnx.errors import DebugSetError, one_line
from atpatch_onnx.files import staging

HEADER = "debugset.json"
FORMAT = "atpatch-onnx debug set"
VERSION = 1
SIDES = ("clean", "counterfactual")
EXTRAS = ("labels", "suspects", "sensitive", "payload")
KINDS = ("backdoor", "attribute", "generation")

_HEADER_LIMIT = 2**16


@dataclass(frozen=True)
class Stored:
    """What a debug set or its files hold, not yet checked against each other."""

    clean: Mapping[str, ArrayLike]
    counterfactual: Mapping[str, ArrayLike]
    extras: Mapping[str, ArrayLike]
    """By the names in `EXTRAS`, those that there are."""

    kind: str
    target: int | None
    found: bool = False


# Writing


def write(stored: Stored, path: str | os.PathLike[str]) -> None:
    """Write to a `.npz` or `.parquet` file where `path` ends so, else to a folder."""
    path = Path(path)
    arrays = {
        **{f"{side}/{quote(name, safe='')}": a for side in SIDES for name, a in getattr(stored, side).items()},
        **stored.extras,
    }
    said: dict[str, Any] = {"format": FORMAT, "version": VERSION, "kind": stored.kind, "target": stored.target}
    header = json.dumps(said | ({"found": True} if stored.found else {}))
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path.parent) as made:
            staged = made / "new"
            if path.suffix == ".npz":
                _write_npz(staged, {HEADER: np.array(header), **arrays})
                os.replace(staged, path)
            elif path.suffix == ".parquet":
                column_files.write(os.fspath(staged), arrays, {FORMAT: header})
                os.replace(staged, path)
            else:
                _write_folder(staged, header, arrays)
                _replace_folder(staged, path, made / "old")
    except (OSError, ValueError) as error:
        raise DebugSetError(
            str(path),
            expected="a place that can be written to",
            found=one_line(error),
            advice="Choose another path, or make room.",
        ) from error


def _write_npz(file: Path, arrays: Mapping[str, Array]) -> None:
    with zipfile.ZipFile(file, "x") as archive:
        for key, array in arrays.items():
            entry = zipfile.ZipInfo(f"{key}.npy")  # without the time, so that equal sets give equal files
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def _write_folder(folder: Path, header: str, arrays: Mapping[str, Array]) -> None:
    for side in SIDES:
        (folder / side).mkdir(parents=True)
    (folder / HEADER).write_text(header + "\n", encoding="utf-8")
    for key, array in arrays.items():
        with (folder / f"{key}.npy").open("xb") as file:  # x: two names may be one to a file system that ignores case
            np.save(file, array, allow_pickle=False)


def _replace_folder(staged: Path, path: Path, aside: Path) -> None:
    """Put `staged` where an older debug set may be; refuse to touch any other folder that is not empty."""
    if not path.is_dir():
        os.replace(staged, path)
        return
    if any(path.iterdir()):
        _check_ours(path)
    os.replace(path, aside)
    try:
        os.replace(staged, path)
    except OSError:
        os.replace(aside, path)
        raise


def _check_ours(path: Path) -> None:
    ours = {HEADER, *SIDES, *(f"{extra}.npy" for extra in EXTRAS)}
    foreign = sorted(
        [entry.name for entry in path.iterdir() if entry.name not in ours]
        + [entry.name for side in SIDES for entry in (path / side).glob("*") if entry.suffix != ".npy"]
    )
    if foreign or not (path / HEADER).is_file():
        raise DebugSetError(
            str(path),
            expected="a new or empty folder, or an older debug set to replace",
            found=f"a folder with {foreign[0]!r} in it" if foreign else f"a folder without {HEADER}",
            advice="Choose another path.",
        )


# Reading


def read(path: str | os.PathLike[str]) -> Stored:
    """Read a `.npz` file, a folder of `.npy` files, whose arrays are memory-mapped, or Parquet and Arrow files.

    Of the latter, both sides stay where they are, and rows are read when they are asked for.
    """
    text, path = columns.as_text(path), Path(path)
    if columns.is_columns(text):
        return _read_columns(text)
    if path.is_dir():
        header, arrays = _read_folder(path)
    elif path.is_file():
        header, arrays = _read_npz(path)
    else:
        raise DebugSetError(
            str(path),
            expected="a .npz file, a folder of .npy files, or Parquet files",
            found="nothing there",
            advice="Check the path.",
        )
    return _sorted(path, header, arrays)


def _read_columns(path: str) -> Stored:
    """Columns that are no debug set's, such as a number of the row, are left alone."""
    table = columns.opened(path)
    said = table.metadata.get(FORMAT.encode())
    arrays: dict[str, Array] = {}
    for name in table.columns:
        if name.partition("/")[0] in SIDES:
            arrays[name] = as_stored(table.stored(name))
        elif name in EXTRAS:
            arrays[name] = np.asarray(table.stored(name))
    with _refusing_damage(path):
        header = None if said is None else said.decode("utf-8")
    return _sorted(Path(path), header, arrays)


def _sorted(path: Path, header: str | None, arrays: Mapping[str, Array]) -> Stored:
    kind, target, found = ("backdoor", None, False) if header is None else _parsed(header, f"{path}: {HEADER}")
    sides: dict[str, dict[str, Array]] = {side: {} for side in SIDES}
    extras: dict[str, Array] = {}
    for key, array in arrays.items():
        side, name = _placed(key, path)
        if side is None:
            extras[name] = array
            continue
        if header is not None:
            with _refusing_damage(f"{path}: {key}"):
                name = unquote(name, errors="strict")
        if name in sides[side]:
            raise _not_a_set(str(path), f"the input {name!r} twice")
        sides[side][name] = array
    if not sides["clean"] or not sides["counterfactual"]:
        raise DebugSetError(
            str(path),
            expected="arrays clean/<input> and counterfactual/<input>",
            found=", ".join(repr(key) for key in arrays) or "no arrays",
            advice="Store both sides under the names of the model's inputs, such as clean/pixel_values.",
        )
    return Stored(sides["clean"], sides["counterfactual"], extras, kind, target, found)


def _placed(key: str, path: Path) -> tuple[str | None, str]:
    """The side and the encoded input's name that a key stands for, or no side and the name of an extra."""
    side, slash, name = key.partition("/")
    if slash and side in SIDES:
        return side, name
    if key in EXTRAS:
        return None, key
    raise DebugSetError(
        str(path),
        expected=f"clean/<input>, counterfactual/<input>, {', '.join(EXTRAS)} and {HEADER} only",
        found=repr(key),
        advice="Rename that array, or take it out.",
    )


def _read_npz(path: Path) -> tuple[str | None, dict[str, Array]]:
    arrays: dict[str, Array] = {}
    with _refusing_damage(str(path)), zipfile.ZipFile(path) as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key in members:
                raise ValueError(f"{key!r} is there twice")
            if key != HEADER:
                _placed(key, path)  # before anything is unpacked
            members[key] = member
        if sum(member.compress_size for member in members.values()) > path.stat().st_size:
            raise ValueError("members that share their bytes")
        for key, member in members.items():
            if key == HEADER and member.file_size > 8 * _HEADER_LIMIT:
                raise _not_a_set(f"{path}: {HEADER}", f"{member.file_size} bytes")
            with _refusing_damage(f"{path}: {key}"):
                arrays[key] = read_member(archive, member)
    header = arrays.pop(HEADER, None)
    if header is None:
        return None, arrays
    if header.dtype.kind != "U" or header.ndim or header.nbytes > 4 * _HEADER_LIMIT:
        raise _not_a_set(f"{path}: {HEADER}", f"{header.dtype} {list(header.shape)}")
    with _refusing_damage(f"{path}: {HEADER}"):
        return str(header), arrays  # numpy refuses code points that are no Unicode only here


def _read_folder(path: Path) -> tuple[str | None, dict[str, Array]]:
    arrays: dict[str, Array] = {}
    with _refusing_damage(str(path)):
        files = sorted(file for side in (".", *SIDES) for file in (path / side).glob("*.npy") if file.is_file())
    for file in files:
        key = file.relative_to(path).as_posix().removesuffix(".npy")
        with _refusing_damage(str(file)):
            arrays[key] = map_file(file)
    if not (path / HEADER).is_file():
        return None, arrays
    with _refusing_damage(str(path / HEADER)), (path / HEADER).open("rb") as stream:
        return stream.read(_HEADER_LIMIT).decode("utf-8"), arrays


def _parsed(text: str, where: str) -> tuple[str, int | None, bool]:
    with _refusing_damage(where):
        header: Any = json.loads(text)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _not_a_set(where, f"another header ({text[:60]!r})")
    if header.get("version") != VERSION:
        raise DebugSetError(
            where,
            expected=f"version {VERSION}",
            found=f"version {header.get('version')!r}",
            advice="Read it with the release of atpatch-onnx that wrote it, or a later one.",
        )
    kind, target, found = header.get("kind"), header.get("target"), header.get("found", False)
    if kind not in KINDS or not (target is None or type(target) is int) or type(found) is not bool:
        raise _not_a_set(where, f"kind {kind!r}, target {target!r} and found {found!r}")
    return kind, target, found


@contextmanager
def _refusing_damage(where: str) -> Iterator[None]:
    try:
        yield
    except DebugSetError:
        raise
    except Exception as error:  # zipfile, numpy's header parser and json raise a dozen types, some of them undocumented
        raise _not_a_set(where, one_line(error)) from error


def _not_a_set(where: str, found: str) -> DebugSetError:
    return DebugSetError(
        where,
        expected="a complete debug set: a .npz file or a folder of .npy files, nothing pickled",
        found=found,
        advice="Save the debug set again, or copy it again if it was cut short.",
    )
