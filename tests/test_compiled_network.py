"""The network of training in C++ against its twin in PyTorch: values, gradients, every build, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dape_engine.config import DapeConfig, PositionConfig
from dape_kernels.dense import adapt_scores, dense_attention
from dape_kernels.dense.adapt import Network, make_adapter
from dape_kernels.dense.compiled import TILE, CompiledNetwork, available
from dape_kernels.encoding import Dape
from layers import WITH_BIAS, random_encoding, random_module, relative_error

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

# Heads, hidden width, sequences, rows, keys: tiles in full and with every remainder.
SIZES = [
    (1, 1, 1, 1, 1),
    (8, 32, 4, 32, 64),
    (12, 32, 3, 5, 77),
    (5, 7, 2, 3, 43),
    (17, 64, 1, 1, TILE),
    (6, 4, 7, 2, TILE // 2 + 1),
]
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=[1, 2, 3], ids="threads-{}".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def network(form: str, heads: int, width: int) -> Dape:
    """The network of a random layer in float32."""
    config = DapeConfig(width=width, form=form)  # type: ignore[arg-type]
    dape = random_encoding((WITH_BIAS["kerple"], config), heads, 8, torch.float32).dape
    assert dape is not None
    return dape


def passes(adapter: CompiledNetwork | Network, tensors: list[Tensor]) -> list[Tensor]:
    """Results and all gradients, those in the hidden part summed over the sequences that share it."""
    scores, hidden, gradient = tensors
    future = torch.zeros(scores.shape[2:], dtype=torch.bool)
    adapted, kept = adapter.forward(scores.clone(), scores, hidden, future)
    of_scores, of_hidden, _ = adapter.backward(gradient, scores, kept, future)
    assert of_hidden is not None
    if hidden.shape[1] < of_hidden.shape[1]:
        of_hidden = of_hidden.sum(1, keepdim=True)
    return [adapted, of_scores, of_hidden, *adapter.gradients]


@pytest.mark.usefixtures("cpu", "_threads")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("form", ["concat_residual", "concat"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of-each-sequence"])
@pytest.mark.parametrize(("heads", "width", "sequences", "rows", "keys"), SIZES)
def test_passes_are_those_of_the_twin(
    heads: int, width: int, sequences: int, rows: int, keys: int, shared: bool, form: str, dtype: torch.dtype
) -> None:
    dape = network(form, heads, width)
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, sequences), (width, 1 if shared else sequences), (heads, sequences)]
    tensors = [torch.randn(*shape, rows, keys, generator=generator).to(dtype) for shape in shapes]
    found = passes(CompiledNetwork(dape, (dape.score_weight, dape.out_weight)), tensors)
    wide = (dape.score_weight.double(), dape.out_weight.double())
    exact = passes(Network(dape, wide, torch.float64, keys), [tensor.double() for tensor in tensors])
    for name, own, expected in zip(("out", "scores", "hidden", "first", "second"), found, exact, strict=True):
        assert own.shape == expected.shape
        assert own.dtype == (dtype if name in ("out", "scores") else torch.float32)
        assert relative_error(own, expected) < ROUNDING[dtype], name


@pytest.mark.usefixtures("best_cpu")
@pytest.mark.parametrize("bias", ["kerple", "fire", "alibi", "bipe"])
@pytest.mark.parametrize("form", ["concat_residual", "concat", "bias_only"])
def test_a_layer_learns_as_in_double_precision(bias: str, form: str) -> None:
    """Through `dense_attention`, which takes the compiled network for float32 and the twin for float64."""
    config = DapeConfig(width=8, form=form)  # type: ignore[arg-type]
    module = random_module((PositionConfig(kind=bias), config), 4, 8, std=0.2)  # type: ignore[arg-type]
    segments = torch.arange(70).div(30, rounding_mode="floor").expand(3, -1) if bias == "bipe" else None
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 3, 4, 70, 8, generator=generator)  # q, k and v
    found = {}
    for dtype in (torch.float32, torch.float64):
        leaves = inputs.to(dtype).clone().requires_grad_()
        module.to(dtype).zero_grad(set_to_none=True)
        encoding = module.encoding()
        assert encoding.dape is not None
        adapter = make_adapter(
            encoding, (encoding.dape.score_weight, encoding.dape.out_weight), dtype, inputs.shape[3]
        )
        assert isinstance(adapter, CompiledNetwork if dtype == torch.float32 else Network)
        output = dense_attention(*leaves, encoding, segments)  # type: ignore[misc]
        (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found[dtype] = {"output": output.detach(), "inputs": leaves.grad, **gradients}
    narrow, wide = found.values()
    assert narrow.keys() == wide.keys()
    largest = max(float(x.abs().max()) for name, x in wide.items() if name != "output")
    for name, expected in wide.items():
        error = float((narrow[name].double() - expected).abs().max())
        assert error < 1e-5 * max(largest, 1.0), name


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of-each-sequence"])
def test_scores_are_adapted_as_in_double_precision(shared: bool) -> None:
    """`adapt_scores`, results and gradients, against the twin by way of float64."""
    dape = network("concat_residual", 5, 7)
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 9, 11), (7, 1 if shared else 3, 9, 11)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (*drawn, dape.score_weight, dape.out_weight)]
        own = replace(dape, score_weight=leaves[2], out_weight=leaves[3])
        adapted = adapt_scores(own, leaves[0], leaves[1])
        (adapted * torch.linspace(-1, 1, adapted.numel()).view_as(adapted)).sum().backward()  # type: ignore[no-untyped-call]
        found.append([adapted.detach(), *(leaf.grad for leaf in leaves)])
    for single, double in zip(*found, strict=True):
        assert single is not None
        assert double is not None
        assert single.shape == double.shape
        assert relative_error(single, double) < ROUNDING[torch.float32]


def test_what_the_library_does_not_support_is_left_to_the_twin() -> None:
    cpu = torch.device("cpu")
    dape = network("concat_residual", 4, 8)
    convolution = random_encoding(
        (WITH_BIAS["kerple"], DapeConfig(version=2, kernel=3, width=8)), 4, 8, torch.float32
    ).dape
    assert convolution is not None
    assert not available(convolution, torch.float32, cpu)
    assert not available(dape, torch.float64, cpu)
    assert not available(dape, torch.float16, cpu)
    assert not available(dape, torch.float32, torch.device("meta"))
