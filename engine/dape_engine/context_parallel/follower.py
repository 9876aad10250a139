"""The processes of ranks 1 and up: they load the model and compute what rank 0 says until it leaves."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from dape_engine.context_parallel.ranks import Layers, Order, Ranks
from dape_engine.errors import DapeError
from dape_engine.loading import ModelLoader
from dape_engine.options import EngineOptions
from dape_engine.runner import ModelRunner
from dape_engine.step import Pass

logger = logging.getLogger(__name__)
UNFINISHED = 2
"""Passes that may be under way: background work between layers, and the step that overtakes it."""


def follow(
    rank: int,
    options: EngineOptions,
    max_model_len: int,
    loader_of: Callable[[int], ModelLoader],
    pipe: Connection,
) -> None:
    """Be a rank until the other end of the pipe is closed.

    The pipe first takes this rank's trouble, None if the model can be loaded; then it gives the port of the
    group and after that orders.
    """
    # Rank 0 decides when all stop; where it dies, the pipe ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        loader = loader_of(rank)
    except DapeError as error:
        pipe.send(error.message)
        return
    pipe.send(None)
    try:
        ranks = Ranks(rank, options.context_parallel_size, options.block_size)
        ranks.meet(pipe.recv())
        runner = ModelRunner(loader.open(), options, max_model_len, loader, ranks)
        passes: dict[int, Pass] = {}
        while True:
            _obey(runner, passes, pipe.recv())
    except EOFError:
        return
    except Exception:
        # Rank 0 sees that this one has gone and says so to whoever waits.
        logger.exception("rank %d of %d has failed", rank, options.context_parallel_size)
        raise SystemExit(1) from None


def _obey(runner: ModelRunner, passes: dict[int, Pass], order: Order) -> None:
    if isinstance(order, Layers):
        work = passes[order.number]
        runner.advance(work, order.count)
        if not work.num_left:
            del passes[order.number]
    else:
        work = runner.enter(order)
        passes[work.number] = work
        # What was given up on the way is not told.
        while len(passes) > UNFINISHED:
            del passes[min(passes)]
