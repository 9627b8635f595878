"""The data-set card: a YAML file that says where samples are, how they are prepared, and which belong to a split."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qcore.config import Config, load_config
from qcore.errors import DataError

Task = Literal["classification", "regression", "anomaly", "none"]
Direction = Literal["higher", "lower"]
Layout = Literal["NCHW", "NHWC", "NC", "N"]
Floats = float | tuple[float, ...]
Pixels = Annotated[int, Field(gt=0, le=16384)]


class Normalize(Config):
    """`(x - mean) / std`, one number or one per channel, on the values as stored."""

    mean: Floats = 0.0
    std: Floats = 1.0

    @model_validator(mode="after")
    def _divisible(self) -> "Normalize":
        if 0.0 in (self.std if isinstance(self.std, tuple) else (self.std,)):
            raise ValueError("std holds 0; nothing can be divided by it")
        return self


class Preprocess(Config):
    """One step; exactly one field is set.

    Sizes are pixels: one number for a square, or [height, width]. Images are resized with Pillow's BICUBIC.
    """

    resize_shorter: Pixels | None = None
    resize: Pixels | tuple[Pixels, Pixels] | None = None
    center_crop: Pixels | tuple[Pixels, Pixels] | None = None
    normalize: Normalize | None = None
    scale: float | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "Preprocess":
        if len(self.model_fields_set) != 1:
            raise ValueError("a preprocess step holds exactly one of " + ", ".join(sorted(type(self).model_fields)))
        return self


class Split(Config):
    """Which samples: at most one of `range`, `indices`, `count`, `fraction`, `rest`; none of them means all.

    `count`, `fraction` and `rest` cut a seeded permutation of the samples in the order in which the splits are
    written. `path` names another file or folder than the card's.
    """

    path: str | None = None
    range: tuple[int, int] | None = None
    indices: tuple[int, ...] | None = None
    count: int | None = Field(default=None, gt=0)
    fraction: float | None = Field(default=None, gt=0, le=1)
    rest: Literal[True] | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> "Split":
        if len(self.model_fields_set - {"path"}) > 1:
            raise ValueError("a split holds at most one of range, indices, count, fraction, rest")
        return self


class DataCard(Config):
    """A data set.

    `path` is relative to the card. `layout` says how arrays are stored, `model_layout` what the model wants (the
    same when absent; for image folders `layout` alone names what the model wants). `inputs` maps model inputs to
    arrays of the npz for models with several inputs. `classes` is a list of names, or a text file whose line k
    starts with the folder name of class k.

    `y` holds class numbers, targets of a regression ((n,) or (n, outputs) floats), or 0 and 1 for anomalies. `slices`
    names parts of the samples that are judged by themselves: places in the stored data, or the name of an array of
    whole numbers, each of whose values is a slice. `metrics` names functions `module:function` and whether higher or
    lower values are better.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    task: Task = "classification"
    format: Literal["npz", "image_folder"] | None = None
    path: str | None = None
    layout: Layout | None = None
    model_layout: Layout | None = None
    preprocess: tuple[Preprocess, ...] = ()
    classes: str | tuple[str, ...] | None = None
    inputs: dict[str, str] | None = None
    x: str = "x"
    y: str = "y"
    seed: int = Field(default=0, ge=0)
    splits: dict[str, Split]
    slices: dict[str, tuple[int, ...] | str] | None = None
    metrics: dict[str, Direction] | None = None

    @property
    def error_of(self) -> Literal["classification", "none"]:
        """What outputs are compared as: distributions over classes, or values."""
        return "classification" if self.task == "classification" else "none"

    @model_validator(mode="before")
    @classmethod
    def _seed_among_splits(cls, value: Any) -> Any:
        """Accept `seed` written beside the split names."""
        splits = value.get("splits") if isinstance(value, dict) else None
        if isinstance(splits, dict) and "seed" in splits:
            splits = dict(splits)
            value = {**value, "seed": splits.pop("seed"), "splits": splits}
        return value


def load_card(path: Path) -> tuple[DataCard, Path, Path]:
    """Return the card at `path` (a YAML file, or a folder that holds exactly one), its folder, and its file.

    Raises:
        DataError: nothing is there, or a folder holds none or several.
        ConfigError: the card has an unknown field or a wrong value.
    """
    if not path.exists():
        raise DataError(f"data card {path} does not exist; check the path")
    if path.is_dir():
        cards = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        if len(cards) != 1:
            raise DataError(f"folder {path} holds {len(cards)} YAML files; allowed: exactly one data card")
        path = cards[0]
    return load_config(path, DataCard, "data card"), path.parent, path
