"""One step on the device: packs the rows of a scheduler step, runs the model, samples and scores.

The runner owns the weights, the per-layer caches and the encodings with their tables. It knows nothing
of queues, text or clients. Letters: T rows of the step, h hidden size.
"""

from __future__ import annotations

import itertools
import logging
from collections import abc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice

import torch
from torch import Tensor, nn

from dape_engine.context_parallel.ranks import Layers, Order, Ranks, Rows, spread_blocks
from dape_engine.errors import SettingsError
from dape_engine.graphs import DecodeGraphs, capture_cuda
from dape_engine.loading import ModelLoader
from dape_engine.memory import cache_memory, check_fit
from dape_engine.model import Attend, DapeForCausalLM
from dape_engine.options import EngineOptions
from dape_engine.output_layer import logits, score_targets
from dape_engine.request import TokenLogprob
from dape_engine.sampling import SamplerState, sample
from dape_engine.segments import SegmentCache
from dape_engine.sequence import Sequence
from dape_engine.speculation import verified
from dape_engine.step import Chunk, ChunkResult, Pass
from dape_kernels.attention import paged_attention, select_backend, shard_obstacle
from dape_kernels.decoder import Decoder
from dape_kernels.distributed import key_parallel_attention, write_held
from dape_kernels.paged import RaggedBatch

# Long enough that keys are split, and as many rows as a chunk beside others may have.
WARM_CONTEXT, WARM_ROWS = 4096, 64
logger = logging.getLogger(__name__)


class ModelRunner:
    """Runs steps of one model on one device.

    Args:
        model: with all its weights, or with the layers' own still to come from `loader`.
        options: of the engine.
        max_model_len: longest sequence wanted.
        loader: fills the layers.
        ranks: where the keys of a sequence are spread over several processes.

    Raises:
        SettingsError: model and cache do not fit the memory, or no backend can run the encoding.
        ModelFolderError: as `ModelLoader`.
    """

    def __init__(
        self,
        model: DapeForCausalLM,
        options: EngineOptions,
        max_model_len: int,
        loader: ModelLoader | None = None,
        ranks: Ranks | None = None,
    ):
        self.model = model
        self.device = model.word_embeddings.weight.device
        self._ranks = ranks
        self._shard = None if ranks is None else ranks.shard
        self._cache_block_size = options.block_size
        per_block = 1 if self._shard is None else self._shard.stripe
        self.block_size = options.block_size * per_block * (1 if self._shard is None else self._shard.ranks)
        """Tokens of a block as the scheduler counts them: of every rank, one stripe of cache blocks."""
        self.workspace = options.attention_workspace
        encodings = [position.encoding() for position in model.encodings]
        dtype = cache_dtype(model, options)
        try:
            self.backend = select_backend(
                options.attention_backend, encodings[0], dtype, self.device, self._cache_block_size
            )
        except ValueError as error:
            raise SettingsError(f"attention_backend: {error}") from error
        obstacle = None if ranks is None else shard_obstacle(self.backend, encodings[0])
        if obstacle is not None:
            raise SettingsError(f"context_parallel_size: {obstacle}")
        config = model.config
        self.num_layers = config.num_hidden_layers
        self._numbers = itertools.count()
        block_bytes = (
            per_block
            * config.num_hidden_layers
            * self.backend.cache.block_bytes(
                self._cache_block_size, config.num_attention_heads, config.head_dim, dtype
            )
        )
        memory, why = cache_memory(config, options, self.device, model.word_embeddings.weight.dtype)
        logger.info("KV cache of %d MiB (%s)", memory >> 20, why)
        self.num_blocks = memory // block_bytes
        if ranks is not None:
            self.num_blocks = ranks.smallest(self.num_blocks)
        if self.num_blocks < 2:
            raise SettingsError(
                f"kv_cache_memory: {memory} bytes hold {self.num_blocks} blocks of "
                f"{block_bytes} bytes; at least 2 are needed"
            )
        self.cache_bytes = self.num_blocks * block_bytes
        # The places of BiPE's tokens are worked out on the host.
        replays = (
            self.backend.replayable
            and options.cuda_graphs
            and config.position.kind != "bipe"
            and ranks is None
        )
        self.max_model_len = min(max_model_len, self.num_blocks * self.block_size)
        """Longest sequence that the cache holds; tables of distances are no longer."""
        self.encodings = [self.backend.prepare(e, self.max_model_len, self.device) for e in encodings]
        try:
            self.caches = [
                self.backend.cache.allocate(
                    # Rows of a graph that are not there write to a block of their own.
                    self.num_blocks * per_block + replays,
                    self._cache_block_size,
                    config.num_attention_heads,
                    config.head_dim,
                    dtype,
                    self.device,
                )
                for _ in range(config.num_hidden_layers)
            ]
        except (RuntimeError, MemoryError) as error:
            raise SettingsError(f"kv_cache_memory: {memory} bytes cannot be allocated") from error
        self.segments: SegmentCache | None = None
        """With BiPE, where the cached tokens lie."""
        if config.position.kind == "bipe":
            self.segments = SegmentCache(
                self.num_blocks * self.block_size, config.position.segment_tokens, self.device
            )
        self._decoder: Decoder | None = None
        # Every layer of ranks ends in a collective, so they run one by one.
        modules = None if ranks is not None else model.decoder_modules()
        if modules is None:
            logger.info("no fused decoder: it has no rotation (rope), no clip_qkv and no other ranks")
        elif loader is not None:
            modules = replace(modules, weights=partial(loader.packing, model))
        if loader is not None and self.device.type == "cpu":
            packed = modules is not None and self.backend.name == "cpu"
            check_fit(config, options, loader.memory(packed=packed), self.cache_bytes, dtype.itemsize)
        if modules is not None:
            self._decoder = self.backend.decoder(modules, self.caches, self.encodings, self.max_model_len)
        if self._decoder is not None:
            # It has its own copy of their weights.
            model.layers = nn.ModuleList()  # type: ignore[assignment]
        elif loader is not None:
            for index in range(self.num_layers):
                loader.fill(model, index)
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda":
            self.warm_up()
        if replays:
            capture = capture_cuda() if self.device.type == "cuda" else _run_again
            with torch.inference_mode():
                self.graphs = DecodeGraphs(
                    self._decode,
                    options.max_num_seqs,
                    -(-self.max_model_len // self.block_size),
                    self.num_blocks,
                    self.device,
                    capture,
                )

    @torch.inference_mode()
    def run(self, chunks: abc.Sequence[Chunk], states: Mapping[Sequence, SamplerState]) -> list[ChunkResult]:
        """Compute the rows of every chunk and return one result per chunk, in order.

        Args:
            chunks: the rows; their sequences hold the blocks for them.
            states: sampler state of every sequence that generates.
        """
        try:
            if self.graphs is not None and self.graphs.takes(chunks):
                scores = self.graphs.logits(chunks)
                drawn = sample(scores, [states[chunk.sequence] for chunk in chunks])
                return [ChunkResult(drawn=[token]) for token in drawn]
            work = self.begin(chunks)
            self.advance(work, self.num_layers)
            return self.finish(work, states)
        except torch.OutOfMemoryError:
            # What the failed step has left in PyTorch's pools may be what the next one lacks.
            torch.cuda.empty_cache()
            raise

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute attention once in every kind of batch, so that no request waits for a compiler."""
        config, longest = self.model.config, min(WARM_CONTEXT, self.max_model_len)
        shape = (config.num_attention_heads, config.head_dim)
        dtype = self.model.word_embeddings.weight.dtype
        size = self._cache_block_size
        tables = torch.zeros(1, -(-longest // size), dtype=torch.int32, device=self.device)
        # Every position lies in block 0, whose memory may hold anything yet.
        zeros = torch.zeros(size, *shape, dtype=dtype, device=self.device)
        self.caches[0].write(zeros, zeros, torch.arange(size, device=self.device))
        for rows, context in ((1, 1), (1, longest), (longest, longest), (min(WARM_ROWS, longest), longest)):
            batch = RaggedBatch([0, rows], [context], tables, size)
            query = torch.zeros(rows, *shape, dtype=dtype, device=self.device)
            paged_attention(
                query,
                self.caches[0],
                batch,
                self.encodings[0],
                backend=self.backend,
                workspace=self.workspace,
            )

    def _decode(self, token_ids: Tensor, positions: Tensor, block_tables: Tensor) -> Tensor:
        """Return the logits float32 [b, V] of single rows, by work on the device alone: a `Compute`."""
        count = len(token_ids)
        batch = RaggedBatch(
            query_starts=list(range(count + 1)),
            context_lens=[self.max_model_len] * count,
            block_tables=block_tables,
            block_size=self.block_size,
            live_positions=positions,
        )
        hidden = self.model(token_ids, positions.clamp_min(0).long(), self._attention(batch))
        return logits(hidden, self.model.final_linear.weight)

    def begin(self, chunks: abc.Sequence[Chunk]) -> Pass:
        """Pack the rows of chunks and embed their tokens; `advance` then takes them through the layers."""
        rows = Rows(
            token_ids=[t for c in chunks for t in (*c.sequence.tokens[c.start : c.end], *c.proposed)],
            counts=[chunk.count for chunk in chunks],
            context_lens=[chunk.start + chunk.count for chunk in chunks],
            blocks=[chunk.sequence.blocks for chunk in chunks],
        )
        return self.enter(rows, chunks)

    @torch.inference_mode()
    def enter(self, rows: Rows, chunks: abc.Sequence[Chunk] = ()) -> Pass:
        """Embed the tokens of rows; their chunks are of use to the rank that scores and samples only."""
        with self._together(rows):
            token_ids = torch.tensor(rows.token_ids, device=self.device)
            batch = self._batch(rows)
            if self.segments is None:
                spans = (batch.positions(sequence) for sequence in range(len(rows.counts)))
                positions = torch.tensor([p for span in spans for p in span], device=self.device)
            else:
                positions = self.segments.add(chunks, batch, token_ids)
            hidden = self.model.embed(token_ids, positions)
            if self._decoder is not None:
                hidden = hidden.float()
            return Pass(next(self._numbers), chunks, batch, positions, hidden, 0, self.num_layers)

    @torch.inference_mode()
    def advance(self, work: Pass, count: int) -> None:
        """Run up to `count` of the next layers, keys and values of which go to the cache."""
        layers = range(work.num_done, work.num_done + min(count, work.num_left))
        with self._together(Layers(work.number, count)):
            if self._decoder is not None:
                work.hidden = self._decoder.run(work.hidden, work.batch, layers)
            else:
                work.hidden = self.model.run_layers(
                    work.hidden, work.positions, self._attention(work.batch), layers
                )
        work.num_done = layers.stop
        work.num_left -= len(layers)

    def close(self) -> None:
        """Let the other ranks go."""
        if self._ranks is not None:
            self._ranks.close()

    def _together(self, order: Order) -> AbstractContextManager[None]:
        return nullcontext() if self._ranks is None else self._ranks.together(order)

    @torch.inference_mode()
    def finish(self, work: Pass, states: Mapping[Sequence, SamplerState]) -> list[ChunkResult]:
        """Score and sample behind the last layer; return one result per chunk, in order."""
        results = [ChunkResult() for _ in work.chunks]
        self._score(work.chunks, work.batch, work.hidden, results)
        self._sample(work.chunks, work.batch, work.hidden, states, results)
        return results

    def _batch(self, rows: Rows) -> RaggedBatch:
        tables = torch.zeros(len(rows.blocks), max(map(len, rows.blocks)), dtype=torch.int32)
        for row, blocks in enumerate(rows.blocks):
            tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        if self._shard is not None:
            tables = spread_blocks(tables, self._shard)
        return RaggedBatch(
            query_starts=[0, *accumulate(rows.counts)],
            context_lens=rows.context_lens,
            block_tables=tables.to(self.device),
            block_size=self._cache_block_size,
            segments=None if self.segments is None else self.segments.segment,
            shard=self._shard,
        )

    def _attention(self, batch: RaggedBatch) -> Attend:
        """Return the attention of every layer over the paged caches."""
        spread = batch.shard is not None
        slots = None if spread else batch.slots()
        compute = key_parallel_attention if spread else paged_attention

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self.caches[layer]
            if slots is None:
                write_held(cache, key, value, batch)
            else:
                cache.write(key, value, slots)
            output, _ = compute(
                query, cache, batch, self.encodings[layer], backend=self.backend, workspace=self.workspace
            )
            return output

        return attend

    def _score(
        self, chunks: abc.Sequence[Chunk], batch: RaggedBatch, hidden: Tensor, results: list[ChunkResult]
    ) -> None:
        """Fill in the log-probabilities of prompt tokens, grouped by the number of alternatives."""
        groups: dict[int, list[tuple[int, range]]] = {}
        for index, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if sequence.score_from is None:
                continue
            first = max(chunk.start, sequence.score_from + sequence.num_scored - 1)
            rows = range(first, min(chunk.start + chunk.count, sequence.prompt_length - 1))
            if rows:
                groups.setdefault(sequence.top_logprobs, []).append((index, rows))
        for top, members in groups.items():
            places = [batch.query_starts[i] - chunks[i].start + p for i, span in members for p in span]
            targets = [chunks[i].sequence.tokens[p + 1] for i, span in members for p in span]
            scored = iter(self._logprobs(hidden[places], targets, top))
            for index, span in members:
                results[index].scored = list(islice(scored, len(span)))

    def _logprobs(self, hidden: Tensor, targets: list[int], top: int) -> list[TokenLogprob]:
        weight = self.model.final_linear.weight
        logprobs, ranks, ids, values = score_targets(
            hidden,
            weight,
            torch.tensor(targets, device=self.device),
            top,
            decoder=self._decoder,
        )
        return [
            TokenLogprob(target, logprob, tuple(zip(top_ids, top_values, strict=True)), rank)
            for target, logprob, rank, top_ids, top_values in zip(
                targets, logprobs.tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
            )
        ]

    def _sample(
        self,
        chunks: abc.Sequence[Chunk],
        batch: RaggedBatch,
        hidden: Tensor,
        states: Mapping[Sequence, SamplerState],
        results: list[ChunkResult],
    ) -> None:
        """Draw the next tokens of every sequence whose last row is among the chunks."""
        ending = [
            index
            for index, chunk in enumerate(chunks)
            if chunk.sequence.sampling is not None and chunk.is_last
        ]
        if not ending:
            return
        rows: list[int] = []
        row_states: list[SamplerState] = []
        for index in ending:
            proposed, behind = chunks[index].proposed, batch.query_starts[index + 1]
            rows += range(behind - 1 - len(proposed), behind)
            state = states[chunks[index].sequence]
            row_states += [state, *(state.behind(proposed[:count]) for count in range(1, len(proposed) + 1))]
        last = hidden[rows]
        if self._decoder is not None:
            scores = self._decoder.logits(last)
        else:
            scores = logits(last, self.model.final_linear.weight)
        drawn = iter(sample(scores, row_states))
        for index in ending:
            proposed = chunks[index].proposed
            results[index].drawn = verified(list(islice(drawn, 1 + len(proposed))), proposed)


def _run_again(work: Callable[[], None]) -> Callable[[], None]:
    """Stand in for a capture where there are no graphs: do the work on the same buffers again."""
    work()
    return work


def cache_dtype(model: DapeForCausalLM, options: EngineOptions) -> torch.dtype:
    """Return the dtype of cached keys and values."""
    if options.kv_cache_dtype == "auto":
        return model.word_embeddings.weight.dtype
    dtype: torch.dtype = getattr(torch, options.kv_cache_dtype)
    return dtype
