"""Training's attention: its values and gradients against the definition, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dape_engine.encoding import PositionalEncoding
from dape_kernels.dense import attention, dense_attention
from dape_kernels.dense.blocks import CPU_BLOCK, BlockSize
from dape_kernels.reference import reference_attention
from layers import LAYERS, OFFICIAL, Layer, PeakMemory, random_module, random_sequence, relative_error

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

ALL_LAYERS: dict[str, Layer] = {**LAYERS, **OFFICIAL}
Inputs = tuple[Tensor, Tensor, Tensor]


def random_batch(sequences: int, tokens: int, heads: int, head_dim: int) -> Inputs:
    """q, k and v [B, H, N, d] in float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        random_sequence(tokens, tokens, heads, head_dim, torch.float64, generator) for _ in range(sequences)
    ]
    query, key, value = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return query, key, value


def gradients(module: PositionalEncoding, inputs: Inputs, *, dense: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a weighted sum of it in the inputs and all parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad(set_to_none=True)
    attend = dense_attention if dense else reference_attention
    output = attend(leaves[0], leaves[1], leaves[2], module.encoding())
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    found = dict(zip("qkv", (leaf.grad for leaf in leaves), strict=True))
    found.update({name: parameter.grad for name, parameter in module.named_parameters()})
    return output.detach(), {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("kept", [0, 60_000, 1 << 30], ids=["recomputed", "partly-kept", "kept"])
@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_gradients_are_those_of_the_definition(
    layer: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients in q, k, v and every parameter, over several blocks of rows and of sequences."""
    monkeypatch.setattr(attention, "CPU_BLOCK", BlockSize(pairs=3 * 16 * 37, rows=16))
    monkeypatch.setattr(attention, "KEPT_BYTES", kept)
    module = random_module(ALL_LAYERS[layer], heads=3, head_dim=4).double()
    inputs = random_batch(5, 37, 3, 4)
    output, found = gradients(module, inputs, dense=True)
    expected_output, expected = gradients(module, inputs, dense=False)
    assert relative_error(output, expected_output) < 1e-12
    assert found.keys() == expected.keys()
    assert {"q", "k", "v"} <= found.keys()
    # Some gradients are exactly zero: softmax does not change when a head's scores all shift.
    limit = 1e-10 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=limit), name


class Attending(torch.nn.Module):
    """Attention as a module, so that its parameters can be handed to it."""

    def __init__(self, position: PositionalEncoding):
        super().__init__()
        self.position = position

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dense_attention(query, key, value, self.position.encoding())


@pytest.mark.parametrize("layer", ["kerple", "alibi-v1", "fire-v1", "t5-v2-k3", "nope-v2-k5", "cope"])
def test_gradients_are_those_of_finite_differences(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CPU_BLOCK", BlockSize(pairs=18, rows=3))
    monkeypatch.setattr(attention, "KEPT_BYTES", 300)
    module = Attending(random_module(ALL_LAYERS[layer], heads=2, head_dim=3).double())
    names = [name for name, _ in module.named_parameters()]
    inputs = random_batch(2, 6, 2, 3)

    def attend(*leaves: Tensor) -> Tensor:
        values = dict(zip(names, leaves[3:], strict=True))
        output: Tensor = torch.func.functional_call(module, values, leaves[:3])
        return output

    leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, *module.parameters())]
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("layer", ["kerple", "kerple-v1", "fire-v1", "kerple-v2-k3", "cope"])
def test_half_precision_keeps_its_dtype_and_its_digits(layer: str) -> None:
    """Under autocast q, k and v are bfloat16; parameters, softmax and sums over blocks stay wider."""
    module = random_module(ALL_LAYERS[layer], heads=4, head_dim=8, std=0.2)
    exact, expected = gradients(module.double(), random_batch(3, 70, 4, 8), dense=True)
    inputs = [x.bfloat16() for x in random_batch(3, 70, 4, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, found = gradients(module.float(), (inputs[0], inputs[1], inputs[2]), dense=True)
    assert output.dtype == found["q"].dtype == found["k"].dtype == torch.bfloat16
    assert relative_error(output, exact) < 0.03
    limit = 0.03 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert found[name].dtype == (torch.bfloat16 if name in "qkv" else torch.float32)
        assert torch.allclose(found[name].double(), gradient.double(), rtol=0.1, atol=limit), name


def kept_bytes(layer: str, tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, those of q, k, v and parameters left out."""
    module = random_module(ALL_LAYERS[layer], heads=2, head_dim=4)
    inputs = [x.float().requires_grad_() for x in random_batch(1, tokens, 2, 4)]
    known = {x.untyped_storage().data_ptr() for x in (*inputs, *module.parameters())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = dense_attention(inputs[0], inputs[1], inputs[2], module.encoding())
    assert output.requires_grad
    return sum(size for address, size in found.items() if address not in known)


@pytest.mark.parametrize("layer", ["kerple", "kerple-v1", "fire-v1", "kerple-v2-k3", "cope"])
def test_what_is_kept_grows_no_faster_than_the_length(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT_BYTES", 0)
    short, long = kept_bytes(layer, 200), kept_bytes(layer, 800)
    assert long < 4.1 * short
    monkeypatch.setattr(attention, "KEPT_BYTES", 400_000)
    assert short < kept_bytes(layer, 200) <= short + 400_000
    assert kept_bytes(layer, 800) <= long + 400_000


@pytest.mark.parametrize(
    ("layer", "tokens", "most"),
    [
        ("kerple-v1", 4096, 1 << 27),
        ("fire-v1", 1024, 1 << 26),
        ("kerple-v2-k3", 1024, 1 << 26),
        ("cope", 1024, 1 << 26),
    ],
)
def test_a_step_takes_little_memory(
    layer: str, tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores of 8 heads and 4096 tokens are 512 MiB, and the plain form holds a dozen times as much."""
    monkeypatch.setattr(attention, "KEPT_BYTES", 1 << 24)
    module = random_module(ALL_LAYERS[layer], heads=8, head_dim=8)
    query, key, value = (x.float().requires_grad_() for x in random_batch(1, tokens, 8, 8))
    with PeakMemory() as memory:
        dense_attention(query, key, value, module.encoding()).sum().backward()
    assert 1 << 24 < memory.peak < most


@pytest.mark.parametrize("margin", [0, 8])
@pytest.mark.parametrize(("sequences", "tokens"), [(16, 128), (16, 256), (1, 512), (2, 70000)])
def test_blocks_cover_every_row_once_and_are_small(sequences: int, tokens: int, margin: int) -> None:
    """Products over more pairs than a block's have crashed oneDNN."""
    covered = torch.zeros(sequences, tokens, dtype=torch.int32)
    stop, shapes = tokens, set()
    for group in CPU_BLOCK.groups(sequences, tokens, margin):
        assert {block.rows.stop for block in group} == {stop}
        stop = group[0].rows.start
        for block in group:
            covered[block.sequences, block.rows] += 1
            count = (block.sequences.stop - block.sequences.start) * (block.rows.stop - block.rows.start)
            assert count * (block.keys.stop + margin) <= CPU_BLOCK.pairs or count == 1
            assert block.rows.stop <= block.keys.stop <= tokens
            shapes.add((block.rows.stop - block.rows.start, block.keys.stop))
    assert len({keys for _, keys in shapes}) <= 16
    assert (covered == 1).all()
