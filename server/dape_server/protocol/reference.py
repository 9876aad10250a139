"""The field `reference` of POST /v1/perplexity: what another model made of the same tokens."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import PlainValidator

from dape_engine.errors import RequestError
from dape_server.arrays import FLOATS, decode
from dape_server.limits import MAX_PROMPTS

LOWEST: float = -1e-3
"""NLLs are 0 or more but for rounding; what is lower is more likely a log-probability."""
NLLs: TypeAlias = npt.NDArray[np.float64]


def _as_reference(value: object) -> tuple[NLLs | None, ...]:
    if not isinstance(value, list):
        raise RequestError("reference: must be a list with an entry for every input", param="reference")
    if len(value) > MAX_PROMPTS:
        raise RequestError(
            f"reference: {len(value)} entries are above the limit of {MAX_PROMPTS}", param="reference"
        )
    return tuple(None if entry is None else _as_nlls(entry, index) for index, entry in enumerate(value))


def _as_nlls(entry: object, index: int) -> NLLs:
    """Return NLLs, with NaN for what does not exist."""
    try:
        nlls = _numbers(entry)
    except ValueError as error:
        raise RequestError(f"reference[{index}]: {error}", param="reference") from error
    if np.isinf(nlls).any():
        raise RequestError(f"reference[{index}]: holds an infinite value", param="reference")
    low = np.flatnonzero(nlls < LOWEST)
    if len(low):
        raise RequestError(
            f"reference[{index}][{low[0]}]: negative log-likelihoods are not below 0, got {nlls[low[0]]:g}; "
            "change the sign of log-probabilities",
            param="reference",
        )
    return nlls


def _numbers(entry: object) -> NLLs:
    if isinstance(entry, str):
        return decode(entry, FLOATS)
    if not isinstance(entry, list) or not {type(item) for item in entry} <= {int, float, type(None)}:
        raise ValueError("must be a list of numbers and null, base64 of float32, or null")
    try:
        return np.array(entry, dtype=np.float64)
    except OverflowError as error:
        raise ValueError("holds a number beyond a float") from error


Reference: TypeAlias = Annotated[
    tuple[NLLs | None, ...],
    PlainValidator(_as_reference, json_schema_input_type=list[list[float | None] | str | None]),
]
