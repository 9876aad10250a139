"""Training attention on CUDA devices as one differentiable function: the launches in both directions.

Beside q, k, v, the output and their gradients it keeps one float32 number a row and head for the backward
pass, which takes another and a copy of the tables' gradients for each processor. Letters: B sequences, H
heads, G heads of a group, N tokens, d head size, D hidden width (rounded up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dape_kernels.encoding import Encoding
from dape_kernels.triton.backend import LARGE_HEAD, TritonBackend, capability, processors
from dape_kernels.triton.configs import Case, Phase, Tiling, choose, roomy
from dape_kernels.triton.encoding import GROUP, padded

if TYPE_CHECKING:  # Triton may be absent
    from dape_kernels.triton.dense.gradients import Sources
    from dape_kernels.triton.dense.tiles import Heads, Shape

DELTA_ROWS = 16
# Elements of a head that a program holds at a time, and with more than one group of heads.
PART, GROUPED_PART = 64, 32
# Of the backend that is asked what the kernels have in common; training has no cache.
ANY_BLOCK = 16


def unsupported(encoding: Encoding, query: Tensor, *, interpreted: bool = False) -> str | None:
    """Return why a layer cannot be trained here, None if it can.

    Args:
        encoding: of the layer.
        query: [B, H, N, d], for its dtype and device.
        interpreted: as of `TritonBackend`.
    """
    if not encoding.tabular:
        return "does not support training with CoPE, DAPE kernels or biases that are no table of the distance"
    if query.dtype == torch.float32:
        return "does not support training in torch.float32"
    if not roomy(capability(query.device)):
        return "does not support training on this device"
    return TritonBackend(interpreted=interpreted).unsupported(encoding, query.dtype, query.device, ANY_BLOCK)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoding: Encoding,
    tilings: Mapping[Phase, Tiling] | None = None,
) -> Tensor:
    """Causal attention of whole sequences, differentiable in q, k, v and the encoding's parameters.

    Args:
        query, key, value: [B, H, N, d], rotated already where the encoding is rotary.
        encoding: one that `unsupported` does not refuse; its parameters may require gradients.
        tilings: instead of the committed ones; for tuning.

    Returns:
        [B, H, N, d] in the dtype of `query`.
    """
    with torch.autocast(query.device.type, enabled=False):
        layer, weights = _lay_out(encoding, query, tilings or {})
        rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output: Tensor = _FusedAttention.apply(layer, *rows, *weights)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2)


def training_shape(
    heads: int, size: int, width: int, tiling: Tiling, *, keeps_scores: bool, wide: bool
) -> Shape:
    """Return what of a layer is compiled into the kernels of training.

    Args:
        heads: number of heads.
        size: of a head.
        width: hidden width, rounded up; 0 without a network.
        tiling: of the launch.
        keeps_scores: whether scores are added to what the network makes of them.
        wide: whether products are of float32 numbers.
    """
    from dape_kernels.triton.dense.tiles import Shape

    groups, dim = -(-heads // GROUP), padded(size)
    return Shape(
        HEADS=heads,
        SIZE=size,
        DIM=dim,
        PART=min(dim, GROUPED_PART if groups > 1 else PART),
        GROUPS=groups,
        WIDTH=width,
        KEEPS_SCORES=keeps_scores,
        PRECISION="ieee" if wide else "tf32",
        ROWS=tiling.rows,
        KEYS=tiling.keys,
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the launches of a layer have in common, but for the values of tensors."""

    encoding: Encoding
    width: int
    """D, rounded up; 0 without a network."""
    learns: bool
    """Whether gradients in the tables are wanted."""
    tilings: Mapping[Phase, Tiling]

    @property
    def groups(self) -> int:
        """Groups of heads."""
        return -(-self.encoding.heads // GROUP)

    def row_numbers(self, rows: Tensor) -> Tensor:
        """Return a new float32 tensor [B, N, GROUPS * G] for rows [B, N, H, d]."""
        shape = (*rows.shape[:2], self.groups * GROUP)
        return torch.empty(shape, dtype=torch.float32, device=rows.device)

    def launch(self, phase: Phase, query: Tensor) -> tuple[Shape, dict[str, int]]:
        """Return what is compiled into one kind of launch, and Triton's options for it."""
        wide = query.dtype == torch.float32
        case = Case(
            phase,
            wide=wide,
            taps=min(self.width, 1),
            large=self.encoding.head_dim > LARGE_HEAD,
            grouped=self.groups > 1,
        )
        tiling = self.tilings.get(phase) or choose(capability(query.device), case)
        dape = self.encoding.dape
        shape = training_shape(
            self.encoding.heads,
            self.encoding.head_dim,
            self.width,
            tiling,
            keeps_scores=dape is None or dape.keeps_scores,
            wide=wide,
        )
        return shape, {"num_warps": tiling.warps, "num_stages": tiling.stages}


def _lay_out(
    encoding: Encoding, query: Tensor, tilings: Mapping[Phase, Tiling]
) -> tuple[_Layer, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the layer with its weights [GROUPS, G, D] and tables [N, X] as the kernels read them, float32.

    Differentiable: how gradients come back to the encoding's parameters is PyTorch's affair.
    """
    dape = encoding.dape
    width = 0 if dape is None else padded(len(dape.hidden_bias))
    tables = encoding.with_tables(query.shape[2], query.device).tables
    assert tables is not None
    learns = any(table is not None and table.requires_grad for table in (tables.residual, tables.hidden))
    layer = _Layer(encoding, width, learns, tilings)
    groups = layer.groups

    def pad(rows: Tensor, size: int) -> Tensor:
        return functional.pad(rows.float(), (0, size - rows.shape[1])).contiguous()

    residual = pad(tables.residual.t(), groups * GROUP)
    if dape is None or tables.hidden is None:
        nothing = residual.new_empty(0)
        return layer, (nothing, nothing, nothing, residual)

    def by_groups(weights: Tensor) -> Tensor:
        """Lay out [H, D]."""
        rest = groups * GROUP - encoding.heads
        return functional.pad(pad(weights, width), (0, 0, 0, rest)).view(groups, GROUP, width)

    first, second = by_groups(dape.score_weight[..., 0].t()), by_groups(dape.out_weight[..., 0])
    return layer, (first, pad(tables.hidden.t(), width), second, residual)


class _FusedAttention(torch.autograd.Function):
    """softmax(adapt(q k / sqrt(d))) v of q, k and v [B, N, H, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: _Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        hidden: Tensor,
        second: Tensor,
        residual: Tensor,
    ) -> Tensor:
        from dape_kernels.triton.dense.forward import forward_kernel
        from dape_kernels.triton.dense.tiles import Network

        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        dtype = query.dtype
        network = Network(first.to(dtype), hidden.to(dtype), second.to(dtype), residual)
        sequences, tokens = query.shape[:2]
        shape, options = layer.launch("forward", query)
        output = torch.empty(query.shape, dtype=dtype, device=query.device)
        lse = layer.row_numbers(query)
        forward_kernel[(-(-tokens // shape.ROWS), layer.groups, sequences)](
            *map(_heads, rows),
            network,
            output,
            lse,
            tokens,
            layer.encoding.scale,
            SHAPE=shape,
            **options,
        )
        ctx.save_for_backward(*rows, output, lse, *network)
        ctx.layer = layer
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from dape_kernels.triton.dense.gradients import Sources
        from dape_kernels.triton.dense.tiles import Network

        layer: _Layer = ctx.layer
        query, key, value, output, lse, *network = ctx.saved_tensors
        gradient = gradient.contiguous()
        delta = _delta(layer, output, gradient)
        rows = map(_heads, (query, key, value))
        sources = Sources._make((*rows, gradient, lse, delta, Network(*network)))
        of_key, of_value = _pass_over_keys(layer, gradient, sources)
        of_query, *of_weights = _pass_over_rows(layer, gradient, sources)
        return None, of_query, of_key, of_value, *of_weights


def _heads(rows: Tensor) -> Heads:
    """Return a tensor [B, N, H, d] as the kernels take it."""
    from dape_kernels.triton.dense.tiles import Heads

    return Heads(rows, *rows.stride()[:3])


def _delta(layer: _Layer, output: Tensor, gradient: Tensor) -> Tensor:
    """Return the sums [B, N, GROUPS * G] of outputs times their gradients."""
    from dape_kernels.triton.dense.backward import delta_kernel

    sequences, tokens = output.shape[:2]
    delta = layer.row_numbers(output)
    shape = layer.launch("forward", output)[0]._replace(ROWS=DELTA_ROWS)
    grid = (-(-tokens // DELTA_ROWS), layer.groups, sequences)
    delta_kernel[grid](output, gradient, delta, tokens, SHAPE=shape)
    return delta


def _pass_over_keys(layer: _Layer, gradient: Tensor, sources: Sources) -> tuple[Tensor, Tensor]:
    """Return the gradients [B, N, H, d] in k and v."""
    from dape_kernels.triton.dense.backward import keys_kernel

    sequences, tokens = gradient.shape[:2]
    shape, options = layer.launch("backward_keys", gradient)
    of_key, of_value = torch.empty_like(gradient), torch.empty_like(gradient)
    keys_kernel[(-(-tokens // shape.KEYS), layer.groups * shape.DIM // shape.PART, sequences)](
        sources,
        of_key,
        of_value,
        tokens,
        layer.encoding.scale,
        SHAPE=shape,
        **options,
    )
    return of_key, of_value


def _pass_over_rows(layer: _Layer, gradient: Tensor, sources: Sources) -> tuple[Tensor | None, ...]:
    """Return the gradients in q [B, N, H, d], and those in weights and tables as `_lay_out` lays them out."""
    from dape_kernels.triton.dense.backward import Sums, rows_kernel

    sequences, tokens = gradient.shape[:2]
    shape, options = layer.launch("backward_rows", gradient)
    groups, width = layer.groups, layer.width
    programs = min(-(-tokens // shape.ROWS) * sequences, processors(gradient.device))
    known = tokens if layer.learns else 0
    residual: Tensor = sources.network.residual  # float32, as all gradients in parameters are
    of_query = torch.empty_like(gradient)
    sums = Sums(
        first=residual.new_empty(programs, groups, GROUP, width),
        hidden=residual.new_zeros(programs, known, width),
        second=residual.new_empty(programs, groups, GROUP, width),
        residual=residual.new_zeros(programs, groups, known, GROUP),
    )
    rows_kernel[(programs, groups * shape.DIM // shape.PART)](
        sources,
        of_query,
        sums,
        sequences,
        tokens,
        layer.encoding.scale,
        LEARNS=layer.learns,
        SHAPE=shape,
        **options,
    )
    return (
        of_query,
        sums.first.sum(0) if width else None,
        sums.hidden.sum(0) if width and known else None,
        sums.second.sum(0) if width else None,
        sums.residual.sum(0).transpose(0, 1).flatten(1) if known else None,
    )
