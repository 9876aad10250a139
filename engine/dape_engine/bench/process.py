"""An engine in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from dape_engine.engine import AsyncEngine
from dape_engine.errors import DapeError, SettingsError
from dape_engine.options import EngineOptions

P = ParamSpec("P")
T = TypeVar("T")


class EngineProcess:
    """A started engine, used as a context manager.

    Raises:
        SettingsError: the engine cannot be made, or refuses what it is asked.
    """

    def __init__(self, folder: Path, options: EngineOptions):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, folder, options), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def run(
        self, task: Callable[Concatenate[AsyncEngine, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what a module-level coroutine function returns for the engine and the arguments."""
        try:
            self._connection.send((task, args, kwargs))
            answer, message = self._connection.recv()
        except (BrokenPipeError, EOFError, ConnectionResetError) as error:
            self._process.join()
            raise SettingsError(
                f"the engine's process has ended with exit code {self._process.exitcode}"
            ) from error
        if message is not None:
            raise SettingsError(message)
        result: T = answer
        return result


def _serve(connection: Connection, folder: Path, options: EngineOptions) -> None:
    asyncio.run(_answer(connection, folder, options))


async def _answer(connection: Connection, folder: Path, options: EngineOptions) -> None:
    """Run the tasks that come until the other end closes; each is answered by (result, error message)."""
    engine = None
    try:
        while True:
            task, args, kwargs = connection.recv()
            try:
                if engine is None:
                    engine = AsyncEngine(folder, options)
                    engine.start()
                connection.send((await task(engine, *args, **kwargs), None))
            except DapeError as error:
                connection.send((None, error.message))
    except EOFError:
        pass
    finally:
        if engine is not None:
            await engine.shutdown(0)
