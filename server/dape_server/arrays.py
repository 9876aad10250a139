"""Arrays of numbers as base64 text: a quarter of the size of JSON, and read at once.

Little-endian, 4 bytes a number. NaN is a number that does not exist, what null is in a JSON list.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FLOATS = np.dtype("<f4")
INTEGERS = np.dtype("<i4")


def encode(values: Sequence[float | None], dtype: np.dtype[np.float32] | np.dtype[np.int32]) -> str:
    """Return numbers as base64; None among floats becomes NaN."""
    return base64.b64encode(np.array(values, dtype).tobytes()).decode("ascii")


def decode(text: str, dtype: np.dtype[np.float32] | np.dtype[np.int32]) -> npt.NDArray[np.float64]:
    """Return the numbers of base64 text.

    Raises:
        ValueError: the text is not base64, or its bytes are no whole number of numbers.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("is not base64") from error
    if len(raw) % dtype.itemsize:
        raise ValueError(f"holds {len(raw)} bytes, no multiple of {dtype.itemsize}")
    return np.frombuffer(raw, dtype).astype(np.float64)
