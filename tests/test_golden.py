"""Every backend against tensors made by the official DAPE modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dape_kernels.attention import paged_attention
from dape_kernels.backend import Backend
from dape_kernels.encoding import RightEdge
from dape_kernels.reference import reference_attention, reference_scores
from golden import Golden
from layers import device_of, page, relative_error, smallest_block

DTYPES = [
    pytest.param(torch.float32, 2e-5, id="float32"),
    pytest.param(torch.float64, 1e-6, id="float64"),
]


def attend(
    backend: Backend[Any], golden: Golden, dtype: torch.dtype, edge: RightEdge
) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, d] and log-sum-exp [B, H, S] of a whole file as one paged batch."""
    encoding, block_size = golden.encoding(dtype, edge), smallest_block(backend)
    reason = backend.unsupported(encoding, dtype, device_of(backend), block_size)
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    query, key, value = golden.inputs(dtype)
    sequences = list(zip(query.split(1), key.split(1), value.split(1), strict=True))
    paged = page(backend, sequences, block_size, seed=0)
    output, lse = paged_attention(
        paged.query,
        paged.cache,
        paged.batch,
        encoding,
        backend=backend,
        workspace=1000 * paged.query[0].numel(),  # so little that the rows take several tiles
    )
    count, _, length, _ = query.shape
    return (
        output.cpu().view(count, length, *output.shape[1:]).transpose(1, 2),
        lse.cpu().view(count, length, -1).transpose(1, 2),
    )


def visible(golden: Golden) -> Tensor:
    """Which pairs [R, S] of the kept rows the causal mask leaves."""
    return golden.tensors["score_rows"][:, None] >= torch.arange(golden.tensors["q"].shape[2])


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_golden_scores_reference(golden: Golden, dtype: torch.dtype, tolerance: float) -> None:
    query, key, _ = golden.inputs(dtype)
    scores = reference_scores(query, key, golden.encoding(dtype))[:, :, golden.tensors["score_rows"]]
    seen = visible(golden)
    assert relative_error(scores[..., seen], golden.tensors["scores"][..., seen]) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_golden_output(backend: Backend[Any], golden: Golden, dtype: torch.dtype, tolerance: float) -> None:
    output, lse = attend(backend, golden, dtype, "official")
    assert relative_error(output, golden.tensors["out"]) < tolerance
    scores = golden.tensors["scores"].double().masked_fill(~visible(golden), float("-inf"))
    largest = scores[scores.isfinite()].abs().max()
    error = lse[:, :, golden.tensors["score_rows"]] - scores.logsumexp(-1)
    assert float(error.abs().max() / largest) < tolerance


def test_golden_extended_edge(backend: Backend[Any], golden: Golden) -> None:
    """With the extended right edge only the last k // 2 rows depart from the official matrix."""
    output, _ = attend(backend, golden, torch.float32, "extended")
    official, end = golden.tensors["out"], output.shape[2] - golden.reach
    assert relative_error(output[:, :, :end], official[:, :, :end]) < 2e-5
    exact = reference_attention(*golden.inputs(torch.float64), golden.encoding(torch.float64, "extended"))
    assert relative_error(output, exact) < 2e-5
    departed = ((output - official).abs() > 1e-4 * official.abs().max()).any(dim=(0, 1, 3))
    assert departed.nonzero()[:, 0].tolist() == list(range(end, output.shape[2]))


def test_golden_extended_scores_reference(golden: Golden) -> None:
    """In those rows, only the last k // 2 keys differ."""
    query, key, _ = golden.inputs(torch.float64)
    scores = reference_scores(query, key, golden.encoding(torch.float64, "extended"))
    seen = visible(golden)
    kept = seen & (torch.arange(scores.shape[-1]) < scores.shape[-1] - golden.reach)
    error = (scores[:, :, golden.tensors["score_rows"]] - golden.tensors["scores"]).abs()
    limit = 1e-6 * float(golden.tensors["scores"][..., seen].abs().max())
    assert float(error[..., kept].max()) < limit
    if golden.reach and golden.tensors["score_rows"][-1] == scores.shape[-2] - 1:
        assert float(error[..., -1, -1].max()) > limit
