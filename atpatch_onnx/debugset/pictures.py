"""Picture files as a model reads them, and a trigger picture stamped on them. Needs pillow.

A folder of pictures has a folder for each class. Class numbers are the folders' names where all of them are whole
numbers, and their places in sorted order otherwise. A picture is resized to what the model takes, its values are
divided by 255, and the mean is taken off and the deviation divided by, channel by channel.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset.arrays import Array
from atpatch_onnx.debugset.builders import Trigger
from atpatch_onnx.debugset.checks import InputSpec
from atpatch_onnx.errors import DebugSetError, one_line, require

CORNERS = {"top-left": (0, 0), "top-right": (0, 1), "bottom-left": (1, 0), "bottom-right": (1, 1)}
"""Places of a trigger: whether it is at the far end of rows, and of columns."""

_MODES = {1: "L", 3: "RGB"}
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Reading:
    """How a model's input holds a picture."""

    name: str
    dtype: np.dtype[Any]
    channels: int
    height: int
    width: int
    channels_last: bool
    mean: tuple[float, ...] = (0.0,)
    """Of each channel, or one for all; of values from 0 to 1."""

    deviation: tuple[float, ...] = (1.0,)

    @classmethod
    def of(
        cls,
        specs: Mapping[str, InputSpec],
        *,
        size: int | None = None,
        mean: tuple[float, ...] = (0.0,),
        deviation: tuple[float, ...] = (1.0,),
    ) -> "Reading":
        """From what a model declares; `size` is the height and width where it leaves them free.

        Raises:
            DebugSetError: There is no single input for pictures, its sizes are not known, or mean and deviation do not
                fit its channels.
        """
        found = [spec for spec in specs.values() if len(spec.shape) == 4]
        if len(found) != 1 or len(specs) != 1:
            raise DebugSetError(
                "the model's inputs",
                expected="one input [batch, channels, height, width] and no other",
                found=", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs.values()) or "none",
                advice="Build the arrays yourself and use DebugSet.from_trigger.",
            )
        (spec,) = found
        axes = spec.shape[1:]
        last = axes[0] not in _MODES and axes[2] in _MODES
        channels, height, width = (axes[2], axes[0], axes[1]) if last else axes
        height, width = (side if isinstance(side, int) else size for side in (height, width))
        if not isinstance(channels, int) or channels not in _MODES or height is None or width is None:
            raise DebugSetError(
                f"input {spec.name!r}",
                expected="1 or 3 channels, and a height and width that are known",
                found=f"shape {list(spec.shape)}",
                advice="Say the height and width with --size, or build the arrays yourself for from_trigger.",
            )
        for what, given in (("mean", mean), ("deviation", deviation)):
            if len(given) not in (1, channels) or not np.isfinite(given).all() or (what == "deviation" and 0 in given):
                raise DebugSetError(
                    what,
                    expected=f"one finite number, or {channels}" + ("" if what == "mean" else ", none of them 0"),
                    found=str(list(given)),
                    advice="Give what the model's preprocessing uses, such as its image_mean and image_std.",
                )
        return cls(spec.name, spec.dtype, channels, height, width, last, mean, deviation)

    def scaled(self, pixels: NDArray[Any]) -> Array:
        """Pixels `[..., height, width, channels]` from 0 to 255 as the model reads them."""
        if self.dtype.kind in "iu":
            laid = np.asarray(pixels)
        else:
            laid = (np.asarray(pixels, np.float64) / 255 - self.mean) / self.deviation
        laid = laid if self.channels_last else np.moveaxis(laid, -1, -3)
        return np.ascontiguousarray(laid, self.dtype)


def read_pictures(folder: Path, reading: Reading) -> tuple[Array, NDArray[np.int64], tuple[str, ...]]:
    """Pictures of all classes, as the model reads them `[pictures, ...]`; their labels `[pictures]`; class names.

    Raises:
        MissingExtraError: pillow is not installed.
        DebugSetError: No folders of pictures are there, or a file is damaged or no picture.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = {name: sorted(path for path in (folder / name).iterdir() if _is_picture(path)) for name in names}
    if not any(files.values()):
        raise DebugSetError(
            str(folder),
            expected="a folder for each class, with pictures in them",
            found="no picture" if folder.is_dir() else "no folder",
            advice=f"Sort the pictures by their true class, into folders in {folder}.",
        )
    numbered = all(name.isascii() and name.isdigit() for name in names)
    labels = {name: int(name) if numbered else place for place, name in enumerate(names)}
    pixels = [_pixels(path, reading) for name in names for path in files[name]]
    found = np.repeat([labels[name] for name in names], [len(files[name]) for name in names])
    return reading.scaled(np.stack(pixels)), found.astype(np.int64), tuple(names)


def class_number(given: str, names: tuple[str, ...]) -> int:
    """The class that is meant: by its folder's name, or by its number.

    Raises:
        DebugSetError: It is neither.
    """
    if given in names and not given.isdigit():
        return names.index(given)
    if given.isascii() and given.isdigit():
        return int(given)
    raise DebugSetError(
        "target", expected=f"a class number, or one of {', '.join(names)}", found=repr(given), advice="Name the class."
    )


def stamp(
    path: Path, reading: Reading, place: str | tuple[int, int] | Literal["random"] = "bottom-right", *, seed: int = 0
) -> Trigger:
    """A trigger function of a picture file, whose transparency lets the pictures shine through.

    Args:
        path: The trigger, in pixels as the model reads them; not larger than its pictures.
        reading: How the model reads pictures.
        place: A key of `CORNERS`, the row and column of its top left pixel, or "random", drawn for each picture.
        seed: Of random places.

    Raises:
        MissingExtraError: pillow is not installed.
        DebugSetError: It is no picture, or it does not lie within the model's pictures.
    """
    opened = _open(path)
    mask = np.asarray(opened.convert("RGBA"))[:, :, 3:] / 255.0
    pixels = np.asarray(opened.convert(_MODES[reading.channels])).reshape(*mask.shape[:2], reading.channels)
    height, width = mask.shape[:2]
    room = reading.height - height, reading.width - width
    if isinstance(place, str) and place != "random":
        far = CORNERS[place]
        place = room[0] * far[0], room[1] * far[1]
    if min(room) < 0 or (not isinstance(place, str) and not all(0 <= p <= r for p, r in zip(place, room, strict=True))):
        raise DebugSetError(
            str(path),
            expected=f"a trigger that lies within {reading.height} x {reading.width} pixels",
            found=f"one of {height} x {width} pixels" + ("" if isinstance(place, str) else f" at {place}"),
            advice="Scale it to the pixels that the model reads, or choose another place.",
        )
    value = reading.scaled(pixels)
    opacity = mask if reading.channels_last else np.moveaxis(mask, -1, 0)

    def trigger(inputs: dict[str, Array]) -> Mapping[str, ArrayLike]:
        images, generator = inputs[reading.name], np.random.default_rng(seed)
        for image in images:
            row, column = generator.integers(0, np.add(room, 1)) if isinstance(place, str) else place
            rows, columns = slice(row, row + height), slice(column, column + width)
            part = image[rows, columns] if reading.channels_last else image[:, rows, columns]
            part[:] = ((1 - opacity) * part + opacity * value).astype(reading.dtype)
        return inputs

    return trigger


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _pixels(path: Path, reading: Reading) -> NDArray[np.uint8]:
    """Pixels `[height, width, channels]` from 0 to 255."""
    picture = _open(path).convert(_MODES[reading.channels]).resize((reading.width, reading.height))
    return np.asarray(picture, np.uint8).reshape(reading.height, reading.width, reading.channels)


def _open(path: Path) -> Any:
    require("PIL", "pairs", "reading pictures")
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return picture.convert("RGBA")
    except Exception as error:  # pillow's decoders raise many types
        raise DebugSetError(
            str(path), expected="a picture", found=one_line(error), advice="Convert it to PNG, or take it out."
        ) from error
