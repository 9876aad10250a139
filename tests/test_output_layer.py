"""Log-probabilities over pieces of the vocabulary are those of the whole, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dape_engine.errors import StepError
from dape_engine.output_layer import logits, score_targets
from dape_kernels.decoder import Tally

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


def exact_logprobs(hidden: Tensor, weight: Tensor) -> np.ndarray:
    scores = hidden.double().numpy() @ weight.double().numpy().T
    peak = scores.max(-1, keepdims=True)
    return np.asarray(scores - peak - np.log(np.exp(scores - peak).sum(-1, keepdims=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [700, 5000, 1 << 20])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 5, 2), (7, 13, 101), (33, 16, 257)])
def test_any_workspace_gives_the_exact_values(
    rows: int, width: int, vocab: int, workspace: int, dtype: torch.dtype
) -> None:
    hidden, weight, targets = inputs(rows, width, vocab, dtype)
    logprobs, ranks, ids, values = score_targets(hidden, weight, targets, 4, workspace=workspace)
    exact = exact_logprobs(hidden, weight)
    best = np.argsort(-exact, axis=-1)[:, : min(4, vocab)]
    np.testing.assert_allclose(logprobs, exact[np.arange(rows), targets], rtol=2e-6, atol=5e-6)
    np.testing.assert_array_equal(ids, best)
    own = exact[np.arange(rows), targets][:, None]
    np.testing.assert_array_equal(ranks, 1 + (exact > own).sum(-1))
    np.testing.assert_allclose(values, np.take_along_axis(exact, best, -1), rtol=2e-6, atol=5e-6)
    assert (logprobs.dtype, ids.dtype, values.dtype) == (torch.float32, torch.int64, torch.float32)


@pytest.mark.parametrize("workspace", [700, 5000, 1 << 20])
def test_a_backends_own_product_gives_the_same_values(workspace: int) -> None:
    hidden, weight, targets = inputs(33, 16, 257)
    sizes: list[int] = []

    class Own:
        def logits(self, rows: Tensor) -> Tensor:
            sizes.append(len(rows))
            return rows @ weight.t()

        def tally(self, rows: Tensor, targets: Tensor, marks: Tensor) -> Tally:
            scores = rows @ weight.t()
            best, best_id = scores.max(-1)
            peak = best - 3
            return Tally(
                own=scores.gather(1, targets[:, None])[:, 0],
                peak=peak,
                total=(scores - peak[:, None]).exp().sum(-1),
                above=(scores > marks[:, None]).sum(-1),
                best=best,
                best_id=best_id,
            )

    for top in (4, 1, 0):
        plain = score_targets(hidden, weight, targets, top)
        own = score_targets(hidden, weight, targets, top, decoder=Own(), workspace=workspace)
        for one, other in zip(plain, own, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=5e-6)
    assert sum(sizes) == 33  # with one alternative at the most nothing is stored
    assert max(sizes) * 257 * 4 <= max(workspace // 2, 257 * 4)


@pytest.mark.parametrize("workspace", [700, 5000, 1 << 20])
def test_the_most_likely_target_and_the_first_alternative_are_equal_to_the_bit(workspace: int) -> None:
    hidden, weight, _ = inputs(50, 24, 211)
    _, _, ids, values = score_targets(
        hidden, weight, torch.zeros(50, dtype=torch.int64), 1, workspace=workspace
    )
    again, ranks, _, _ = score_targets(hidden, weight, ids[:, 0], 1, workspace=workspace)
    assert torch.equal(again, values[:, 0])
    assert ranks.tolist() == [1] * 50


@pytest.mark.parametrize("top", [0, 3, 40])
def test_ranks_and_alternatives_agree_where_tokens_are_alike(top: int) -> None:
    """Each weight is there twice: only rounding, or the order of the pieces, tells such tokens apart."""
    hidden, weight, _ = inputs(8, 24, 20)
    hidden, weight = hidden.repeat_interleave(40, 0), weight.repeat(2, 1)
    targets = torch.arange(40).repeat(8)
    _, ranks, ids, _ = score_targets(hidden, weight, targets, top, workspace=700)
    exact = exact_logprobs(hidden, weight[:20])
    above = 2 * (exact > exact[np.arange(320), targets % 20][:, None]).sum(-1)
    for rank, token, listed, count in zip(ranks.tolist(), targets.tolist(), ids.tolist(), above, strict=True):
        assert rank in (count + 1, count + 2)
        assert (rank <= top) == (token in listed)
        assert rank > top or listed[rank - 1] == token


def test_asking_for_alternatives_changes_no_value() -> None:
    hidden, weight, targets = inputs(20, 8, 90)
    alone, ranks, ids, values = score_targets(hidden, weight, targets)
    assert ids.shape == values.shape == (20, 0)
    among = score_targets(hidden, weight, targets, 5)
    assert torch.equal(alone, among[0])
    assert torch.equal(ranks, among[1])


def test_more_alternatives_than_tokens_give_them_all() -> None:
    hidden, weight, targets = inputs(3, 8, 9)
    _, _, ids, values = score_targets(hidden, weight, targets, 20, workspace=200)
    assert ids.sort(-1).values.tolist() == [list(range(9))] * 3
    np.testing.assert_allclose(values.exp().sum(-1), 1, rtol=1e-6)


def test_no_rows_give_no_values() -> None:
    hidden, weight, targets = inputs(0, 8, 9)
    shapes = [tuple(part.shape) for part in score_targets(hidden, weight, targets, 2)]
    assert shapes == [(0,), (0,), (0, 2), (0, 2)]


def test_a_certain_token_keeps_its_digits() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[20.0], [4.0], [4.0]])
    logprob, *_ = score_targets(hidden, weight, torch.tensor([0]), workspace=1)
    assert logprob.item() == pytest.approx(-2 * math.exp(-16), rel=0.1)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits_do_not_overflow(scale: float) -> None:
    hidden, weight, targets = inputs(4, 3, 17)
    logprobs, *_ = score_targets(hidden * scale, weight, targets, workspace=64)
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite_fail_the_step(bad: float) -> None:
    hidden, weight, targets = inputs(4, 3, 17)
    hidden[2, 1] = bad
    with pytest.raises(StepError, match="not finite"):
        score_targets(hidden, weight, targets)


class LargestResult(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_buffer_is_larger_than_the_workspace(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(100, 16, 3000, dtype)
    with LargestResult() as seen:  # type: ignore[no-untyped-call]
        score_targets(hidden, weight, targets, 2, workspace=1 << 15)
    assert 0 < seen.bytes <= 1 << 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [1, 1000, 1 << 20])
def test_logits_are_exact_products_of_narrow_weights(dtype: torch.dtype, workspace: int) -> None:
    hidden, weight, _ = inputs(3, 16, 57, dtype)
    exact = hidden.double() @ weight.double().t()
    result = logits(hidden, weight, workspace=workspace)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-5)
