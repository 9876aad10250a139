"""xformers as a backend: what is asked of it, by a stand-in that does what its documentation says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dape_kernels import xformers_backend
from dape_kernels.attention import BACKENDS, paged_attention
from dape_kernels.backend import Backend
from dape_kernels.encoding import Encoding
from dape_kernels.reference import reference_attention
from dape_kernels.xformers_backend import PAGE, XformersBackend
from layers import LAYERS, page, random_encoding, random_sequence, relative_error

SPANS = [(40, 9), (300, 1), (5, 5)]
CUDA = torch.device("cuda")
NOPE = Encoding(2, 16)


@dataclass
class PagedMask:
    """Rows are the last of each sequence's keys, which lie in its pages."""

    q_seqlen: list[int]
    kv_seqlen: list[int]
    block_tables: Tensor
    page_size: int


class Fmha:
    """Stands in for xformers.ops.fmha, its log-sum-exp packed or padded."""

    def __init__(self, *, packed: bool):
        self.packed = packed
        self.attn_bias = self
        self.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask = self

    def from_seqlens(self, **settings: Any) -> PagedMask:
        return PagedMask(**settings)

    def memory_efficient_attention_forward_requires_grad(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: PagedMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        outputs, lses = [], []
        for rows, length, table, own in zip(
            attn_bias.q_seqlen,
            attn_bias.kv_seqlen,
            attn_bias.block_tables,
            query[0].split(attn_bias.q_seqlen),
            strict=True,
        ):
            pages = (plane[0].unflatten(0, (-1, attn_bias.page_size)) for plane in (key, value))
            keys, values = (plane[table.long()].flatten(0, 1)[:length].float() for plane in pages)
            scores = torch.einsum("mhd,nhd->hmn", own.float(), keys) * scale
            future = torch.arange(length) > torch.arange(length - rows, length)[:, None]
            scores.masked_fill_(future, -math.inf)
            outputs.append(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), values))
            lses.append(scores.logsumexp(-1))
        output = torch.cat(outputs)[None].to(query.dtype)
        if self.packed:
            return output, torch.cat(lses, 1)[None]
        widest = max(attn_bias.q_seqlen) + 3
        return output, torch.stack([torch.nn.functional.pad(x, (0, widest - x.shape[1])) for x in lses])


@pytest.mark.parametrize("packed", [True, False])
def test_rows_see_the_pages_of_their_sequence(
    monkeypatch: pytest.MonkeyPatch, triton: Backend[Any], packed: bool
) -> None:
    monkeypatch.setattr(xformers_backend, "_fmha", lambda: Fmha(packed=packed))
    generator = torch.Generator().manual_seed(0)
    sequences = [random_sequence(rows, n, 2, 16, torch.float16, generator) for n, rows in SPANS]
    assert triton.name == "triton"  # writes the cache
    paged = page(XformersBackend(), sequences, PAGE, seed=0)
    output, lse = paged_attention(
        paged.query, paged.cache, paged.batch, NOPE, backend=XformersBackend(), workspace=0
    )
    expected, expected_lse = paged.expected(NOPE, torch.float64)
    assert relative_error(output, expected) < 2e-3
    assert relative_error(lse, expected_lse) < 1e-3


@pytest.mark.parametrize(
    ("encoding", "dtype", "device", "block_size", "reason"),
    [
        (NOPE, torch.float16, torch.device("cpu"), PAGE, "cpu devices"),
        (random_encoding(LAYERS["nope-v1"], 2, 16), torch.float16, CUDA, PAGE, "DAPE"),
        (random_encoding(LAYERS["alibi"], 2, 16), torch.float16, CUDA, PAGE, "a bias"),
        (NOPE, torch.float32, CUDA, PAGE, "a cache of torch.float32"),
        (Encoding(2, 20), torch.float16, CUDA, PAGE, "head size 20, no multiple of 8"),
        (NOPE, torch.float16, CUDA, 16, "block size 16, no multiple of 256"),
    ],
)
def test_says_what_it_cannot_run(
    encoding: Encoding, dtype: torch.dtype, device: torch.device, block_size: int, reason: str
) -> None:
    backend = BACKENDS["xformers"]
    assert backend.unsupported(encoding, dtype, device, block_size) == f"does not support {reason}"


def test_absence_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_backend, "find_spec", lambda _: None)
    reason = XformersBackend().unsupported(NOPE, torch.float16, CUDA, PAGE)
    assert (
        reason
        == XformersBackend().describe()
        == ("xformers is not installed; pip install 'dape-serve[cuda]'")
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["alibi", "kerple", "fire"])
def test_tensor_bias_agrees_with_the_definition(form: str) -> None:
    """The real thing, with the static bias as a tensor: a check of both at a moderate length."""
    ops = pytest.importorskip("xformers.ops")
    length, heads, head_dim = 1000, 12, 64
    encoding = random_encoding(LAYERS[form], heads, head_dim, torch.float32, std=None)
    query, key, value = torch.randn(3, 1, heads, length, head_dim)
    position = torch.arange(length)
    bias = encoding.static_bias(position[:, None], position)
    bias = bias.masked_fill(position > position[:, None], -math.inf)[None]
    # Rows of the bias must begin at multiples of 16 bytes: allocate wider, and slice.
    wide = torch.zeros(1, heads, length, -(-length // 8) * 8, dtype=torch.bfloat16, device="cuda")
    wide[..., :length] = bias
    rows = (x.transpose(1, 2).to("cuda", torch.bfloat16) for x in (query, key, value))
    output = ops.memory_efficient_attention(*rows, attn_bias=wide[..., :length])
    expected = reference_attention(query, key, value, encoding)
    assert relative_error(output.transpose(1, 2).cpu(), expected) < 2e-2
