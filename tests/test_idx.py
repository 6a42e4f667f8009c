"""The reader of Fashion-MNIST's files takes nothing on trust."""

import gzip

import numpy as np
import pytest

from samples import idx


def content(array, *, shape=None, code=0x08):
    shape = array.shape if shape is None else shape
    return bytes((0, 0, code, len(shape))) + np.array(shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(content(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content(labels)))
    return tmp_path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_reads_plain_and_gzipped_files_whatever_their_name(tmp_path, pack):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "values"
    path.write_bytes(pack(content(array)))
    np.testing.assert_array_equal(idx.read_idx(path), array)


def test_loads_both_parts_in_the_model_s_format(folder):
    train, test = idx.load_fashion(folder)
    assert (train.images.shape, test.images.shape) == ((6, 1, 28, 28), (3, 1, 28, 28))
    assert train.images.dtype == np.float32
    raw = idx.read_idx(folder / "train-images-idx3-ubyte")
    np.testing.assert_array_equal(train.images[:, 0], raw.astype(np.float32) / 255)
    np.testing.assert_array_equal(test.labels, np.arange(3, dtype=np.int64))
    assert test.labels.dtype == np.int64


FIVE = np.arange(5, dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "nothing"),
        (b"\0\0\x08", "00 00 08"),
        (b"PK\3\4" + bytes(20), "50 4b 03 04"),
        (content(FIVE, code=0x0D), "00 00 0d 01"),  # float32
        (bytes((0, 0, 8, 0)), "00 00 08 00"),
        (content(FIVE, shape=(1, 1, 1, 5)), "00 00 08 04"),
        (bytes((0, 0, 8, 2)) + bytes(7), "cut short"),
        (content(FIVE, shape=(6,)), "5 values where the header announces 6"),
        (content(FIVE, shape=(4,)), "more values where the header announces 4"),
        (content(FIVE, shape=(2**32 - 1,) * 3), "announces 79228162458924105385300197375 values"),
        (gzip.compress(content(FIVE), mtime=0)[:-12], "end-of-stream"),
        (gzip.compress(content(FIVE), mtime=0)[:12] + bytes(20), "cannot be read"),
    ],
)
def test_refuses_what_is_no_idx_file(tmp_path, data, found):
    path = tmp_path / "values"
    path.write_bytes(data)
    with pytest.raises(idx.DataFileError, match=found) as raised:
        idx.read_idx(path)
    assert raised.value.where == str(path)


def test_reads_no_more_than_announced_and_one_byte(tmp_path, monkeypatch):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(content(FIVE) + bytes(50_000_000)))
    asked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or read(self, size))
    with pytest.raises(idx.DataFileError, match="more values"):
        idx.read_idx(path)
    assert asked == [4, 4, 6]


def test_names_a_missing_file_and_what_to_do(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(idx.DataFileError, match=r"t10k-labels-idx1-ubyte: .*--data"):
        idx.load_fashion(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("labels-idx1", np.arange(5, dtype=np.uint8)),  # one image has no label
        ("labels-idx1", np.full(6, 10, np.uint8)),
        ("images-idx3", np.zeros((6, 28, 27), np.uint8)),
        ("images-idx3", np.zeros((6, 784), np.uint8)),
    ],
)
def test_refuses_files_that_do_not_fit_each_other(folder, name, array):
    (folder / f"train-{name}-ubyte").write_bytes(content(array))
    with pytest.raises(idx.DataFileError, match="28 x 28"):
        idx.load_fashion(folder)


def test_refuses_an_empty_data_set(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(content(np.zeros(0, np.uint8)))
    (folder / "train-images-idx3-ubyte").write_bytes(content(np.zeros((0, 28, 28), np.uint8)))
    with pytest.raises(idx.DataFileError):
        idx.load_fashion(folder)


@pytest.mark.skipif(not idx.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_reads_debian_s_files():
    train, test = idx.load_fashion()
    assert (train.images.shape, test.images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert set(np.bincount(train.labels)) == {6_000}
