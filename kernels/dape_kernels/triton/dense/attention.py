"""Training attention on CUDA devices as one differentiable function: the launches in both directions.

Beside q, k, v, the output and their gradients it keeps one float32 number a row and head for the backward
pass, which takes another and a copy of the tables' gradients for each processor. Letters: B sequences, H
heads, G heads of a group, N tokens, d head size, D hidden width (rounded up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dape_kernels.encoding import Encoding
from dape_kernels.triton.backend import LARGE_HEAD, TritonBackend, capability, processors
from dape_kernels.triton.configs import Case, Phase, Tiling, choose, roomy
from dape_kernels.triton.encoding import GROUP, padded

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


def training_settings(heads: int, size: int, width: int, *, keeps_scores: bool, wide: bool) -> dict[str, Any]:
    """Return what of a layer is compiled into all kernels of training.

    Args:
        heads: number of heads.
        size: of a head.
        width: hidden width, rounded up; 0 without a network.
        keeps_scores: whether scores are added to what the network makes of them.
        wide: whether products are of float32 numbers.
    """
    groups = -(-heads // GROUP)
    return {
        "HEADS": heads,
        "SIZE": size,
        "DIM": padded(size),
        "PART": min(padded(size), GROUPED_PART if groups > 1 else PART),
        "GROUPS": groups,
        "WIDTH": width,
        "KEEPS_SCORES": keeps_scores,
        "PRECISION": "ieee" if wide else "tf32",
    }


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the launches of a layer have in common, but for the values of tensors."""

    settings: dict[str, Any]
    scale: float
    learns: bool
    """Whether gradients in the tables are wanted."""
    tilings: Mapping[Phase, Tiling]

    @property
    def programs(self) -> int:
        """How many programs share a tile of the backward pass: groups of heads, and parts of a head."""
        programs: int = self.settings["GROUPS"] * (self.settings["DIM"] // self.settings["PART"])
        return programs

    def row_numbers(self, rows: Tensor) -> Tensor:
        """Return a new float32 tensor [B, N, GROUPS * G] for rows [B, N, H, d]."""
        shape = (*rows.shape[:2], self.settings["GROUPS"] * GROUP)
        return torch.empty(shape, dtype=torch.float32, device=rows.device)

    def tiling(self, phase: Phase, query: Tensor) -> Tiling:
        """Return the tiling of one kind of launch."""
        if phase in self.tilings:
            return self.tilings[phase]
        case = Case(
            phase,
            wide=query.dtype == torch.float32,
            taps=min(self.settings["WIDTH"], 1),
            large=self.settings["SIZE"] > LARGE_HEAD,
            grouped=self.settings["GROUPS"] > 1,
        )
        return choose(capability(query.device), case)


def _lay_out(
    encoding: Encoding, query: Tensor, tilings: Mapping[Phase, Tiling]
) -> tuple[_Layer, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the layer with its weights [GROUPS, G, D] and tables [N, X] as the kernels read them, float32.

    Differentiable: how gradients come back to the encoding's parameters is PyTorch's affair.
    """
    dape, groups = encoding.dape, -(-encoding.heads // GROUP)
    width = 0 if dape is None else padded(len(dape.hidden_bias))
    settings = training_settings(
        encoding.heads,
        encoding.head_dim,
        width,
        keeps_scores=dape is None or dape.keeps_scores,
        wide=query.dtype == torch.float32,
    )
    tables = encoding.with_tables(query.shape[2], query.device).tables
    assert tables is not None
    learns = any(table is not None and table.requires_grad for table in (tables.residual, tables.hidden))
    layer = _Layer(settings, encoding.scale, learns, tilings)

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

        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        network = (tensor.to(query.dtype) for tensor in (first, hidden, second))
        weights = (*network, residual)
        sequences, tokens = query.shape[:2]
        tiling = layer.tiling("forward", query)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = layer.row_numbers(query)
        forward_kernel[(-(-tokens // tiling.rows), layer.settings["GROUPS"], sequences)](
            *_strided(rows),
            *weights,
            output,
            lse,
            tokens,
            layer.scale,
            **layer.settings,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        ctx.save_for_backward(*rows, output, lse, *weights)
        ctx.layer = layer
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer: _Layer = ctx.layer
        query, key, value, output, lse, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        delta = _delta(layer, output, gradient)
        sources = (*_strided([query, key, value]), gradient, lse, delta, *weights)
        of_key, of_value = _pass_over_keys(layer, gradient, sources)
        of_query, *of_weights = _pass_over_rows(layer, gradient, sources)
        return None, of_query, of_key, of_value, *of_weights


def _strided(tensors: list[Tensor]) -> list[Any]:
    """Return tensors [B, N, H, d] with their strides, as the kernels take them."""
    return [part for tensor in tensors for part in (tensor, *tensor.stride()[:3])]


def _delta(layer: _Layer, output: Tensor, gradient: Tensor) -> Tensor:
    """Return the sums [B, N, GROUPS * G] of outputs times their gradients."""
    from dape_kernels.triton.dense.backward import delta_kernel

    sequences, tokens = output.shape[:2]
    delta = layer.row_numbers(output)
    settings = {name: layer.settings[name] for name in ("HEADS", "SIZE", "DIM", "GROUPS")}
    grid = (-(-tokens // DELTA_ROWS), settings["GROUPS"], sequences)
    delta_kernel[grid](output, gradient, delta, tokens, **settings, ROWS=DELTA_ROWS)
    return delta


def _pass_over_keys(layer: _Layer, gradient: Tensor, sources: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the gradients [B, N, H, d] in k and v."""
    from dape_kernels.triton.dense.backward import keys_kernel

    sequences, tokens = gradient.shape[:2]
    tiling = layer.tiling("backward_keys", gradient)
    of_key, of_value = torch.empty_like(gradient), torch.empty_like(gradient)
    keys_kernel[(-(-tokens // tiling.keys), layer.programs, sequences)](
        *sources,
        of_key,
        of_value,
        tokens,
        layer.scale,
        **layer.settings,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return of_key, of_value


def _pass_over_rows(layer: _Layer, gradient: Tensor, sources: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients in q [B, N, H, d], and those in weights and tables as `_lay_out` lays them out."""
    from dape_kernels.triton.dense.backward import rows_kernel

    sequences, tokens = gradient.shape[:2]
    tiling = layer.tiling("backward_rows", gradient)
    groups, width = layer.settings["GROUPS"], layer.settings["WIDTH"]
    programs = min(-(-tokens // tiling.rows) * sequences, processors(gradient.device))
    known = tokens if layer.learns else 0
    residual: Tensor = sources[-1]  # float32, as all gradients in parameters are
    of_query = torch.empty_like(gradient)
    of_first, of_second = residual.new_empty(2, programs, groups, GROUP, width)
    of_hidden = residual.new_zeros(programs, known, width)
    of_residual = residual.new_zeros(programs, groups, known, GROUP)
    rows_kernel[(programs, layer.programs)](
        *sources,
        of_query,
        of_first,
        of_hidden,
        of_second,
        of_residual,
        sequences,
        tokens,
        layer.scale,
        **layer.settings,
        LEARNS=layer.learns,
        TILE=tiling.rows,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return (
        of_query,
        of_first.sum(0) if width else None,
        of_hidden.sum(0) if width and known else None,
        of_second.sum(0) if width else None,
        of_residual.sum(0).transpose(0, 1).flatten(1) if known else None,
    )
