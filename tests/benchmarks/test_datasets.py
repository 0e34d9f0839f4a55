"""The benchmarks' data: CURVES is what its definition says, and damaged files are told from good ones."""

import gzip
import struct

import numpy as np
import pytest
import torch

from benchmarks.train import datasets as data

# ---- CURVES


def test_curves_shape_range_and_split():
    d = data.curves(200)
    assert d.train.shape == (180, 784) and d.test.shape == (20, 784) and d.image_shape == (1, 28, 28)
    assert d.train.dtype == torch.float32
    assert d.train.min() == 0 and d.train.max() == 1
    grey = ((d.train > 0) & (d.train < 1)).float().mean()
    assert grey > 0.01  # the strokes have soft edges


def test_curves_are_the_same_every_time_and_other_ones_for_another_seed():
    assert torch.equal(data.curves(30).train, data.curves(30).train)
    assert not torch.equal(data.curves(30, seed=1).train, data.curves(30).train)


def test_more_curves_begin_with_the_same_ones():
    assert torch.equal(data.curves(40).train[:20], data.curves(30).train[:20])


def test_curves_pass_through_their_three_points():
    n = 200
    points = data.curve_points(n)
    paths = data.curve_paths(points)
    gaps = torch.cdist(points, paths).amin(2)  # (n, 3)
    assert gaps.max() < 0.7  # between two evaluated points of the curve
    images = data.draw_curves(paths).reshape(n, 28, 28)
    column, row = points.round().long().unbind(2)
    assert images[torch.arange(n)[:, None], row, column].min() > 0.5


def test_curves_are_thin_connected_strokes():
    images = data.curves(200).train.reshape(-1, 28, 28) > 0.5
    ink = images.float().mean((1, 2))
    assert 0.005 < ink.min() and ink.max() < 0.25
    label = pytest.importorskip("scipy.ndimage").label
    assert all(label(image, np.ones((3, 3)))[1] == 1 for image in images.numpy())


def test_curves_of_coinciding_points_are_finite():
    points = torch.full((3, 3, 2), 14.0)
    points[1, 2] = 20.0  # the first two coincide
    points[2, 0] = 20.0  # the last two
    images = data.draw_curves(data.curve_paths(points))
    assert images.isfinite().all() and (images.amax(1) == 1).all()


def test_too_few_curves_is_an_error():
    with pytest.raises(ValueError, match="n should be at least 10"):
        data.curves(9)


# ---- MNIST


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    head = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_dir(tmp_path):
    """Seven training and three test images, all four files plain."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 7), ("t10k", 3)):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(n)))
    return tmp_path


def test_mnist_reads_plain_files(mnist_dir):
    d = data.mnist(mnist_dir)
    assert d.train.shape == (7, 784) and d.test.shape == (3, 784)
    assert d.train_labels.tolist() == list(range(7))
    expected = np.random.default_rng(0).integers(0, 256, (7, 28, 28)).reshape(7, 784)
    assert np.array_equal(d.train.numpy(), expected)
    floats = data.pixels(d.train)
    assert floats.dtype == torch.float32 and floats.max() <= 1


@pytest.mark.parametrize("dot", "-.")
def test_mnist_reads_gzipped_files_of_either_name(mnist_dir, dot):
    plain = data.mnist(mnist_dir)
    for path in list(mnist_dir.iterdir()):
        new = path.name.replace("-idx", f"{dot}idx") + ".gz"
        (mnist_dir / new).write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert torch.equal(data.mnist(mnist_dir).train, plain.train)


def truncate(content: bytes) -> bytes:
    return content[:-1]


DAMAGES = {
    "truncated": (truncate, "truncated: its header announces 7 x 28 x 28"),
    "too long": (lambda c: c + b"x", "too long"),
    "bad magic": (lambda c: b"\x00\x00\x0d" + c[3:], "magic number 0x00000803 but has"),
    "a web page": (lambda c: b"<!DOCTYPE html><html></html>", "magic number"),
    "no header": (lambda c: c[:10], "truncated: 10 bytes"),
    "empty": (lambda c: b"", "truncated: 0 bytes"),
    "other images": (lambda c: idx(np.zeros((7, 8, 8))), "28 x 28"),
    "other count": (lambda c: idx(np.zeros((6, 28, 28))), "7 labels"),
    "no images": (lambda c: idx(np.zeros((0, 28, 28))), "holds no images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_mnist_names_the_damaged_file(mnist_dir, damage):
    change, message = DAMAGES[damage]
    path = mnist_dir / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(data.DataError, match=message) as caught:
        data.mnist(mnist_dir)
    assert "train-" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "not gzip", "flipped"])
def test_mnist_damaged_gzip(mnist_dir, damage):
    path = mnist_dir / "t10k-labels-idx1-ubyte"
    packed = bytearray(gzip.compress(path.read_bytes()))
    if damage == "flipped":
        packed[-6] ^= 0xFF  # in the checksum
    content = {"cut": packed[:-9], "not gzip": b"<html>", "flipped": packed}[damage]
    path.with_name(path.name + ".gz").write_bytes(bytes(content))
    path.unlink()
    with pytest.raises(data.DataError, match=r"t10k-labels-idx1-ubyte\.gz is damaged.*Fetch it again"):
        data.mnist(mnist_dir)


def test_mnist_missing_file_and_folder(mnist_dir):
    (mnist_dir / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(data.DataError, match=r"t10k images file is missing in .*t10k-images-idx3-ubyte\.gz.*Put"):
        data.mnist(mnist_dir)
    with pytest.raises(data.DataError, match="is not a folder"):
        data.mnist(mnist_dir / "nowhere")


# ---- CIFAR, digits


@pytest.fixture
def cifar_dir(tmp_path):
    """Four records a file."""
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        table = rng.integers(0, 256, (4, 3073))
        table[:, 0] = [0, 9, 3, 3]
        (tmp_path / f"{name}.bin").write_bytes(table.astype(np.uint8).tobytes())
    return tmp_path


def test_cifar_reads_the_binary_version(cifar_dir):
    d = data.cifar10(cifar_dir, records=4)
    assert d.train.shape == (20, 3072) and d.test.shape == (4, 3072) and d.image_shape == (3, 32, 32)
    assert d.train_labels.tolist() == [0, 9, 3, 3] * 5
    raw = (cifar_dir / "data_batch_2.bin").read_bytes()
    assert d.train[4].tolist() == list(raw[1:3073])


def test_cifar_reads_the_folder_that_the_archive_unpacks_to(cifar_dir):
    inner = cifar_dir / "cifar-10-batches-bin"
    inner.mkdir()
    for path in cifar_dir.glob("*.bin"):
        path.rename(inner / path.name)
    assert data.cifar10(cifar_dir, records=4).train.shape == (20, 3072)


def test_cifar_damaged_and_missing_files(cifar_dir):
    with pytest.raises(data.DataError, match=r"data_batch_1\.bin should have 30730000 bytes .* but has 12292"):
        data.cifar10(cifar_dir)
    path = cifar_dir / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(data.DataError, match=r"test_batch\.bin .*truncated"):
        data.cifar10(cifar_dir, records=4)
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(data.DataError, match=r"test_batch\.bin is damaged: label 10"):
        data.cifar10(cifar_dir, records=4)
    path.unlink()
    with pytest.raises(data.DataError, match=r"missing in .*test_batch\.bin.*Unpack"):
        data.cifar10(cifar_dir, records=4)


def test_digits():
    pytest.importorskip("sklearn")
    d = data.digits()
    assert d.train.shape == (1500, 64) and d.test.shape == (297, 64)
    assert d.train.min() == 0 and d.train.max() == 1
    assert set(d.train_labels.tolist()) == set(range(10))
