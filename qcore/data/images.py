"""Folders of class folders of images, read one at a time with Pillow."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qcore.data.card import DataCard, Preprocess
from qcore.errors import DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"))


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image: its path below the data folder, and its class index."""

    name: str
    label: int


def image_files(source: Path, card: DataCard, folder: Path) -> list[ImageFile]:
    """Return the images below `source` in sorted order of their relative paths.

    Raises:
        DataError: no image is there, or a class folder is not among the card's classes.
    """
    names = sorted(
        p.relative_to(source).as_posix()
        for p in source.rglob("*")
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
    if not names:
        raise DataError(f"folder {source} holds no images; allowed: class folders of {', '.join(sorted(SUFFIXES))}")
    if card.task == "none":
        return [ImageFile(name, -1) for name in names]
    classes = class_folders(card, folder) or sorted({name.split("/")[0] for name in names})
    index = {name: k for k, name in enumerate(classes)}
    for name in names:
        if "/" not in name or name.split("/")[0] not in index:
            raise DataError(
                f"image {name} in {source} is not in a class folder of the card; known: {len(index)} classes, first "
                f"{classes[0]}; correct `classes`"
            )
    return [ImageFile(name, index[name.split("/")[0]]) for name in names]


def class_folders(card: DataCard, folder: Path) -> list[str]:
    """Return the folder name of each class in index order; empty where the card names none."""
    if card.classes is None or not isinstance(card.classes, str):
        return list(card.classes or ())
    return [line.split()[0] for line in _class_list(card, folder)]


def class_names(card: DataCard, folder: Path) -> list[str]:
    """Return what people call each class, in index order: in a class list what follows the folder name, if anything.

    Raises:
        DataError: the class list is missing.
    """
    if card.classes is None or not isinstance(card.classes, str):
        return list(card.classes or ())
    return [" ".join(line.split()[1:]) or line.strip() for line in _class_list(card, folder)]


def _class_list(card: DataCard, folder: Path) -> list[str]:
    path = folder / str(card.classes)
    if not path.is_file():
        raise DataError(f"class list {path} of card {card.name} does not exist; check `classes`")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_image(path: Path, steps: tuple[Preprocess, ...]) -> NDArray[np.uint8]:
    """Return the RGB image (height, width, 3) after the geometric steps; `normalize` and `scale` come later.

    Raises:
        DataError: the file is not an image, or a crop is larger than the image.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise DataError(f"image {path} cannot be read ({e}); remove or repair it") from e
    for step in steps:
        if step.resize_shorter is not None:
            factor = step.resize_shorter / min(image.size)
            image = _resized(image, round(image.height * factor), round(image.width * factor))
        elif step.resize is not None:
            image = _resized(image, *pair(step.resize))
        elif step.center_crop is not None:
            height, width = pair(step.center_crop)
            if height > image.height or width > image.width:
                raise DataError(f"image {path} is {image.height}x{image.width}; the crop wants {height}x{width}")
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.uint8)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else size


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
