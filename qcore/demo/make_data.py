"""Write the demo's data set: scikit-learn's bundled 8x8 digit images, which need no download.

The images are shuffled once, here, by a fixed rule, so that the card's splits are plain ranges. Scaling to 0..1 is the
card's job (`preprocess`), training is `train_digits.py`'s.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from qcore.files import write_atomic

TRAIN = range(1000)
CALIBRATION = range(1000, 1100)
EVALUATION = range(1100, 1797)
PIXEL_MAX = 16
"""A pixel counts the dark points of a 4x4 block of the scan."""

CARD = f"""\
# scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits", test part), 8x8 pixels of 0..{PIXEL_MAX}.
name: digits
task: classification
format: npz
path: digits.npz
layout: NHWC                         # as stored; the model wants NCHW float32 0..1
model_layout: NCHW
preprocess:
  - {{normalize: {{mean: 0, std: {PIXEL_MAX}}}}}
classes: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
splits:
  train: {{range: [{TRAIN.start}, {TRAIN.stop}]}}
  calibration: {{range: [{CALIBRATION.start}, {CALIBRATION.stop}]}}
  evaluation: {{range: [{EVALUATION.start}, {EVALUATION.stop}]}}
"""


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (1797, 8, 8, 1) of 0..16 and labels (1797,) of 0..9, shuffled the same way every time.

    The order is that of the SHA-256 of the original index: it mixes the writers over the splits and depends on no
    library's random generator.

    Source: sklearn.datasets.load_digits.
    """
    bunch = load_digits()
    order = sorted(range(len(bunch.target)), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    images = np.asarray(bunch.images)[order, :, :, None].astype(np.uint8)
    return images, np.asarray(bunch.target)[order].astype(np.int64)


def write_digits(folder: Path) -> Path:
    """Return the path of the card `digits.yaml`, written into `folder` with its `digits.npz`; same bytes every time.

    Args:
        folder: made if it is missing.
    """
    x, y = digits()
    buffer = io.BytesIO()
    np.savez(buffer, x=x, y=y)
    write_atomic(folder / "digits.npz", buffer.getvalue())
    card = folder / "digits.yaml"
    write_atomic(card, CARD.encode())
    return card
