import contextlib
import io
import json
import os
import stat
import string
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError

PLACES = ("set.npz", "set")
DTYPES = ("float32", "float16", ">f8", "int64", "uint8", "bool", "complex64", "U3")


def make(pairs=4, **options):
    clean = np.arange(pairs * 3, dtype=np.float32).reshape(pairs, 3)
    return DebugSet.from_pairs({"x": clean}, {"x": clean + 1}, **options)


def full():
    return make(labels=[0, 1, 2, 3], suspects=np.eye(4, 5, dtype=bool), target=3, sensitive=["f", "m", "f", "m"])


def same_array(one, other):
    if one is None or other is None:
        return one is other
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def assert_same(one, other):
    for side in ("clean", "counterfactual"):
        left, right = getattr(one, side), getattr(other, side)
        assert left.keys() == right.keys()
        assert all(same_array(left[name], right[name]) for name in left)
    for name in ("labels", "suspects", "sensitive"):
        assert same_array(getattr(one, name), getattr(other, name))
    assert (one.kind, one.target) == (other.kind, other.target)


@st.composite
def sets(draw):
    pairs = draw(st.integers(1, 4))
    # Two names that a file system may take for one are refused, so letters keep to one case.
    names = st.text(string.ascii_lowercase + "./\\%:*~ \0\ném猫", min_size=1, max_size=12)
    inputs = draw(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), st.integers(0, 3)), max_size=3))
    clean = {name: np.ones((pairs, width, 2)).astype(dtype) for name, (dtype, width) in inputs.items()}
    clean["x"] = np.arange(pairs, dtype=np.int32)
    return DebugSet.from_pairs(
        clean,
        {**clean, "x": clean["x"] + 1},
        draw(st.none() | st.just(np.arange(pairs))),
        suspects=draw(st.just("auto") | st.just(np.eye(pairs, 5, dtype=bool))),
        sensitive=draw(st.none() | st.sampled_from([np.zeros(pairs), np.full(pairs, "é")])),
        **draw(st.sampled_from([{}, {"target": 2}, {"kind": "attribute"}])),
    )


@pytest.mark.parametrize("place", PLACES)
@settings(deadline=None)  # files on a shared machine
@given(debug=sets())
def test_round_trip(place, debug):
    with TemporaryDirectory() as folder:
        debug.save(Path(folder) / place)
        assert os.listdir(folder) == [place]
        assert_same(debug, DebugSet.load(Path(folder) / place))


@pytest.mark.parametrize("place", PLACES)
def test_text_and_fortran_order_round_trip(tmp_path, place):
    table = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    text = np.array(["naïve", "cf \U0001f63a"])
    debug = DebugSet.from_pairs({"t": table, "text": text}, {"t": table, "text": text[::-1]})
    debug.save(tmp_path / place)
    assert_same(debug, DebugSet.load(tmp_path / place))


# The format


def test_format_of_a_folder(tmp_path):
    full().save(tmp_path / "set")
    files = sorted(file.relative_to(tmp_path / "set").as_posix() for file in (tmp_path / "set").rglob("*.*"))
    assert files == [
        "clean/x.npy",
        "counterfactual/x.npy",
        "debugset.json",
        "labels.npy",
        "sensitive.npy",
        "suspects.npy",
    ]
    header = json.loads((tmp_path / "set/debugset.json").read_text())
    assert header == {"format": "atpatch-onnx debug set", "version": 1, "kind": "backdoor", "target": 3}


def test_format_of_an_npz(tmp_path):
    full().save(tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["clean/x", "counterfactual/x", "debugset.json", "labels", "sensitive", "suspects"]
        assert json.loads(str(arrays["debugset.json"]))["kind"] == "backdoor"


@pytest.mark.parametrize("place", PLACES)
def test_names_cannot_leave_the_folder(tmp_path, place):
    clean = {"../../out": np.zeros(2), "/root": np.zeros(2), "..": np.zeros(2)}
    debug = DebugSet.from_pairs(clean, {**clean, "..": np.ones(2)})
    debug.save(tmp_path / "in" / place)
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == [place]
    assert_same(debug, DebugSet.load(tmp_path / "in" / place))


def test_a_folder_is_memory_mapped_and_stays_so(tmp_path):
    make().save(tmp_path / "set")
    array = DebugSet.load(tmp_path / "set").clean["x"]
    owner = array
    while not isinstance(owner, np.memmap):
        owner = owner.base
    assert not array.flags.writeable


def test_equal_sets_give_equal_files(tmp_path):
    for name in ("one.npz", "two.npz"):
        full().save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("place", PLACES)
def test_others_may_read_what_the_umask_lets_them(tmp_path, place):
    make().save(tmp_path / place)
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE((tmp_path / place).stat().st_mode)
    assert mode == (0o777 if place == "set" else 0o666) & ~umask


# Written by hand


def test_a_plain_npz_loads(tmp_path):
    x = np.arange(4.0)
    np.savez(tmp_path / "set.npz", **{"clean/a%41": x, "counterfactual/a%41": x + 1, "labels": np.arange(4)})
    debug = DebugSet.load(str(tmp_path / "set.npz"))
    assert (list(debug.clean), debug.kind, debug.target) == (["a%41"], "backdoor", None)
    assert debug.labels.tolist() == [0, 1, 2, 3]


def test_a_plain_folder_loads(tmp_path):
    for side, value in (("clean", 0), ("counterfactual", 1)):
        (tmp_path / side).mkdir()
        np.save(tmp_path / side / "x.npy", np.full(3, value))
    (tmp_path / "README.md").write_text("mine")
    assert len(DebugSet.load(tmp_path)) == 3


# Replacing


@pytest.mark.parametrize("place", PLACES)
def test_an_older_set_is_replaced_as_a_whole(tmp_path, place):
    full().save(tmp_path / place)
    newer = DebugSet.from_pairs({"y": np.zeros(2)}, {"y": np.ones(2)})
    newer.save(tmp_path / place)
    assert_same(newer, DebugSet.load(tmp_path / place))
    assert os.listdir(tmp_path) == [place]


@pytest.mark.skipif(os.name != "posix", reason="open files cannot be replaced elsewhere")
@pytest.mark.parametrize("place", PLACES)
def test_a_loaded_set_can_be_saved_where_it_came_from(tmp_path, place):
    full().save(tmp_path / place)
    loaded = DebugSet.load(tmp_path / place)
    loaded.with_target(1).save(tmp_path / place)
    assert_same(loaded, full())
    assert DebugSet.load(tmp_path / place).target == 1


def test_an_empty_folder_is_taken(tmp_path):
    make().save(tmp_path)
    assert len(DebugSet.load(tmp_path)) == 4


@pytest.mark.parametrize("foreign", ["notes.txt", "clean/notes.txt"])
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path, foreign):
    full().save(tmp_path / "set")
    (tmp_path / "set" / foreign).write_text("mine")
    with pytest.raises(DebugSetError, match=r"older debug set to replace; found a folder with 'notes.txt'"):
        make().save(tmp_path / "set")
    assert (tmp_path / "set" / foreign).read_text() == "mine"
    assert_same(full(), DebugSet.load(tmp_path / "set"))
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_without_our_header_is_left_alone(tmp_path):
    (tmp_path / "set/clean").mkdir(parents=True)
    np.save(tmp_path / "set/clean/x.npy", np.zeros(3))
    with pytest.raises(DebugSetError, match=r"without debugset\.json"):
        make().save(tmp_path / "set")
    assert (tmp_path / "set/clean/x.npy").is_file()


@pytest.mark.parametrize("place", PLACES)
def test_a_failed_save_changes_nothing(tmp_path, place, monkeypatch):
    full().save(tmp_path / place)
    replace = os.replace

    def full_disk(source, target):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(DebugSetError, match="No space left on device"):
        make().save(tmp_path / place)
    assert_same(full(), DebugSet.load(tmp_path / place))
    assert os.listdir(tmp_path) == [place]


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    for place in ("file", "file/set", "folder.npz"):
        with pytest.raises(DebugSetError, match="expected a place that can be written to"):
            make().save(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_set_that_would_not_load_is_not_saved(tmp_path):
    part = full().take([0])
    nothing_differs = DebugSet(part.clean, part.clean, None, None, "backdoor", None, None)
    with pytest.raises(DebugSetError, match="pairs that differ"):
        nothing_differs.save(tmp_path / "set.npz")
    assert not os.listdir(tmp_path)


# Damaged and foreign files


def refused(path, match):
    with pytest.raises(DebugSetError, match=match) as caught:
        DebugSet.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Bomb:
    """Sets off when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


X, LATER = npy(np.arange(3.0)), npy(np.arange(3.0) + 1)
PICKLED = npy(np.array([Bomb(), Bomb(), Bomb()]), allow_pickle=True)
HUGE = X.replace(b"(3,)", b"(3000000000000000,)").replace(b" " * 15 + b"\n", b"\n")
HEADER = '{"format": "atpatch-onnx debug set", "version": 1, "kind": "backdoor", "target": null}'


def write_entries(path, entries):
    """The same entries as an npz or as a folder: bytes by file name."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                if name == "debugset.json":
                    name, content = f"{name}.npy", npy(np.array(content.decode()))
                archive.writestr(name, content)
        return
    for name, content in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clean/x.npy": PICKLED}, "clean/x.*nothing pickled"),
        ({"clean/x.npy": b"\x80\x04."}, "clean/x.*nothing pickled"),
        ({"clean/x.npy": X[:-1]}, "clean/x.*complete debug set"),
        ({"clean/x.npy": X[:20]}, "clean/x.*complete debug set"),
        ({"clean/x.npy": b""}, "clean/x.*complete debug set"),
        ({"clean/x.npy": HUGE}, "clean/x.*complete debug set"),
        ({"clean/x.npy": npy(np.arange(4.0))}, r"counterfactual\['x'\]: expected float64 \[4\]"),
        ({"clean/x.npy": npy(np.array([0, np.nan, 0]))}, r"clean\['x'\]: .*row 1"),
        ({"clean/x.npy": npy(np.array([(1, 2)] * 3, dtype="i4,i4"))}, r"clean\['x'\]: .*array of numbers"),
        ({"clean/y.npy": X}, "counterfactual: expected the inputs of the clean side"),
        ({"label.npy": X}, "clean/<input>.*found 'label'"),
        ({"labels.npy": npy(np.array([0.5, 1, 2]))}, "labels: .*0.5"),
        ({"suspects.npy": npy(np.array("auto"))}, "suspects: .*dtype <U4"),
        ({"sensitive.npy": npy(np.zeros(2))}, "sensitive: "),
        ({"debugset.json": b"{"}, r"debugset\.json: .*complete debug set"),
        ({"debugset.json": b"[" * 20000}, r"debugset\.json: .*complete debug set"),
        ({"debugset.json": b"[]"}, r"debugset\.json: .*another header"),
        ({"debugset.json": b'{"format": "other"}'}, r"debugset\.json: .*another header"),
        ({"debugset.json": HEADER.replace("1", "2").encode()}, "expected version 1; found version 2"),
        ({"debugset.json": HEADER.replace("backdoor", "trojan").encode()}, "kind 'trojan'"),
        ({"debugset.json": HEADER.replace("null", '"cat"').encode()}, "target 'cat'"),
        ({"debugset.json": HEADER.replace("null", "true").encode()}, "target True"),
        ({"debugset.json": HEADER.replace("null", "-1").encode()}, "target: .*-1"),
        ({"debugset.json": HEADER.replace("null", 'null, "found": 1').encode()}, "found 1"),
    ],
)
def test_damaged_and_foreign_content_is_refused(tmp_path, place, changes, match):
    entries = {"clean/x.npy": X, "counterfactual/x.npy": LATER, "debugset.json": HEADER.encode()}
    write_entries(tmp_path / place, entries)
    assert len(DebugSet.load(tmp_path / place)) == 3
    write_entries(tmp_path / place, entries | changes)
    refused(tmp_path / place, match)


@pytest.mark.parametrize("place", PLACES)
def test_both_sides_are_needed(tmp_path, place):
    write_entries(tmp_path / place, {"clean/x.npy": X})
    refused(tmp_path / place, "counterfactual/<input>; found 'clean/x'")


def test_nothing_there(tmp_path):
    refused(tmp_path / "none.npz", "found nothing there")
    refused(tmp_path, "found no arrays")


@pytest.mark.parametrize("content", [b"", b"not a zip", X, PICKLED, b"\x80\x04."])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "set.npz").write_bytes(content)
    refused(tmp_path / "set.npz", "nothing pickled; found BadZipFile")


def test_oddities_of_zip_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("clean/x.npy", X)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("clean/x.npy", LATER)
    refused(tmp_path / "twice.npz", "'clean/x' is there twice")
    write_entries(tmp_path / "long.npz", {"clean/x.npy": X + b"more"})
    refused(tmp_path / "long.npz", "more after the array")
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("debugset.json.npy", npy(np.zeros(2)))
    refused(tmp_path / "header.npz", r"debugset\.json: .*float64 \[2\]")


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    full().save(folder / "set.npz")
    full().save(folder / "set")
    return {name: (folder / name).read_bytes() for name in ("set.npz", "set/clean/x.npy", "set/debugset.json")}


@settings(deadline=None)  # files on a shared machine
@given(data=st.data())
@pytest.mark.parametrize("file", ["set.npz", "set/clean/x.npy", "set/debugset.json"])
def test_random_damage_is_refused_or_harmless(whole_files, file, data):
    content = bytearray(whole_files[file])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    with TemporaryDirectory() as folder:
        full().save(Path(folder) / "set")
        (Path(folder) / file).write_bytes(content)
        with contextlib.suppress(DebugSetError):
            DebugSet.load(Path(folder) / file.split("/")[0])


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_pairs_say_that_a_search_found_them(tmp_path, name):
    sides = {"x": np.zeros((3, 2))}, {"x": np.ones((3, 2))}
    made = DebugSet.from_pairs(*sides, found=True)
    assert made.take([0]).found
    made.save(tmp_path / name)
    assert DebugSet.load(tmp_path / name).found
    DebugSet.from_pairs(*sides).save(tmp_path / name)
    assert not DebugSet.load(tmp_path / name).found
