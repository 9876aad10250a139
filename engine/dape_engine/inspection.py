"""What one query sees of its keys: the scores, the static bias and the adapted bias of every head.

The text up to the query is read as any other background work, so that its keys lie in the cache. Then
the query's own row is computed once more, layer by layer in PyTorch, and each layer's biases come from the
definition (`row_scores`) over the keys that attention itself reads. Letters: K keys reported.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dape_engine.errors import DapeError, ModelFolderError, RequestError, StepError
from dape_engine.jobs import Job, deadline_error
from dape_engine.model import DapeForCausalLM
from dape_engine.request import BACKGROUND, RequestStats, Scheduling
from dape_engine.runner import ModelRunner
from dape_engine.sequence import Sequence
from dape_engine.step import ChunkResult
from dape_kernels.attention import paged_attention
from dape_kernels.paged import RaggedBatch
from dape_kernels.reference_backend import row_scores

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class InspectionRequest:
    """One query of one input, and which layers, heads and keys are reported of it."""

    request_id: str
    token_ids: tuple[int, ...]
    """Tokens after the query play no part."""
    query: int
    """Position of the query, from 0."""
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    max_keys: int | None = None
    """Of more keys, only so many are reported, see `thinned`; all of them are read in any case."""
    scheduling: Scheduling = BACKGROUND


@dataclass(frozen=True, slots=True)
class LayerBias:
    """One layer's view of the keys. All [heads asked for, K], in nats: the softmax takes their exponential.

    The layer attends by softmax(scores + adapted_bias); without DAPE the adapted bias is the static one.
    """

    layer: int
    scores: Floats
    """A = q k / sqrt(d)."""
    static_bias: Floats
    """B, of the positions alone."""
    adapted_bias: Floats
    """B + f(A, B); for forms that drop a residual, all that is added to A."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The answer to an inspection, layers in the order asked for."""

    layers: tuple[LayerBias, ...]
    keys: tuple[int, ...]
    """Positions of the reported keys."""
    num_cached_tokens: int
    """Tokens before the query taken from the prefix cache."""


class LayerWeights:
    """A model whose layers PyTorch can run, for as long as inspections need it.

    A backend that runs whole decoders keeps the layers' weights in a form of its own, and the runner has
    given up PyTorch's. They are then read again from the model folder, once for all inspections at work,
    and forgotten with the last of them.
    """

    def __init__(self, reload: Callable[[], DapeForCausalLM], runner: ModelRunner):
        self._reload = reload
        self._served = runner.model
        self._lock = threading.Lock()
        self._loaded: weakref.ref[DapeForCausalLM] | None = None

    def get(self) -> DapeForCausalLM:
        """Return the model; reads files, so not for the engine's thread or an event loop.

        Raises:
            ModelFolderError: the folder is gone or holds another model by now.
            NoMemoryError: there is no room for them beside those in use.
        """
        if len(self._served.layers):
            return self._served
        with self._lock:
            model = None if self._loaded is None else self._loaded()
            if model is None:
                model = self._reload()
                same = model.config == self._served.config
                if not same or not torch.equal(
                    model.word_embeddings.weight, self._served.word_embeddings.weight
                ):
                    raise ModelFolderError("the model folder has changed since the server started")
                self._loaded = weakref.ref(model)
            return model


class InspectionJob(Job):
    """One inspection: a prompt that generates nothing, and a look at its last row."""

    kind = "inspect"

    def __init__(self, request: InspectionRequest, model: DapeForCausalLM) -> None:
        super().__init__(request.request_id, request.scheduling)
        self.request = request
        self._model = model
        self._found: tuple[LayerBias, ...] | DapeError | None = None

    def next_sequences(self) -> list[Sequence]:
        if self.sequences:
            return []
        request = self.request
        # The last token of a text that generates nothing is never read: one more stands behind the query.
        tokens = [*request.token_ids[: request.query + 1], request.token_ids[request.query]]
        place = request.scheduling
        self.sequences = [
            Sequence(
                request.request_id,
                tokens,
                priority=place.priority,
                tenant=place.tenant,
                cache_salt=place.cache_salt,
            )
        ]
        return self.sequences

    def look(self, sequence: Sequence, runner: ModelRunner) -> None:
        """Compute the row where all keys are in the cache; a failure is this request's alone."""
        try:
            self._found = inspect_row(self.request, self._model, runner, sequence.blocks)
        except DapeError as error:
            self._found = error
        except Exception as error:
            self._found = StepError(f"the model failed on this request: {type(error).__name__}")

    def advance(self, sequence: Sequence, result: ChunkResult) -> bool:  # noqa: ARG002 (nothing is scored)
        if sequence.num_remaining > 0:
            return False
        if isinstance(self._found, tuple):
            keys = thinned(self.request.query + 1, self.request.max_keys)
            self.mailbox.put(Inspection(self._found, keys, self.num_cached))
            self.finish("stop")
        else:
            self.finish("abort", self._found)
        return True

    def expire(self) -> None:
        self.finish("abort", deadline_error())

    def stats(self) -> RequestStats:
        return self._request_stats(self.request.query + 1, 0, 0)


def check_inspection(request: InspectionRequest, layers: int, heads: int) -> None:
    """Refuse positions, layers and heads that do not exist.

    Raises:
        RequestError: names the field, the limit and the value.
    """
    length = len(request.token_ids)
    bounds = (
        ("query", (request.query,), length, f"an input of {length} tokens"),
        ("layers", request.layers, layers, f"a model of {layers} layers"),
        ("heads", request.heads, heads, f"a model of {heads} heads"),
    )
    for field, values, count, of in bounds:
        if not values:
            raise RequestError(f"{field}: at least one is needed", param=field)
        for value in values:
            if not 0 <= value < count:
                raise RequestError(
                    f"{field}: must be from 0 to {count - 1} for {of}, got {value}", param=field
                )


def thinned(count: int, most: int | None) -> tuple[int, ...]:
    """Return at most `most` of the positions 0 to count - 1, evenly spaced, with both ends.

    Of one position the last is kept.
    """
    if most is None or count <= most:
        return tuple(range(count))
    if most == 1:
        return (count - 1,)
    return tuple(round(index * (count - 1) / (most - 1)) for index in range(most))


@torch.inference_mode()
def inspect_row(
    request: InspectionRequest, model: DapeForCausalLM, runner: ModelRunner, blocks: list[int]
) -> tuple[LayerBias, ...]:
    """Compute the query's row through the layers and return what the wanted ones see.

    Args:
        request: checked by `check_inspection`.
        model: with layers that PyTorch can run; the same weights as the runner's.
        runner: owner of the caches, which hold keys and values up to the query.
        blocks: of the sequence.

    Raises:
        StepError: a score is not finite.
    """
    device = runner.device
    batch = RaggedBatch(
        query_starts=[0, 1],
        context_lens=[request.query + 1],
        block_tables=torch.tensor([blocks], dtype=torch.int32, device=device),
        block_size=runner.block_size,
        segments=None if runner.segments is None else runner.segments.segment,
    )
    heads = torch.tensor(request.heads, device=device)[:, None]
    keys = torch.tensor(thinned(request.query + 1, request.max_keys), device=device)
    found: dict[int, LayerBias] = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001 (cached)
        cache = runner.caches[layer]
        if layer in request.layers:
            row = row_scores(query, cache, batch, model.encodings[layer].encoding(), 0)
            if not bool((row.scores + row.adapted_bias).isfinite().all()):
                raise StepError("the model's scores are not finite")
            parts = (row.scores, row.static_bias, row.adapted_bias)
            found[layer] = LayerBias(layer, *(part[heads, keys].float().cpu().numpy() for part in parts))
        output, _ = paged_attention(
            query, cache, batch, runner.encodings[layer], backend=runner.backend, workspace=runner.workspace
        )
        return output

    position = torch.tensor([request.query], device=device)
    if runner.segments is not None:
        position = runner.segments.inside[batch.slots()]
    x = model.embed(torch.tensor([request.token_ids[request.query]], device=device), position)
    for index in range(max(request.layers) + 1):
        x = model.layers[index](x, position, model.rotary, index, attend)
    return tuple(found[layer] for layer in request.layers)
