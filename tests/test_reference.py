"""The static biases against published numbers, and the definition's own laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dape_kernels.bias import T5, Alibi, Bias, Fire, KerpleLog, KerplePower, Sandwich, alibi_slopes
from dape_kernels.encoding import dape_from_parameters
from dape_kernels.reference import reference_attention, reference_scores
from layers import LAYERS, OFFICIAL, random_encoding, random_module, random_sequence

DISTANCES = torch.arange(200)


def by_distance(bias: Bias) -> Tensor:
    """The bias [H, 200] of distances 0 to 199."""
    return bias(DISTANCES, torch.zeros_like(DISTANCES))


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (3, [0.0625, 0.003906, 0.25]),
        (6, [0.25, 0.0625, 0.015625, 0.003906, 0.5, 0.125]),
        (8, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]),
        (
            12,
            [
                *(0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625),
                *(0.707107, 0.353553, 0.176777, 0.088388),
            ],
        ),
    ],
)
def test_alibi_slopes(heads: int, slopes: list[float]) -> None:
    assert alibi_slopes(heads) == pytest.approx(slopes, abs=5e-7)


def test_alibi_falls_with_the_distance() -> None:
    assert by_distance(Alibi(torch.tensor([0.5, 0.25])))[:, 6].tolist() == [-3.0, -1.5]


def test_t5_buckets() -> None:
    """The first distance of each of the 32 buckets; the table is on scores already divided by sqrt(d)."""
    buckets = by_distance(T5(torch.arange(32.0)[:, None], head_dim=4))[0] / math.sqrt(4)
    starts = [int((buckets == bucket).nonzero()[0]) for bucket in range(32)]
    assert starts == [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert (buckets.diff() >= 0).all()


def test_kerple_clamps_its_parameters() -> None:
    low, high = torch.tensor([-1.0, 0.005]), torch.tensor([5.0, 5.0])
    n = DISTANCES.float()
    assert torch.allclose(by_distance(KerpleLog(low, low)), -0.01 * torch.log1p(0.01 * n).expand(2, -1))
    assert torch.allclose(by_distance(KerpleLog(high, high)), -5 * torch.log1p(5 * n).expand(2, -1))
    powers = torch.where(n > 0, n**0.01, 0.0)
    assert torch.allclose(by_distance(KerplePower(low, low)), -0.01 * powers.expand(2, -1))
    assert torch.allclose(by_distance(KerplePower(high, high)), -5 * (n**2).expand(2, -1))


def test_sandwich_is_zero_at_the_query() -> None:
    bias = by_distance(Sandwich(heads=3, dimension=6))
    assert (bias[:, 0] == 0).all()
    total = sum(math.cos(7 / 10000 ** (2 * t / 6)) for t in (1, 2, 3))
    expected = [(total - 3) / (8 * h / 3) for h in (1, 2, 3)]
    assert bias[:, 7].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["fire", "fire-v1"])
def test_fire_depends_on_the_query_beyond_its_threshold(kind: str) -> None:
    module = random_module(LAYERS[kind], heads=3, head_dim=4).double()
    torch.nn.init.constant_(module.L_multiplier, -1.0)
    threshold = int(module.init_L)
    bias = module.encoding().bias
    assert bias is not None
    three_back = bias(DISTANCES, DISTANCES - 3)
    assert torch.equal(three_back[:, 3 : threshold + 1].diff(), torch.zeros(3, threshold - 3).double())
    assert (three_back[:, threshold:].diff() != 0).all()


def test_fire_is_rectified_alone_and_leaky_under_dape() -> None:
    values = torch.tensor([-1.0, 2.0])
    alone, under = (random_encoding(LAYERS[kind], 3, 4).bias for kind in ("fire", "fire-v1"))
    assert isinstance(alone, Fire)
    assert isinstance(under, Fire)
    assert alone.activation(values).tolist() == [0.0, 2.0]
    assert under.activation(values).tolist() == pytest.approx([-0.01, 2.0])


@pytest.mark.parametrize("layer", [*LAYERS, *OFFICIAL])
def test_rows_do_not_see_the_future(layer: str) -> None:
    """Changing the last keys leaves all rows before them as they were, bit for bit."""
    encoding = random_encoding({**LAYERS, **OFFICIAL}[layer], 3, 5)
    query, key, value = random_sequence(13, 13, 3, 5, torch.float64, torch.Generator().manual_seed(0))
    before = reference_attention(query, key, value, encoding)
    key[:, :, 9:] += 5
    value[:, :, 9:] -= 5
    after = reference_attention(query, key, value, encoding)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


@pytest.mark.parametrize("layer", [*LAYERS, *OFFICIAL])
def test_queries_may_be_the_last_rows_only(layer: str) -> None:
    encoding = random_encoding({**LAYERS, **OFFICIAL}[layer], 3, 5)
    query, key, _ = random_sequence(13, 13, 3, 5, torch.float64, torch.Generator().manual_seed(0))
    whole = reference_scores(query, key, encoding)
    assert torch.allclose(reference_scores(query[:, :, -4:], key, encoding), whole[:, :, -4:])


@pytest.mark.parametrize("layer", OFFICIAL)
def test_extended_edge_is_the_official_one_of_a_longer_run(layer: str) -> None:
    """Rows of a run that goes on for k // 2 more tokens do not see where it ends."""
    extended = random_encoding(LAYERS[layer.removesuffix("-official")], 3, 5)
    official = random_encoding(OFFICIAL[layer], 3, 5)
    query, key, _ = random_sequence(15, 15, 3, 5, torch.float64, torch.Generator().manual_seed(0))
    seen = torch.ones(13, 13, dtype=torch.bool).tril()
    longer = reference_scores(query, key, official)[..., :13, :13][..., seen]
    query, key = query[:, :, :13], key[:, :, :13]
    assert torch.allclose(reference_scores(query, key, extended)[..., seen], longer)
    assert not torch.allclose(reference_scores(query, key, official)[..., seen], longer)


def test_kernel_of_one_is_version_one() -> None:
    """A 1 x 1 convolution and a linear layer with the same numbers are the same function."""
    generator = torch.Generator().manual_seed(0)
    hidden, out = (torch.randn(*shape, generator=generator) for shape in ((7, 6), (3, 7)))
    biases = torch.randn(7, generator=generator), torch.randn(3, generator=generator)
    linear = dape_from_parameters("concat_residual", hidden, biases[0], out, biases[1])
    convolution = dape_from_parameters(
        "concat_residual", hidden[:, :, None, None], biases[0], out[:, :, None, None], biases[1]
    )
    for name in ("score_weight", "bias_weight", "hidden_bias", "out_weight", "out_bias"):
        assert torch.equal(getattr(linear, name), getattr(convolution, name))
