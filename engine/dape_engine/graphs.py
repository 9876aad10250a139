"""Decode steps as captured graphs: one copy to the device, one launch, logits where sampling finds them.

A step that only decodes is hundreds of small kernels, whose launches take longer than their work. For each of
some batch sizes they are captured once, reading from and writing to buffers that stay where they are; a step
fills the buffer of the next larger size and replays it. Letters: b rows of a graph, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dape_engine.step import Chunk

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [b, V] of token ids int64 [b], positions int32 [b] (-1: no row), block tables int32 [b, blocks]."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs work once and returns what does it again, on the same buffers."""
TOKEN, POSITION, BLOCKS = 0, 1, 2
NO_ROW = -1
STEP = 8


def batch_sizes(most: int) -> list[int]:
    """Return the sizes that are captured: 1, 2, 4, then multiples of 8, and of 16 above 64, up to `most`."""
    sizes = [1, 2, 4, *range(STEP, 65, STEP), *range(80, most + 1, 2 * STEP)]
    return [size for size in sizes if size < most] + [most]


def capture_cuda() -> Capture:
    """Return a capture by CUDA graphs that share one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        # Once outside: kernels are compiled and libraries set up, which a capture forbids.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    return capture


@dataclass(slots=True)
class Graph:
    """One captured size."""

    logits: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of one model.

    Args:
        compute: embeds, runs all layers and multiplies with the output layer, on the device alone.
        most: rows of the largest graph.
        width: blocks of the longest sequence.
        spare_block: of the cache, belongs to no sequence: there the rows write that are not there.
        device: where the buffers lie.
        capture: how work is captured.
    """

    def __init__(
        self,
        compute: Compute,
        most: int,
        width: int,
        spare_block: int,
        device: torch.device,
        capture: Capture,
    ):
        self._compute = compute
        self._spare_block = spare_block
        self._sizes = batch_sizes(most)
        shape = (most, BLOCKS + width)
        # Pinned, so that the copy is one asynchronous transfer.
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host[:, POSITION] = NO_ROW
        self._host[:, BLOCKS:] = spare_block
        self._inputs = self._host.to(device)
        # The largest first: the smaller ones find their memory in its pool.
        self._graphs = {size: self._captured(size, capture) for size in reversed(self._sizes)}

    def _captured(self, size: int, capture: Capture) -> Graph:
        rows = self._inputs[:size]
        graph = Graph(torch.empty(0), lambda: None)

        def work() -> None:
            graph.logits = self._compute(rows[:, TOKEN].long(), rows[:, POSITION], rows[:, BLOCKS:])

        graph.replay = capture(work)
        return graph

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Return whether a step is nothing but the next token of some sequences, and not too many."""
        return 0 < len(chunks) <= self._sizes[-1] and all(map(_decodes, chunks))

    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the logits float32 [len(chunks), V] of the chunks' rows; valid until the next call."""
        count = len(chunks)
        size = self._size(count)
        lines = self._host.numpy()  # a view: numpy copies a list several times as fast
        for place, chunk in enumerate(chunks):
            blocks = chunk.sequence.blocks
            line = [chunk.sequence.tokens[chunk.start], chunk.start, *blocks]
            lines[place, : len(line)] = line
        self._host[count:size, POSITION] = NO_ROW
        self._host[count:size, BLOCKS:] = self._spare_block
        self._inputs[:size].copy_(self._host[:size], non_blocking=True)
        return self.replay(count)

    def replay(self, count: int) -> Tensor:
        """Compute again what lies in the buffers; return the logits of the first `count` rows."""
        graph = self._graphs[self._size(count)]
        graph.replay()
        return graph.logits[:count]

    def _size(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)


def _decodes(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    last = chunk.count == 1 and chunk.start + 1 == sequence.num_rows
    scored = sequence.score_from is not None and chunk.start + 1 < sequence.prompt_length
    return last and sequence.sampling is not None and not scored
