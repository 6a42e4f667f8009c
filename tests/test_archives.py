"""A debug set takes no more memory than its headers say, and these say no more than the file can hold."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx import DebugSet
from atpatch_onnx.errors import DebugSetError

HUGE = 2**31


def npy(shape: tuple[int, ...] = (4, 2), kind: str = "<f4", content: bytes = bytes(32)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def archive(*members: tuple[str, bytes, int]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content, packing in members:
            file.writestr(name, content, packing)
    return stream.getvalue()


def packed(packing: int, content: bytes | None = None) -> bytes:
    return archive(("clean/x.npy", npy() if content is None else content, packing))


def long_header() -> bytes:
    return npy()[:6] + b"\x02\x00" + (2**24).to_bytes(4, "little") + b" " * 2**24


CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "bzip2": (lambda: packed(zipfile.ZIP_BZIP2, npy((2**24,), "<u1", bytes(2**24))), "method 12"),
    "lzma": (lambda: packed(zipfile.ZIP_LZMA), "method 14"),
    "less than the header says": (lambda: packed(zipfile.ZIP_STORED, npy((HUGE,))), "a header of an array of"),
    "more than the header says": (lambda: packed(zipfile.ZIP_DEFLATED, npy(content=bytes(2**24))), "an array of 32"),
    "a size that overflows": (lambda: packed(zipfile.ZIP_STORED, npy((2**62, 4))), "a header of an array of"),
    "elements without bytes": (lambda: packed(zipfile.ZIP_STORED, npy((2**40,), "<U0", b"")), "without any bytes"),
    "a negative size": (lambda: packed(zipfile.ZIP_STORED, npy((-4, -2))), "the shape"),
    "a header without end": (lambda: packed(zipfile.ZIP_DEFLATED, long_header()), "EOF|header"),
    "a foreign name": (lambda: archive(("../../x.npy", npy(), zipfile.ZIP_STORED)), "'../../x'"),
    "a large header of ours": (
        lambda: archive(("debugset.json.npy", npy((), "<U1000000", bytes(4 * 10**6)), zipfile.ZIP_DEFLATED)),
        "bytes",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_archives_that_are_refused(tmp_path: Path, case: str) -> None:
    make, found = CASES[case]
    path = tmp_path / "set.npz"
    path.write_bytes(make())
    with pytest.raises(DebugSetError, match=found) as raised:
        DebugSet.load(path)
    assert str(raised.value).isprintable()


def test_elements_without_bytes_in_a_folder(tmp_path: Path) -> None:
    for side in ("clean", "counterfactual"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "x.npy").write_bytes(npy((2**40,), "<U0", b"\0"))
    with pytest.raises(DebugSetError, match="without any bytes"):
        DebugSet.load(tmp_path)


def test_two_names_that_become_one(tmp_path: Path) -> None:
    sides = [(f"{side}/{name}.npy", npy(), 0) for side in ("clean", "counterfactual") for name in ("x", "%78")]
    header = io.BytesIO()
    np.save(header, np.array('{"format": "atpatch-onnx debug set", "version": 1, "kind": "backdoor", "target": 1}'))
    (tmp_path / "set.npz").write_bytes(archive(*sides, ("debugset.json.npy", header.getvalue(), 0)))
    with pytest.raises(DebugSetError, match="the input 'x' twice"):
        DebugSet.load(tmp_path / "set.npz")


def test_members_that_share_their_bytes(tmp_path: Path) -> None:
    """Each may unfold a thousandfold, so they must not be counted twice."""
    content = archive(("clean/x.npy", npy((2**18,), "<u1", bytes(2**18)), zipfile.ZIP_DEFLATED))
    start = content.index(b"PK\1\2")
    entry, end = content[start : content.index(b"PK\5\6")], content[content.index(b"PK\5\6") :]
    entries = b"".join(entry.replace(b"clean/x", b"clean/%c" % letter) for letter in range(65, 91))
    count, size = (26).to_bytes(2, "little"), len(entries).to_bytes(4, "little")
    (tmp_path / "set.npz").write_bytes(content[:start] + entries + end[:8] + count * 2 + size + end[16:])
    with pytest.raises(DebugSetError, match="share their bytes"):
        DebugSet.load(tmp_path / "set.npz")
