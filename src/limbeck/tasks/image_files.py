"""Images and their labels from a folder of folders, Parquet, or IDX files. Nothing is decoded yet.

IDX is MNIST's format: two zero bytes, the type (8: bytes), the number of dimensions, each dimension
as four bytes, the highest first, and then the values. http://yann.lecun.com/exdb/mnist
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError
from limbeck.recipe import DataSpec
from limbeck.tasks.tables import label_folders, named_label, require_columns

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_PARTS = {"train": ("train",), "test": ("t10k", "test")}  # how IDX files begin
_ALLOWED = (
    "a folder with one subfolder of images per label, a folder of IDX files "
    "(train-images-idx3-ubyte.gz and its labels), or a .parquet file"
)

Content = bytes | Path | np.ndarray  # encoded; a file; pixels (H, W) or (H, W, 3) uint8


@dataclass(frozen=True, slots=True)
class ImageTable:
    contents: Sequence[Content]
    names: Sequence[str]  # of each, for messages
    labels: list[str]
    groups: list[str] | None = None
    others: Sequence[str] = ()  # files that are no images by their names, passed over


def read_images(path: Path, spec: DataSpec, *, part: str) -> ImageTable:
    """`part` is 'train' or 'test': which of the IDX files in a folder are meant.

    Raises DataError for an unknown kind of source, one without images, or a label that is missing.
    """
    where = f"recipe.data.{part}"
    if path.is_dir():
        if spec.group is not None:
            raise DataError(
                where, "data.group has no effect on a folder of images",
                allowed="a Parquet file", fix="remove it",
            )  # fmt: skip
        idx = sorted(file for file in path.iterdir() if "-images-idx3" in file.name)
        found = _of_idx(_idx_pair(idx, part, where), spec, where) if idx else _of_folder(
            path, spec, where
        )
    elif path.suffix.lower() == ".parquet":
        found = _of_parquet(path, spec, where)
    elif "-images-idx3" in path.name:
        found = _of_idx(path, spec, where)
    else:
        raise DataError(
            where, f"{path.name} is of no known kind", allowed=_ALLOWED, fix="convert it"
        )
    if not found.labels:
        raise DataError(
            where, f"{path.name} holds no images", allowed=_ALLOWED, fix="name another"
        )
    return found


def _of_folder(path: Path, spec: DataSpec, where: str) -> ImageTable:
    contents: list[Content] = []
    labels: list[str] = []
    others: list[str] = []
    for folder in label_folders(path, where, _ALLOWED):
        there = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
        files = [f for f in there if f.suffix.lower() in SUFFIXES]
        others += [str(f.relative_to(path)) for f in there if f not in files]
        if not files:
            raise DataError(
                where, f"{folder} holds no image",
                allowed=f"files that end in {', '.join(SUFFIXES)}", fix="fill or remove it",
            )  # fmt: skip
        contents += files
        labels += [named_label(folder.name, spec, where)] * len(files)
    names = [str(file.relative_to(path)) for file in contents if isinstance(file, Path)]
    return ImageTable(contents, names, labels, others=others)


def _of_parquet(path: Path, spec: DataSpec, where: str) -> ImageTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [spec.image, spec.label, *([spec.group] if spec.group else [])]
    contents: list[Content] = []
    labels: list[str] = []
    groups: list[str] = []
    try:
        file = pq.ParquetFile(path)
        require_columns(wanted, file.schema_arrow.names, where)
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                at = f"{where}, row {len(labels) + 1}"
                contents.append(_bytes_of(row[spec.image], spec.image, at))
                labels.append(named_label(row[spec.label], spec, at))
                groups.append(str(row[spec.group]) if spec.group else "")
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            where, f"{path.name} is not readable as Parquet: {str(error).splitlines()[0]}",
            allowed="a whole Parquet file", fix="fetch or write it again",
        ) from None  # fmt: skip
    names = [f"row {i}" for i in range(1, len(labels) + 1)]
    return ImageTable(contents, names, labels, groups if spec.group else None)


def _bytes_of(value: Any, column: str, where: str) -> bytes:
    """As they are, or in the `bytes` of a hub data set's image."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        raise DataError(
            where, f"{column} holds {'nothing' if not value else type(value).__name__}",
            allowed="the bytes of an encoded image", fix="remove or mend the row",
        )  # fmt: skip
    return value


def _idx_pair(files: Sequence[Path], part: str, where: str) -> Path:
    """The images of this part; its labels lie beside them."""
    for start in _PARTS[part]:
        for file in files:
            if file.name.startswith(f"{start}-"):
                return file
    raise DataError(
        where, f"of IDX files only {', '.join(file.name for file in files)}",
        allowed=f"{_PARTS[part][0]}-images-idx3-ubyte.gz", fix="rename it, or name the file itself",
    )  # fmt: skip


def _of_idx(images: Path, spec: DataSpec, where: str) -> ImageTable:
    beside = images.with_name(images.name.replace("-images-idx3", "-labels-idx1"))
    if not beside.is_file():
        raise DataError(
            where, f"there is no {beside.name} beside {images.name}", allowed="both",
            fix="name the folder that holds both",
        )  # fmt: skip
    pixels, labels = read_idx(images, 3, where), read_idx(beside, 1, where)
    if len(pixels) != len(labels):
        raise DataError(
            where, f"{len(pixels):,} images and {len(labels):,} labels", allowed="as many of both",
            fix=f"find out which of {images.name} and {beside.name} is another's",
        )  # fmt: skip
    names = [f"image {i}" for i in range(1, len(labels) + 1)]
    return ImageTable(pixels, names, [named_label(int(n), spec, where) for n in labels])  # type: ignore[arg-type]


def read_idx(path: Path, dims: int, where: str) -> np.ndarray:
    """Bytes in so many dimensions. Raises DataError for a file that is not whole, or another."""

    def wrong(found: str) -> DataError:
        return DataError(
            where, f"{path.name} {found}", allowed=f"IDX with {dims} dimensions of bytes",
            fix="fetch it again",
        )  # fmt: skip

    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes([0, 0, 8, dims]):
                raise wrong(f"begins with {head[:4].hex(' ') or 'nothing'}")
            sizes = [int(n) for n in np.frombuffer(head[4:], ">u4")]
            count = math.prod(sizes)
            content = file.read(count + 1)  # no more than it says, whatever a packed file holds
    except (OSError, EOFError, zlib.error) as error:
        raise wrong(f"does not unpack: {error}") from None
    if len(content) != count:
        more = "more" if len(content) > count else f"{len(content):,}"
        raise wrong(f"says that it has {count:,} values, and has {more}")
    return np.frombuffer(content, np.uint8).reshape(sizes)
