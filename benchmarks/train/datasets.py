"""The benchmarks' data: CURVES (generated here), MNIST (IDX files), CIFAR-10 (binary files), digits.

Nothing is downloaded: MNIST and CIFAR-10 are read from a folder that the user names, and every file that is
missing or damaged is a `DataError` that says which file, what is wrong with it and what to do.

`curves` follows the published definition of the CURVES data set (Hinton & Salakhutdinov, "Reducing the
dimensionality of data with neural networks", 2006): grey images of smooth curves through three random points
of the plane, so that six numbers describe an image, and a code of six can in principle be exact.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE = 28  # pixels
MARGIN = 3.0  # the three points keep this many pixels from the image's border
RADIUS = 1.0  # half the stroke's width before anti-aliasing, in pixels
SAMPLES = 96  # points at which a curve is evaluated; consecutive ones are at most about a pixel apart


class DataError(RuntimeError):
    """A data file is missing, damaged or of another kind than its name says."""


@dataclass(frozen=True)
class Dataset:
    """Images as rows of pixels, (n, channels*height*width): floats in [0, 1] or bytes, see `pixels`; or text."""

    name: str
    train: Tensor
    test: Tensor
    image_shape: tuple[int, int, int]  # channels, height, width
    train_labels: Tensor | None = None  # (n,), or (n, time) of text: int64
    test_labels: Tensor | None = None


def pixels(images: Tensor) -> Tensor:
    """Pixel values as floats in [0, 1]. Large data sets stay bytes, a quarter of the memory, until used."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


# ---- CURVES


def curve_points(n: int, seed: int = 0) -> Tensor:
    """Three points (x, y) per curve, uniform in the image without its margin; (n, 3, 2), in pixels."""
    points = np.random.default_rng(seed).uniform(MARGIN, SIDE - 1 - MARGIN, size=(n, 3, 2))
    return torch.from_numpy(points.astype(np.float32))


def curve_paths(points: Tensor, samples: int = SAMPLES) -> Tensor:
    """Parabolas through the three points; (n, 3, 2) -> (n, samples, 2).

    The middle point is passed at the time that the chords' lengths suggest: with a fixed time of one half, a
    middle point near one end makes the curve swing far out of the image.
    """
    first = (points[:, 1] - points[:, 0]).norm(dim=1)
    second = (points[:, 2] - points[:, 1]).norm(dim=1)
    middle = (first / (first + second).clamp_min(1e-6)).clamp(0.05, 0.95)[:, None]
    t = torch.linspace(0, 1, samples)[None, :]
    # Lagrange's polynomials for the times 0, middle, 1: each is one at its own time, zero at the other two.
    basis = torch.stack(
        [
            (t - middle) * (t - 1) / middle,
            t * (t - 1) / (middle * (middle - 1)),
            t * (t - middle) / (1 - middle),
        ],
        dim=2,
    )
    return basis @ points


def draw_curves(paths: Tensor) -> Tensor:
    """A stroke of soft edge along each path: (n, samples, 2) -> (n, SIDE*SIDE), pixel values in [0, 1]."""
    axis = torch.arange(SIDE, dtype=paths.dtype)
    images = torch.empty(len(paths), SIDE * SIDE)
    for start in range(0, len(paths), 100):  # few enough at a time to stay in the cache
        part = paths[start : start + 100]
        dx = (part[:, :, 0, None] - axis).square()  # (b, samples, SIDE)
        dy = (part[:, :, 1, None] - axis).square()
        nearest = torch.full((len(part), SIDE, SIDE), math.inf)
        for s in range(part.shape[1]):
            torch.minimum(nearest, dy[:, s, :, None] + dx[:, s, None, :], out=nearest)
        images[start : start + len(part)] = (RADIUS + 0.5 - nearest.sqrt()).clamp(0, 1).reshape(len(part), -1)
    return images


def curves(n: int = 20_000, seed: int = 0) -> Dataset:
    """CURVES: the first nine tenths are for training (18,000 of 20,000), the rest for the test."""
    if n < 10:
        raise ValueError(f"n should be at least 10, so that there is a test image, but is: {n}")
    images = draw_curves(curve_paths(curve_points(n, seed)))
    cut = n * 9 // 10
    return Dataset("curves", images[:cut], images[cut:], (1, SIDE, SIDE))


# ---- MNIST


def read_file(path: Path) -> bytes:
    """The file's bytes, unpacked if its name ends in .gz."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: it cannot be unpacked ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of bytes with so many dimensions: 0, 0, type 8, their number; the sizes; the values."""
    data = read_file(path)
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"{path} is truncated: {len(data)} bytes do not hold its header. Fetch it again.")
    magic, expected = struct.unpack(">I", data[:4])[0], 0x0800 + dimensions
    if magic != expected:
        raise DataError(
            f"{path} should be an IDX file with magic number {expected:#010x} but has {magic:#010x}. "
            "Fetch it again, and check that it was not renamed or saved as a web page."
        )
    sizes = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(sizes):
        state = "truncated" if len(data) - header < math.prod(sizes) else "too long"
        raise DataError(
            f"{path} is {state}: its header announces {' x '.join(map(str, sizes))} values but "
            f"{len(data) - header} follow. Fetch it again."
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).copy()).reshape(sizes)


def find(folder: Path, names: list[str], what: str, remedy: str) -> Path:
    """The first of the names that is a file in the folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder, but {what} should be in it. {remedy}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{what} is missing in {folder}: none of {', '.join(names)} is there. {remedy}")


def mnist(data_dir: str | Path) -> Dataset:
    """MNIST, or a data set of the same form, from its four IDX files, plain or gzipped."""
    remedy = "Put the four IDX files of MNIST there (train and t10k, images and labels; .gz or unpacked)."
    parts: dict[str, Tensor] = {}
    for split in ("train", "t10k"):
        for kind, dimensions in (("images", 3), ("labels", 1)):
            stems = [f"{split}-{kind}{dot}idx{dimensions}-ubyte" for dot in "-."]
            names = [stem + suffix for stem in stems for suffix in ("", ".gz")]
            path = find(Path(data_dir), names, f"MNIST's {split} {kind} file", remedy)
            parts[split + kind] = values = read_idx(path, dimensions)
            if kind == "images" and tuple(values.shape[1:]) != (SIDE, SIDE):
                raise DataError(f"{path} should hold images of {SIDE} x {SIDE} but holds {tuple(values.shape[1:])}.")
            if len(values) == 0:
                raise DataError(f"{path} holds no {kind}. {remedy}")
            if kind == "labels" and len(values) != len(parts[split + "images"]):
                raise DataError(
                    f"{path} holds {len(values)} labels, but the images beside it are "
                    f"{len(parts[split + 'images'])}: the two files are of different data sets. {remedy}"
                )
    return Dataset(
        "mnist",
        parts["trainimages"].reshape(-1, SIDE * SIDE),
        parts["t10kimages"].reshape(-1, SIDE * SIDE),
        (1, SIDE, SIDE),
        parts["trainlabels"].long(),
        parts["t10klabels"].long(),
    )


# ---- digits, CIFAR


def digits() -> Dataset:
    """scikit-learn's 1,797 real digits of 8×8 pixels: 1,500 for training, in an order drawn once for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("The digits come with scikit-learn, which is missing. pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs = torch.from_numpy((images[order] / 16).astype(np.float32))
    targets = torch.from_numpy(labels[order].astype(np.int64))
    return Dataset("digits", inputs[:1500], inputs[1500:], (1, 8, 8), targets[:1500], targets[1500:])


def read_cifar(path: Path, records: int) -> tuple[Tensor, Tensor]:
    """A file of CIFAR-10's binary version, label and 3,072 pixels -> (records, 3072), (records,)."""
    data = read_file(path)
    if len(data) != records * 3073:
        raise DataError(
            f"{path} should have {records * 3073} bytes ({records} records of 3073) but has {len(data)}: "
            "it is truncated or another file. Unpack cifar-10-binary.tar.gz again."
        )
    table = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).reshape(records, 3073)
    labels = table[:, 0].long()
    if labels.max() > 9:
        raise DataError(
            f"{path} is damaged: label {int(labels.max())} in it, where CIFAR-10 has 0 to 9. Unpack it again."
        )
    return table[:, 1:].contiguous(), labels


def cifar10(data_dir: str | Path, records: int = 10_000) -> Dataset:
    """CIFAR-10 from the binary version's six files, in `data_dir` or the folder that its archive unpacks to.

    The pickled "python version" is not read: unpickling runs whatever code the file holds.
    """
    folder = Path(data_dir)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    remedy = "Unpack cifar-10-binary.tar.gz there (the pickled version is not read, for safety)."
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    parts = [read_cifar(find(folder, [name], "A file of CIFAR-10", remedy), records) for name in names]
    train, labels = (torch.cat([part[i] for part in parts[:5]]) for i in (0, 1))
    return Dataset("cifar10", train, parts[5][0], (3, 32, 32), labels, parts[5][1])


# ---- Text that comes with Python


def topics(context: int = 128, stride: int = 64) -> Dataset:
    """The help texts of Python's own language reference, as bytes: windows and the bytes that follow theirs.

    (n, context) each, starting every `stride` bytes; the last twentieth of the text is for testing.
    """
    from pydoc_data.topics import topics as texts

    whole = torch.frombuffer(bytearray("\n".join(texts[name] for name in sorted(texts)).encode()), dtype=torch.uint8)
    cut = len(whole) - len(whole) // 20
    train, test = (part.unfold(0, context + 1, stride) for part in (whole[:cut], whole[cut:]))
    labels = [windows[:, 1:].long() for windows in (train, test)]
    return Dataset("topics", train[:, :-1], test[:, :-1], (1, 1, context), *labels)
