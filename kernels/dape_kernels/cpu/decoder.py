"""All layers of a decoder in one call of the library, with weights packed for its kernels.

Letters: T rows of a batch, R rows, h hidden size, G numbers in a word, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer

import torch
from torch import Tensor, nn
from torch.nn import functional

from dape_kernels.cpu.cache import FLOATS, WORD, PanelCache
from dape_kernels.cpu.encoding import PreparedEncoding
from dape_kernels.cpu.layout import Layout, batch_struct
from dape_kernels.cpu.library import (
    PANEL,
    STORAGE,
    DecoderStruct,
    LayerStruct,
    LinearStruct,
    NormStruct,
    TallyStruct,
    load,
    multiplies_bfloat16,
)
from dape_kernels.decoder import DecoderModules, Tally
from dape_kernels.paged import RaggedBatch
from dape_kernels.quantized import Int8Linear, Linear

OUTPUTS = 64  # that the library multiplies at a time
LINEAR_ROWS = 192  # for which it does so
TALLY_ITEMS = 4  # pieces of work for each thread, so that they end together


def decoder_obstacle(modules: DecoderModules) -> str | None:
    """Return why a decoder cannot run here, None if it can."""
    linears = [
        linear
        for layer in modules.layers
        for linear in (layer.query_key_value, layer.dense, layer.up, layer.down)
    ]
    if modules.dtype not in FLOATS:
        return f"weights of {modules.dtype}"
    odd = next((linear.in_features for linear in linears if linear.in_features % 8), None)
    return None if odd is None else f"layers with {odd} inputs, no multiple of 8"


class CpuDecoder:
    """See `Decoder`. Products are bfloat16 where the weights are and the processor can, else float32."""

    def __init__(
        self,
        modules: DecoderModules,
        caches: Sequence[PanelCache],
        encodings: Sequence[PreparedEncoding],
        length: int,
    ):
        self._kept: list[object] = [caches]  # what the structs point to
        self._length = length
        self._cache = caches[0]
        self._dtype = modules.dtype
        layers = []
        for index, (layer, cache, encoding) in enumerate(zip(modules.layers, caches, encodings, strict=True)):
            # One layer after another, so that no other layer's weights are there beside their packed copy.
            with modules.weights(index):
                layers.append(
                    LayerStruct(
                        attention_norm=self._norm(layer.attention_norm),
                        mlp_norm=self._norm(layer.mlp_norm),
                        query_key_value=self._linear(layer.query_key_value),
                        dense=self._linear(layer.dense),
                        up=self._linear(layer.up),
                        down=self._linear(layer.down),
                        cache=cache.struct,
                        encoding=encoding.struct(length),
                    )
                )
        self._kept += [encoding.tensors for encoding in encodings]
        self._layers = (LayerStruct * len(layers))(*layers)
        self._struct = DecoderStruct(
            layers=pointer(self._layers[0]),
            num_layers=len(layers),
            norm=self._norm(modules.norm),
            hidden=modules.norm.normalized_shape[0],
            epsilon=modules.norm.eps,
            parallel_residual=modules.parallel_residual,
            type=STORAGE[self._dtype],
            gelu_tanh=modules.gelu_tanh,
        )
        self._output = self._linear(modules.output)

    def run(self, x: Tensor, batch: RaggedBatch, layers: range | None = None) -> Tensor:
        """See `Decoder.run`.

        Raises:
            ValueError: rows or contexts that do not fit.
        """
        layout = Layout.of(batch, self._cache)
        shape = (layout.rows, self._struct.hidden)
        if x.dtype != torch.float32 or x.shape != shape or not x.is_contiguous():
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected contiguous float32 {list(shape)}")
        if layout.longest > self._length:
            raise ValueError(
                f"a context has {layout.longest} tokens, the decoder was made for {self._length}"
            )
        if batch.shard is not None:
            raise ValueError("keys spread over ranks are not supported by the fused decoder")
        count = self._struct.num_layers
        first, last = (0, count) if layers is None else (layers.start, layers.stop)
        if not 0 <= first < last <= count:
            raise ValueError(f"layers {first} to {last - 1} are not among 0 to {count - 1}")
        out = torch.empty_like(x) if last == count else x
        call = batch_struct(layout, batch)
        if load().dape_decode(byref(self._struct), byref(call), first, last, x.data_ptr(), out.data_ptr()):
            raise MemoryError("no memory for the scratch of the decoder")
        return out

    def tally(self, hidden: Tensor, targets: Tensor, marks: Tensor) -> Tally:
        """See `Decoder.tally`."""
        rows = self._activations(hidden)
        count, threads = len(rows), torch.get_num_threads()
        # Enough pieces of work for all threads, however few rows there are.
        parts = max(
            1, min(TALLY_ITEMS * threads // -(-count // LINEAR_ROWS), self._output.outputs // OUTPUTS)
        )
        own = torch.empty(count)
        peak, total, above, best = torch.empty(4, parts, count)
        best_id = torch.empty(parts, count, dtype=torch.int64)
        places = (targets.contiguous(), marks.contiguous(), own, peak, total, above, best, best_id)
        load().dape_tally(
            byref(self._output),
            rows.data_ptr(),
            STORAGE[rows.dtype],
            rows.stride(0),
            count,
            byref(TallyStruct(*(place.data_ptr() for place in places), parts)),
            threads,
        )
        highest = peak.amax(0)
        # The first of equal parts, as their tokens rise.
        largest, part = best.max(0)
        return Tally(
            own=own,
            peak=highest,
            total=(total * (peak - highest).exp_()).sum(0),
            above=above.long().sum(0),
            best=largest,
            best_id=best_id.gather(0, part[None])[0],
        )

    def _activations(self, hidden: Tensor) -> Tensor:
        narrow = self._dtype == torch.bfloat16 and multiplies_bfloat16()
        return hidden.to(self._dtype if narrow else torch.float32).contiguous()

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        rows = self._activations(hidden)
        scores = torch.empty(len(hidden), self._output.outputs)
        load().dape_linear(
            byref(self._output),
            rows.data_ptr(),
            STORAGE[rows.dtype],
            rows.stride(0),
            len(hidden),
            scores.data_ptr(),
            torch.get_num_threads(),
        )
        return scores

    def _norm(self, norm: nn.LayerNorm) -> NormStruct:
        return NormStruct(weight=self._keep(norm.weight.float()), bias=self._keep(norm.bias.float()))

    def _linear(self, linear: Linear) -> LinearStruct:
        packed = pack_weight(linear.weight.detach())
        return LinearStruct(
            weight=self._keep(packed),
            scale=self._by_output(linear.scale) if isinstance(linear, Int8Linear) else None,
            bias=None if linear.bias is None else self._by_output(linear.bias.detach()),
            inputs=linear.in_features,
            outputs=linear.out_features,
            storage=STORAGE[packed.dtype],
        )

    def _by_output(self, numbers: Tensor) -> int:
        """Keep one number for each output as floats, filled up with zeros to what is multiplied at a time."""
        return self._keep(functional.pad(numbers.float(), (0, -len(numbers) % OUTPUTS)))

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def pack_weight(weight: Tensor) -> Tensor:
    """Return a weight [outputs, inputs] as panels [outputs / 16, inputs / G, 16, G], filled up with zeros.

    Float32 weights that are bfloat16 numbers, as those of most model files, are stored as such: products
    stay float32, and half as much memory is read.
    """
    kept = weight
    if weight.dtype == torch.float32:
        narrow = weight.bfloat16()
        if torch.equal(narrow.float(), weight):
            kept = narrow
    lanes = WORD // kept.dtype.itemsize
    missing = -len(kept) % OUTPUTS
    filled = functional.pad(kept, (0, 0, 0, missing)) if missing else kept.contiguous()
    if filled.storage_offset() % lanes:  # in the middle of a word of a file
        filled = filled.clone()
    # Words are moved as a whole: several times as fast as their parts.
    words = filled.view(torch.int32).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    panels: Tensor = words.view(kept.dtype).unflatten(-1, (PANEL, lanes))
    return panels
