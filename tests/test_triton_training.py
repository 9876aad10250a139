"""The Triton kernels of training against the definition in float64: outputs, gradients in all that learns.

Where there is no GPU they run in Triton's interpreter, in float32 too; tiles are 16 x 16, so 21 tokens are
two tiles of rows, the second one partly filled.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dape_engine.config import DapeConfig
from dape_engine.encoding import PositionalEncoding
from dape_kernels.dense import blockwise_attention, dense_attention
from dape_kernels.reference import reference_attention
from dape_kernels.triton.configs import Case, Tiling, choose
from dape_kernels.triton.dense.attention import fused_attention, unsupported
from layers import LAYERS, WITH_BIAS, Layer, random_encoding, random_module, relative_error

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Where rounding takes a hidden value across zero, its gradient changes a hundredfold.
ROUNDING_16 = 3e-2
# Products of float32 numbers are for the interpreter, which has room for them.
DTYPE, ROUNDING = (torch.float16, ROUNDING_16) if DEVICE.type == "cuda" else (torch.float32, 5e-6)
FORMS = [
    name
    for name, layer in LAYERS.items()
    if not name.startswith(("fire", "cope")) and (layer[1] is None or layer[1].kernel == 1)
]
SHAPES = [(1, 8, 1), (5, 24, 8), (12, 64, 32), (18, 8, 5), (7, 80, 16)]
Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(sequences: int, tokens: int, heads: int, head_dim: int) -> Inputs:
    """q, k and v [B, H, N, d] in float64: views of one fused projection, as models have them."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(sequences, tokens, heads, 3, head_dim, dtype=torch.float64, generator=generator)
    query, key, value = fused.transpose(1, 2).unbind(3)
    return query, key, value


def gradients(
    module: PositionalEncoding, inputs: Inputs, *, fused: bool, tilings: dict[str, Tiling] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a weighted sum of it in the inputs and all parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad(set_to_none=True)
    encoding = module.encoding()
    if fused:
        output = fused_attention(leaves[0], leaves[1], leaves[2], encoding, tilings)  # type: ignore[arg-type]
    else:
        output = reference_attention(leaves[0], leaves[1], leaves[2], encoding)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    (output * weights.view_as(output)).sum().backward()  # type: ignore[no-untyped-call]
    found = dict(zip("qkv", (leaf.grad for leaf in leaves), strict=True))
    found.update({name: parameter.grad for name, parameter in module.named_parameters()})
    return output.detach(), {name: grad for name, grad in found.items() if grad is not None}


def check(
    layer: Layer,
    inputs: Inputs,
    *,
    dtype: torch.dtype = DTYPE,
    tolerance: float = ROUNDING,
    tilings: dict[str, Tiling] | None = None,
) -> None:
    """Compare outputs and gradients of a layer; errors count against the largest gradient of all."""
    heads, head_dim = inputs[0].shape[1], inputs[0].shape[3]
    module = random_module(layer, heads, head_dim, std=None)
    exact, expected = gradients(module.double(), inputs, fused=False)
    query, key, value = (x.to(DEVICE, dtype) for x in inputs)
    output, found = gradients(module.float().to(DEVICE), (query, key, value), fused=True, tilings=tilings)
    assert output.dtype == dtype
    assert relative_error(output, exact) < tolerance
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name].cpu().double() - gradient).abs().max())
        assert error < tolerance * largest, f"{name}: {error} of {largest}"


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    check(LAYERS[form], random_inputs(2, 21, 3, 16))


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_every_remainder(tokens: int) -> None:
    check(LAYERS["kerple-v1"], random_inputs(1, tokens, 3, 16))


@pytest.mark.parametrize(("heads", "head_dim", "width"), SHAPES)
def test_every_shape(heads: int, head_dim: int, width: int) -> None:
    check((WITH_BIAS["kerple"], DapeConfig(width=width)), random_inputs(1, 18, heads, head_dim))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim"), [(5, 32), (12, 80), (18, 80), (33, 64), (64, 128)])
@pytest.mark.parametrize("width", [0, 4, 7, 32, 64])
@pytest.mark.parametrize("tokens", [17, 70])
def test_every_shape_in_full(heads: int, head_dim: int, width: int, tokens: int) -> None:
    dape = DapeConfig(width=width) if width else None
    check((WITH_BIAS["t5"], dape), random_inputs(3, tokens, heads, head_dim))


@pytest.mark.parametrize("form", ["kerple", "kerple-v1"])
def test_float16_products(form: str) -> None:
    check(LAYERS[form], random_inputs(2, 21, 5, 32), dtype=torch.float16, tolerance=ROUNDING_16)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["alibi", "kerple-v1", "t5-v1", "nope-v1", "kerple-v1-add_residual"])
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (5, 32), (18, 64), (12, 80)])
def test_bfloat16_products(form: str, heads: int, head_dim: int) -> None:
    check(
        LAYERS[form], random_inputs(3, 333, heads, head_dim), dtype=torch.bfloat16, tolerance=2 * ROUNDING_16
    )


@pytest.mark.parametrize("rows", [16, 32])
def test_tiles_need_not_be_square(rows: int) -> None:
    tilings = {"forward": Tiling(rows, 48 - rows, 8, 1), "backward_keys": Tiling(rows, 48 - rows, 8, 1)}
    check(LAYERS["kerple-v1"], random_inputs(1, 37, 3, 16), tilings=tilings)


def test_what_does_not_learn_has_no_gradient_and_changes_no_other() -> None:
    """Tables are summed only where something in them learns."""
    query, key, value = (x.to(DEVICE, DTYPE) for x in random_inputs(1, 21, 3, 16))
    module = random_module(LAYERS["kerple-v1"], 3, 16).to(DEVICE)
    _, expected = gradients(module, (query, key, value), fused=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == "mlp2.2.weight")
    _, found = gradients(module, (query, key, value), fused=True)
    assert found.keys() == {"q", "k", "v", "mlp2.2.weight"}
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < ROUNDING, name


def test_the_same_numbers_every_time() -> None:
    inputs = tuple(x.to(DEVICE, DTYPE) for x in random_inputs(3, 21, 3, 16))
    module = random_module(LAYERS["kerple-v1"], 3, 16).to(DEVICE)
    first, second = (gradients(module, inputs, fused=True)[1] for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_may_come_in_any_layout() -> None:
    """The output is read as [B, H, N, d] or [B, N, H, d], and its gradient comes back as the reader likes."""
    module = random_module(LAYERS["kerple"], 3, 16).to(DEVICE)
    drawn = [x.to(DEVICE, DTYPE) for x in random_inputs(2, 21, 3, 16)]
    weights = torch.randn(2, 3, 21, 16, device=DEVICE, dtype=DTYPE)
    results = []
    for layout in (
        weights,
        weights.transpose(1, 2).contiguous().transpose(1, 2),
        weights[:1].expand_as(weights),
    ):
        leaves = [x.detach().requires_grad_() for x in drawn]
        output = fused_attention(leaves[0], leaves[1], leaves[2], module.encoding())
        output.backward(layout)  # type: ignore[no-untyped-call]
        results.append(leaves[1].grad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][0], results[2][0])


def test_what_is_kept_grows_with_the_length_only() -> None:
    """Beside q, k, v and the output: a number a row and padded head, and the tables."""
    module = random_module(LAYERS["kerple-v1"], 3, 16).to(DEVICE)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for tokens in (16, 32):
        kept.clear()
        leaves = [x.to(DEVICE, DTYPE).contiguous().requires_grad_() for x in random_inputs(1, tokens, 3, 16)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fused_attention(leaves[0], leaves[1], leaves[2], module.encoding())
        assert sum(kept.values()) < 8192 + 1600 * tokens


@pytest.mark.parametrize(
    ("layer", "dtype", "reason"),
    [
        ("kerple-v1", torch.float16, None),
        ("t5", torch.bfloat16, None),
        ("kerple-v1", torch.float32, "training in torch.float32"),
        ("fire-v1", torch.float16, "training with CoPE, DAPE kernels or biases that are no table"),
        ("kerple-v2-k3", torch.float16, "training with CoPE, DAPE kernels or biases that are no table"),
        ("cope", torch.float16, "training with CoPE, DAPE kernels or biases that are no table"),
    ],
)
def test_says_what_it_cannot_train(layer: str, dtype: torch.dtype, reason: str | None) -> None:
    query = torch.empty(1, 3, 5, 16, dtype=dtype, device=DEVICE)
    found = unsupported(random_encoding(LAYERS[layer], 3, 16), query, interpreted=DEVICE.type == "cpu")
    assert (found or "").startswith("" if reason is None else f"does not support {reason}")
    assert (found is None) == (reason is None)


def test_a_cpu_trains_block_by_block() -> None:
    query, key, value = (x.half().requires_grad_() for x in random_inputs(1, 5, 3, 16))
    encoding = random_encoding(LAYERS["kerple-v1"], 3, 16, torch.float32)
    assert unsupported(encoding, query) == "does not support cpu devices"
    taken = dense_attention(query, key, value, encoding)
    assert torch.equal(taken, blockwise_attention(query, key, value, encoding))


@pytest.mark.gpu
def test_a_gpu_trains_with_the_kernels() -> None:
    query, key, value = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in random_inputs(2, 70, 12, 64))
    encoding = random_module(LAYERS["kerple-v1"], 12, 64).to(DEVICE).encoding()
    taken = dense_attention(query, key, value, encoding)
    assert torch.equal(taken, fused_attention(query, key, value, encoding))
    assert relative_error(taken, blockwise_attention(query, key, value, encoding)) < ROUNDING_16


def test_the_pass_over_rows_has_square_tiles() -> None:
    """Its sums along diagonals go on from one tile of keys to the next."""
    for taps, wide, large, grouped in product((0, 1), *((False, True),) * 3):
        tiling = choose((9, 0), Case("backward_rows", wide, taps, large, grouped))
        assert tiling.rows == tiling.keys
