"""From an encoded image to the pixels that a model gets, in a few steps that a recipe sets.

Pixels are uint8 (S, S, C). Pillow (extra 'images') decodes and resizes; arrays of the right size
need nothing.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import DataError, MissingExtraError
from limbeck.recipe_task import AugmentSpec, ImageTask
from limbeck.tasks.image_files import Content

PREPROCESSING = "preprocessing.json"  # beside a model

# What Pillow may take a file for: none of these starts another program or follows a link.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
_MOST_PIXELS = 80_000_000  # of an encoded image: a camera has 50, a bomb thousands of millions
_MODES = {"grey": "L", "rgb": "RGB"}
_EIGHT_BITS = {"1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_CALLED = {"L": "grey", "RGB": "colour", "P": "palette", "RGBA": "colour and transparency",
           "LA": "grey and transparency", "1": "black and white"}  # fmt: skip


class Unreadable(Exception):
    """A damaged image, and why."""


def pixels_of(content: Content, task: ImageTask, where: str) -> tuple[np.ndarray, bool]:
    """Pixels (S, S, C) uint8, and whether other channels had to be converted.

    Raises Unreadable for a damaged image or one too large to be meant, DataError for one of other
    channels than the task's.
    """
    if isinstance(content, np.ndarray) and content.shape == (task.size, task.size):
        if task.channels == "grey":
            return content[..., None], False
        if task.convert:
            return np.repeat(content[..., None], 3, axis=2), True
    Image, ImageOps = _pillow(where)
    try:
        image = _opened(Image, content)
        if image.width * image.height > _MOST_PIXELS:
            found = f"{image.width:,} x {image.height:,} pixels, more than {_MOST_PIXELS:,}"
            raise Unreadable(found)
        image.load()
        image = ImageOps.exif_transpose(image)  # as the camera was held
    except Unreadable:
        raise
    except Exception as error:  # each format has its own
        said = (str(error).splitlines() or [repr(error)])[0][:120]
        raise Unreadable(re.sub(r" <_io\.[^>]*>", "", said)) from None  # an address in memory
    converted = image.mode != _MODES[task.channels]
    if converted:
        image = _converted(Image, image, task, where)
    return _sized(Image, image, task), converted


def _opened(Image: Any, content: Content) -> Any:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    encoded = content if isinstance(content, bytes) else content.read_bytes()
    return Image.open(io.BytesIO(encoded), formats=_FORMATS)


def _converted(Image: Any, image: Any, task: ImageTask, where: str) -> Any:
    wanted = _MODES[task.channels]
    if image.mode not in _EIGHT_BITS:
        raise DataError(
            where, f"its pixels are of mode {image.mode}, not bytes", allowed="8 bits a channel",
            fix="convert it: its range of values is not known here",
        )  # fmt: skip
    if not task.convert:
        raise DataError(
            where, f"an image of {_CALLED.get(image.mode, image.mode)}",
            allowed=f"{_CALLED[wanted]}, as task.channels: {task.channels} says",
            fix="set task.convert: true, or convert it",
        )  # fmt: skip
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(opaque, image)
    return image.convert(wanted)


def _sized(Image: Any, image: Any, task: ImageTask) -> np.ndarray:
    width, height, size = image.width, image.height, task.size
    if (width, height) != (size, size):
        box = None
        if task.fit == "crop":
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).reshape(size, size, task.num_channels)


def _pillow(where: str) -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtraError.of(where, "images") from None
    return Image, ImageOps


def drawn(spec: AugmentSpec, seed: int, example: int, view: int) -> tuple[int, int, int]:
    """(flipped, moved down, moved right) of a view: a pure function of these."""
    if view == 0:
        return 0, 0, 0
    random = np.random.Generator(np.random.Philox(key=[seed * 2**32 + view, example]))
    flip = int(random.integers(2)) if spec.flip else 0
    down, right = random.integers(-spec.shift, spec.shift + 1, 2) if spec.shift else (0, 0)
    return flip, int(down), int(right)


def partner(alpha: float, seed: int, example: int, view: int, count: int) -> tuple[int, float]:
    """Which of `count` training images a view is mixed with, and that one's share: a pure function
    of these (mixup, Zhang et al. 2018, arXiv:1710.09412; the larger share is the example's own)."""
    if view == 0:
        return 0, 0.0
    random = np.random.Generator(np.random.Philox(key=[seed * 2**32 + 2**31 + view, example]))
    share = float(random.beta(alpha, alpha))
    return int(random.integers(count)), min(share, 1 - share)


def augmented(pixels: np.ndarray, draws: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Pixels (B, S, S, C) with each image's own draw applied; a copy."""
    size = pixels.shape[1]
    result = np.zeros_like(pixels)
    for image, out, (flip, down, right) in zip(pixels, result, draws, strict=True):
        source = image[:, ::-1] if flip else image
        rows, columns = slice(max(0, -down), size - max(0, down)), slice(
            max(0, -right), size - max(0, right)
        )
        out[max(0, down) : size + min(0, down), max(0, right) : size + min(0, right)] = source[
            rows, columns
        ]
    return result


def tensor_of(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, S, S, C) uint8 -> (B, C, S, S) float32, channels last in memory: convolutions are faster
    so."""
    values = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float()
    shift, scale = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
    return values.div_(255).sub_(shift).div_(scale)


def transform(task: ImageTask) -> dict[str, Any]:
    """All that lies between an image and a model's inputs, as `preprocessing.json` says it."""
    n = task.num_channels
    return {
        "size": task.size, "fit": task.fit, "channels": task.channels,
        "mean": list(task.mean or (0.5,) * n), "std": list(task.std or (0.5,) * n),
    }  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    """An image file of (S, S, C) uint8, grey or colour (PNG specification, sec. 5 and 9)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width, channels = pixels.shape
    colour = {1: 0, 3: 2}[channels]
    head = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)
    unfiltered = np.concatenate(
        [np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1
    )  # a byte before each row says how it is filtered
    packed = zlib.compress(unfiltered.tobytes(), 9)
    chunks = ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def reduced(pixels: np.ndarray, most: int) -> np.ndarray:
    """(S, S, C) uint8 to at most `most` pixels a side, by means of whole blocks."""
    block = -(-pixels.shape[0] // most)
    size = pixels.shape[0] // block
    cut = pixels[: size * block, : size * block]
    blocks = cut.reshape(size, block, size, block, -1)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def inputs_of(image: Path, preprocessing: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A file as a model's inputs, batch of one. Raises DataError for what is no image."""
    task = ImageTask.model_validate(
        {**preprocessing, "kind": "image-classification", "convert": True}
    )
    if not image.is_file():
        raise DataError(str(image), "no such file", allowed="an image", fix="check the path")
    try:
        pixels, _ = pixels_of(image, task, str(image))
    except Unreadable as error:
        raise DataError(
            str(image), f"does not decode: {error}", allowed="an image file", fix="check it"
        ) from None
    values = tensor_of(pixels[None], preprocessing["mean"], preprocessing["std"])
    return {"pixel_values": values.contiguous().numpy()}
