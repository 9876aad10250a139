"""Rank 0: starts the other ranks, gives them their orders, and notices when one is gone."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed

from dape_engine.context_parallel.follower import follow
from dape_engine.context_parallel.ranks import HOST, Order, Ranks
from dape_engine.errors import SettingsError, StepError
from dape_engine.loading import ModelLoader
from dape_engine.options import EngineOptions

logger = logging.getLogger(__name__)
FAREWELL_SECONDS = 10


class Leader(Ranks):
    """The process that serves, and the others, which are its children."""

    def __init__(self, options: EngineOptions, max_model_len: int, loader_of: Callable[[int], ModelLoader]):
        """Start the other ranks, which begin to load.

        Args:
            options: of the engine.
            max_model_len: the longest sequence wanted.
            loader_of: returns what loads the model of a rank; can be pickled.
        """
        super().__init__(0, options.context_parallel_size, options.block_size)
        self._trouble: str | None = None
        # A fresh interpreter each: threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._processes = []
        for rank in range(1, self.shard.ranks):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=follow,
                args=(rank, options, max_model_len, loader_of, theirs),
                name=f"dape-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def gather(self) -> None:
        """Wait until the others have found their weights, and form the group.

        Raises:
            SettingsError: one of them could not load.
        """
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                trouble = pipe.recv()
            except EOFError:
                trouble = "its process has ended; its output says why"
            if trouble is not None:
                raise SettingsError(f"context_parallel_size: rank {rank}: {trouble}")
        store = distributed.TCPStore(HOST, 0, is_master=True)  # type: ignore[attr-defined]
        self._tell(store.port)
        self._join(store)

    @contextmanager
    def together(self, order: Order) -> Iterator[None]:
        """Do in the context what all ranks do; the others begin with it now.

        Raises:
            StepError: the ranks are not all there, or no longer in step since one of them has failed.
        """
        if self._trouble is not None:
            raise StepError(self._trouble)
        try:
            self._tell(order)
            yield
        except Exception as error:
            gone = [process.name for process in self._processes if not process.is_alive()]
            self._trouble = f"{' and '.join(gone) or 'a rank'} of {self.shard.ranks} ranks has failed"
            logger.exception("%s; the server has to be started again", self._trouble)
            self._dismiss()
            raise StepError(self._trouble) from error

    def close(self) -> None:
        """Let the other ranks end and leave the group."""
        self._dismiss()
        super().close()

    def _tell(self, what: Order | int) -> None:
        for pipe in self._pipes:
            pipe.send(what)

    def _dismiss(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(FAREWELL_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
