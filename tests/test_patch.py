"""Patch files: the same patch is the same bytes, and nothing that is not a whole, sound patch is ever read as one."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.errors import PatchFileError
from atpatch_onnx.patches import file as patches
from atpatch_onnx.patches.patch import Detector, LayerEdit, Neutral, Patch, SitePatch


def example(seed: int = 0) -> Patch:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    hidden = Detector(normal(8, 3), normal(3), normal(3), threshold=-0.1)
    return Patch(
        base="sha256:0123",
        sites=(
            SitePatch(
                "layers.0", Detector(normal(8, 1), None, None, threshold=0.25), Neutral(normal(2, 4), normal(2, 5))
            ),
            SitePatch("layers.1", hidden, None),
            SitePatch("layers.2", None, Neutral(normal(1, 4), normal(1, 4))),
        ),
        figures={"asr": {"before": 0.97, "after": 0.004}, "meets_target": True, "seeds": [1, 2]},
        edits=(
            LayerEdit("layers.0.hidden", np.array([3, 7]), normal(2), normal(2)),
            LayerEdit("layers.2.hidden", np.array([0]), normal(1), normal(1)),
        ),
        after=("0123456789abcdef",),
    )


def file_of(patch: Patch) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The parts of a patch file, to be damaged."""
    raw = patch.to_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])["__metadata__"]["atpatch"]
    return dict(safetensors.numpy.load(raw)), json.loads(header)


def write(path: Path, tensors: dict[str, np.ndarray], header: object) -> Path:
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True)
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"atpatch": text}))
    return path


def same(first: Patch, second: Patch) -> bool:
    return first.to_bytes() == second.to_bytes()


def test_round_trip(tmp_path: Path) -> None:
    patch, path = example(), tmp_path / "fix.safetensors"
    patch.save(path)
    again = Patch.load(path)
    assert same(patch, again)
    assert again.id == patch.id
    assert again.base == patch.base
    assert again.figures == patch.figures
    assert [site.site for site in again.sites] == [site.site for site in patch.sites]
    assert again.after == patch.after
    for before, after in zip(patch.edits, again.edits, strict=True):
        assert before.layer == after.layer
        for name in ("units", "factor", "constant"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
    for old, new in zip(patch.sites, again.sites, strict=True):
        assert (old.detector is None, old.neutral is None) == (new.detector is None, new.neutral is None)
        if old.detector is not None and new.detector is not None:
            assert new.detector.is_linear == old.detector.is_linear
            assert new.detector.threshold == pytest.approx(old.detector.threshold, rel=2**-23)  # one float32 rounding
            for name in ("weights", "bias", "output"):
                assert np.array_equal(getattr(new.detector, name), getattr(old.detector, name))
        if old.neutral is not None and new.neutral is not None:
            assert np.array_equal(new.neutral.key, old.neutral.key)
            assert np.array_equal(new.neutral.value, old.neutral.value)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        example().save(tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = Patch.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_bytes_do_not_depend_on_the_order_of_figures_or_on_memory_layout() -> None:
    patch = example()
    figures = dict(reversed(list(patch.figures.items())))
    assert same(patch.with_figures(figures), patch)
    detector = patch.sites[0].detector
    assert detector is not None
    strided = replace(detector, weights=np.repeat(detector.weights, 2, axis=1)[:, ::2])
    assert same(replace(patch, sites=(replace(patch.sites[0], detector=strided), *patch.sites[1:])), patch)


@pytest.mark.parametrize(
    "changed",
    [
        example(1),
        replace(example(), base="sha256:4567"),
        example().with_figures({"asr": 1.0}),
        replace(example(), sites=example().sites[:2]),
        replace(example(), sites=(replace(example().sites[0], site="layers.9"), *example().sites[1:])),
        replace(example(), edits=example().edits[:1]),
        replace(example(), edits=(replace(example().edits[0], units=np.array([3, 8])), example().edits[1])),
        replace(example(), after=()),
        replace(example(), sites=(replace(example().sites[0], neutral=None), *example().sites[1:])),
    ],
    ids=[
        "numbers",
        "base",
        "figures",
        "sites",
        "name",
        "edits",
        "units",
        "after",
        "neutral",
    ],
)
def test_another_content_has_another_id(changed: Patch) -> None:
    assert changed.id != example().id


def test_a_patch_that_missed_its_target_says_so() -> None:
    assert example().meets_target
    assert not example().with_figures({"meets_target": False}).meets_target


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(PatchFileError, match="nothing there"):
        Patch.load(tmp_path / "none.safetensors")
    with pytest.raises(PatchFileError, match="nothing there"):
        Patch.load(tmp_path)
    with pytest.raises(PatchFileError, match="can be written"):
        example().save(tmp_path / "no" / "folder.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(PatchFileError, match="can be written"):
        example().save(tmp_path / "taken.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"], "nothing half-written is left"


def test_oversize_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(patches.MAX_BYTES + 1)  # sparse
    with pytest.raises(PatchFileError, match="at most"):
        Patch.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"not a patch, just text",
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        pickle.dumps({"weight": [1.0]}),
        pickle.dumps({"weight": [1.0]}, protocol=0),
        safetensors.numpy.save({"weight": np.zeros(3, np.float32)}),
        safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, metadata={"format": "pt"}),
    ],
    ids=["empty", "byte", "text", "ones", "length", "pickle", "pickle-0", "foreign", "foreign-metadata"],
)
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(PatchFileError):
        Patch.load(path)


def check_damaged(path: Path, raw: bytes) -> None:
    """A damaged file is refused, or it says the very same."""
    path.write_bytes(raw)
    try:
        loaded = Patch.load(path)
    except PatchFileError:
        return
    assert same(loaded, example())


RAW = example().to_bytes()
damage = settings(max_examples=300, deadline=None, derandomize=True)


@damage
@given(offset=st.integers(0, len(RAW) - 1), bit=st.integers(0, 7))
def test_flipped_bits(tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int) -> None:
    raw = bytearray(RAW)
    raw[offset] ^= 1 << bit
    check_damaged(tmp_path_factory.getbasetemp() / "flipped.safetensors", bytes(raw))


def test_every_bit_of_the_header(tmp_path: Path) -> None:
    size = 8 + int.from_bytes(RAW[:8], "little")
    for offset in range(size):
        raw = bytearray(RAW)
        raw[offset] ^= 1 << offset % 8
        check_damaged(tmp_path / "flipped.safetensors", bytes(raw))


@damage
@given(length=st.integers(0, len(RAW) - 1))
def test_cut_short(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(RAW[:length])
    with pytest.raises(PatchFileError):
        Patch.load(path)


def refused(tmp_path: Path, tensors: dict[str, np.ndarray], header: object) -> str:
    with pytest.raises(PatchFileError) as caught:
        Patch.load(write(tmp_path / "damaged.safetensors", tensors, header))
    return str(caught.value)


def test_other_schemas_are_named(tmp_path: Path) -> None:
    tensors, header = file_of(example())
    assert "found schema version 0" in refused(tmp_path, tensors, header | {"schema_version": 0})
    assert "found schema version 2" in refused(tmp_path, tensors, header | {"schema_version": 2})
    assert "schema version 1.5" in refused(tmp_path, tensors, header | {"schema_version": 1.5})


@pytest.mark.parametrize(
    "header",
    ["", "no json", "[]", "3", "null", '"text"', "{}", '{"schema_version": 1}', "[" * 100_000],
    ids=["empty", "text", "list", "number", "null", "string", "object", "only-schema", "deep"],
)
def test_metadata_that_is_no_header(tmp_path: Path, header: str) -> None:
    refused(tmp_path, file_of(example())[0], header)


@pytest.mark.parametrize("key", ["base", "sites", "figures", "id", "edits", "after"])
@pytest.mark.parametrize("value", [None, 3, "text", [], {}, [[]], [3], ["text"], [None], [{}]], ids=repr)
def test_header_entries_of_another_kind(tmp_path: Path, key: str, value: object) -> None:
    tensors, header = file_of(example())
    refused(tmp_path, tensors, header | {key: value})


@pytest.mark.parametrize("key", ["schema_version", "base", "sites", "figures", "id", "edits", "after"])
def test_header_entries_that_are_missing(tmp_path: Path, key: str) -> None:
    tensors, header = file_of(example())
    del header[key]
    refused(tmp_path, tensors, header)


@pytest.mark.parametrize("key", ["site", "detects", "redistributes"])
@pytest.mark.parametrize("value", [..., None, 3, "other", [], {}], ids=repr)
def test_site_entries_that_do_not_fit(tmp_path: Path, key: str, value: object) -> None:
    tensors, header = file_of(example())
    site = dict(header["sites"][0])  # type: ignore[index]
    if value is ...:
        del site[key]
    else:
        site[key] = value
    refused(tmp_path, tensors, header | {"sites": [site, *header["sites"][1:]]})  # type: ignore[misc]


@pytest.mark.parametrize("key", ["layer", "units"])
@pytest.mark.parametrize(
    "value", [..., None, 3, "other", [], {}, [7, 3], [3, 3], [-1, 3], [3.0, 7], [3, 2**70]], ids=repr
)
def test_entries_of_edits_that_do_not_fit(tmp_path: Path, key: str, value: object) -> None:
    tensors, header = file_of(example())
    edit = dict(header["edits"][0])  # type: ignore[index]
    if value is ...:
        del edit[key]
    else:
        edit[key] = value
    refused(tmp_path, tensors, header | {"edits": [edit, *header["edits"][1:]]})  # type: ignore[misc]


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    tensors, header = file_of(example())
    for name in tensors:
        assert name in refused(tmp_path, {key: tensor for key, tensor in tensors.items() if key != name}, header)
    assert "9/weights" in refused(tmp_path, tensors | {"9/weights": np.ones((8, 1), np.float32)}, header)


def test_a_site_that_does_nothing_is_none(tmp_path: Path) -> None:
    tensors, header = file_of(example())
    idle = header["sites"][0] | {"detects": None, "redistributes": False}  # type: ignore[index]
    of_others = {name: tensor for name, tensor in tensors.items() if not name.startswith("0/")}
    assert "detects=None and redistributes=False" in refused(
        tmp_path,
        of_others,
        header | {"sites": [idle, *header["sites"][1:]]},  # type: ignore[misc]
    )


def test_a_key_and_a_value_of_other_heads_are_refused(tmp_path: Path) -> None:
    tensors, header = file_of(example())
    assert "neutral_value" in refused(tmp_path, tensors | {"0/neutral_value": np.ones((3, 5), np.float32)}, header)


@pytest.mark.parametrize("name", sorted(file_of(example())[0]))
def test_wrong_shapes_types_and_values(tmp_path: Path, name: str) -> None:
    tensors, header = file_of(example())
    tensor = tensors[name]
    nan, infinite = tensor.copy(), tensor.copy()
    nan.flat[0], infinite.flat[-1] = np.nan, np.inf
    for damaged in (
        np.concatenate([tensor, tensor]),
        tensor[..., None],
        tensor.ravel()[:0],
        tensor.astype(np.float64),
        tensor.astype(np.float16),
        np.zeros((1, 1, 1, 1), np.float32),
        nan,
        infinite,
    ):
        refused(tmp_path, tensors | {name: damaged}, header)


def test_changed_numbers_do_not_match_the_id(tmp_path: Path) -> None:
    tensors, header = file_of(example())
    assert "id" in refused(tmp_path, tensors | {"0/threshold": np.array([0.3], np.float32)}, header)
    assert "id" in refused(tmp_path, tensors, header | {"figures": {"asr": 0.0}})


@given(seed=st.integers(0, 2**16), hidden=st.booleans())
def test_scores_are_those_of_a_naive_loop(seed: int, hidden: bool) -> None:
    """The reference of the graph's scores."""
    rng = np.random.default_rng(seed)
    units = 3 if hidden else 1
    weights, bias, output, keys = (rng.normal(size=shape) for shape in ((8, units), units, units, (2, 5, 8)))
    arrays = [array.astype(np.float32) for array in (weights, bias, output)]
    detector = Detector(arrays[0], *(arrays[1:] if hidden else (None, None)), threshold=0.0)
    found = detector.scores(keys)
    assert found.shape == (2, 5)
    for place in np.ndindex(2, 5):
        raw = [sum(keys[place][f] * float(arrays[0][f, unit]) for f in range(8)) for unit in range(units)]
        if hidden:
            raw = [sum(max(raw[unit] + float(arrays[1][unit]), 0) * float(arrays[2][unit]) for unit in range(units))]
        # float64 sums of eight products, in another order
        assert found[place] == pytest.approx(raw[0], rel=1e-12, abs=1e-12)
