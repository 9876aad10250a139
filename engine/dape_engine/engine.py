"""The engine as its users see it: asynchronous generation, scoring and inspection of one model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import torch

from dape_engine.cache import BlockPool
from dape_engine.context_parallel.leader import Leader
from dape_engine.errors import (
    ContextLengthError,
    EngineStoppedError,
    RequestError,
    SettingsError,
)
from dape_engine.inspection import (
    Inspection,
    InspectionJob,
    InspectionRequest,
    LayerWeights,
    check_inspection,
)
from dape_engine.jobs import GenerationJob, Job, ScoreJob
from dape_engine.loading import ModelLoader
from dape_engine.loop import Observer, StepLoop
from dape_engine.memory import check_room
from dape_engine.model import DapeForCausalLM
from dape_engine.options import EngineOptions
from dape_engine.request import (
    EngineState,
    GenerationOutput,
    GenerationRequest,
    ScoreRequest,
    WindowScores,
)
from dape_engine.runner import ModelRunner
from dape_engine.scheduler import Scheduler
from dape_engine.speculation import Speculator
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config
from dape_kernels.host import peak_memory

logger = logging.getLogger(__name__)
STOP_SECONDS = 30
"""Longest wait for the step under way when the engine stops."""


class AsyncEngine(StepLoop):
    """One model, one cache, one scheduler, and the thread of steps behind an asynchronous face.

    Raises:
        ModelFolderError: the model folder is missing, damaged or inconsistent.
        SettingsError: the options do not fit the model or the machine.
    """

    def __init__(self, folder: Path, options: EngineOptions, observer: Observer | None = None):
        ranks = options.context_parallel_size
        if ranks > 1 and options.threads is None:
            options = options.model_copy(update={"threads": max(1, torch.get_num_threads() // ranks)})
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options = options
        self.model_name = folder.resolve().name
        began = time.monotonic()
        self.config = load_config(folder, options.yarn_factor)
        self.tokenizer = TextTokenizer.load(folder, self.config)
        device = _device(options)
        dtype = _dtype(options, self.config.dtype, device)
        special = (options.quantization, "dummy" if options.load_format == "dummy" else None)
        self.dtype_name = " ".join(filter(None, (str(dtype).removeprefix("torch."), *special)))
        wanted = options.max_model_len or self.config.max_model_len
        if wanted > self.config.max_model_len:
            raise SettingsError(f"max_model_len: {wanted} is above the model's {self.config.max_model_len}")
        with _named_shortage(dtype, device):
            loader, runner = _load(options, wanted, partial(_loader, folder, options))

        def reload() -> DapeForCausalLM:
            again = ModelLoader(folder, dtype, device, options)
            if device.type == "cpu":
                check_room(again.memory(packed=False), "reading the layers' weights again")
            return again.load()

        self._layers = LayerWeights(reload, runner)
        self.num_parameters = loader.num_parameters
        self.load_seconds = time.monotonic() - began
        logger.info(
            "loaded %s parameters in %.1f s, peak RSS %d MiB",
            _rounded(self.num_parameters),
            self.load_seconds,
            peak_memory() >> 20,
        )
        self.backend_name = runner.backend.name
        self.num_blocks = runner.num_blocks
        self.cache_bytes = runner.cache_bytes
        self.block_size = runner.block_size
        self.max_model_len = runner.max_model_len
        self._pool = BlockPool(self.num_blocks, self.block_size)
        scheduler = Scheduler(
            self._pool,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_queued_reqs=options.max_num_queued_reqs,
            max_num_queued_tokens=options.max_num_queued_tokens,
        )
        super().__init__(
            scheduler, runner, Speculator(scheduler.blocks, options.max_num_batched_tokens), observer
        )

    def start(self) -> None:
        """Start the thread of steps."""
        self._thread.start()

    async def shutdown(self, drain_seconds: float) -> None:
        """Refuse new requests, finish the running ones until the deadline, abort the rest, stop."""
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + drain_seconds
        while self._jobs and self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._lock:
            self._stopping = True
            stopped = EngineStoppedError("the server has stopped before the request was finished")
            self._fail(set(self._jobs.values()), stopped)
            self._work.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        self._runner.close()

    def state(self) -> EngineState:
        """Return a snapshot without waiting for a step."""
        with self._lock:
            return EngineState(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                waiting_tokens=self._scheduler.waiting_tokens,
                free_blocks=self._pool.num_free,
                total_blocks=self.num_blocks,
                cached_blocks=self._pool.num_cached,
                steps=self._steps,
                seconds_since_progress=time.monotonic() - self._progress if self._jobs else 0.0,
                stopped=self._draining or not self._thread.is_alive(),
                failure=self._trouble,
            )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Yield the outputs of one completion; closing the iterator aborts the request.

        Raises:
            RequestError: the prompt is empty or holds an unknown token id.
            ContextLengthError: prompt and max_tokens are longer than the engine allows.
            QueueFullError, DeadlineError, EngineStoppedError, StepError: see `dape_engine.errors`.
        """
        self._check_tokens(request.prompt)
        total = len(request.prompt) + request.sampling.max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"prompt ({len(request.prompt)} tokens) plus max_tokens ({request.sampling.max_tokens}) "
                f"is {total} tokens, above the limit of {self.max_model_len}",
                param="max_tokens" if len(request.prompt) < self.max_model_len else "prompt",
            )
        speculation = request.speculation or self.options.speculative_config
        job = GenerationJob(request, self.tokenizer, self.config.vocab_size, speculation)
        async with aclosing(self._drive(job)) as items:
            async for item in items:
                yield cast("GenerationOutput", item)

    async def score(self, request: ScoreRequest) -> AsyncGenerator[WindowScores, None]:
        """Yield the scores of each window, in order; closing the iterator aborts the request.

        Raises: as `generate`.
        """
        self._check_tokens(request.token_ids)
        for window in request.windows:
            if not 0 <= window.start < window.score_from < window.end <= len(request.token_ids):
                raise RequestError(f"{window} does not fit an input of {len(request.token_ids)} tokens")
            if window.end - window.start > self.max_model_len:
                raise ContextLengthError(
                    f"a window of {window.end - window.start} tokens is above "
                    f"the limit of {self.max_model_len}",
                    param="context_length",
                )
        async with aclosing(self._drive(ScoreJob(request))) as items:
            async for item in items:
                yield cast("WindowScores", item)

    async def inspect(self, request: InspectionRequest) -> Inspection:
        """Return what one query of a text sees of its keys; cancelling aborts the request.

        Raises:
            RequestError: as `generate`, or there is no such query, layer or head.
            ContextLengthError: the query is beyond the engine's length.
            ModelFolderError: the weights have to be read again and cannot be.
            QueueFullError, DeadlineError, EngineStoppedError, StepError: see `dape_engine.errors`.
        """
        self._check_tokens(request.token_ids)
        if self.options.context_parallel_size > 1:
            raise RequestError(
                "one query's view of its keys needs them in one process; "
                f"context_parallel_size is {self.options.context_parallel_size}"
            )
        check_inspection(request, self.config.num_hidden_layers, self.config.num_attention_heads)
        if request.query >= self.max_model_len:
            raise ContextLengthError(
                f"query: {request.query + 1} tokens are above the limit of {self.max_model_len}",
                param="query",
            )
        # Files are read before anything waits for them, and not by the thread of steps.
        job = InspectionJob(request, await asyncio.to_thread(self._layers.get))
        async with aclosing(self._drive(job)) as items:
            return cast("Inspection", await anext(items))

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("the input is empty; at least 1 token is needed", param="prompt")
        vocab = self.config.vocab_size
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} is outside 0 to {vocab - 1}", param="prompt")

    async def _drive(self, job: Job) -> AsyncGenerator[object, None]:
        """Submit a job, yield its items until it has finished, and abort it if the client leaves."""
        self._submit(job)
        try:
            while (item := await job.mailbox.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._abort(job)


def _load(
    options: EngineOptions, max_model_len: int, loader_of: Callable[[int], ModelLoader]
) -> tuple[ModelLoader, ModelRunner]:
    """Load the model and return what runs its steps, with the other ranks if there are any."""
    if options.context_parallel_size == 1:
        loader = loader_of(0)
        return loader, ModelRunner(loader.open(), options, max_model_len, loader)
    leader = Leader(options, max_model_len, loader_of)
    try:
        loader = loader_of(0)
        leader.gather()
        return loader, ModelRunner(loader.open(), options, max_model_len, loader, leader)
    except BaseException:
        leader.close()
        raise


def _loader(folder: Path, options: EngineOptions, rank: int) -> ModelLoader:
    device = _device(options, rank)
    stored = load_config(folder, options.yarn_factor).dtype
    return ModelLoader(folder, _dtype(options, stored, device), device, options)


def _device(options: EngineOptions, rank: int = 0) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cuda" and not count:
        raise SettingsError("device: cuda was asked for, but PyTorch sees no CUDA device")
    if options.device == "cpu" or not count:
        return torch.device("cpu")
    if options.context_parallel_size > count:
        raise SettingsError(
            f"context_parallel_size: {options.context_parallel_size} ranks need a GPU each, "
            f"PyTorch sees {count}"
        )
    return torch.device("cuda", rank) if options.context_parallel_size > 1 else torch.device("cuda")


@contextmanager
def _named_shortage(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Say what it is that the GPU has no memory for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (size >> 20 for size in torch.cuda.mem_get_info(device))
        raise SettingsError(
            f"the model's weights in {str(dtype).removeprefix('torch.')} do not fit the GPU: {free} MiB of "
            f"{total} MiB are still free where they end"
        ) from error


def _rounded(count: int) -> str:
    """Return a number of parameters as models are named after it: 124M, 6.7B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _dtype(options: EngineOptions, stored: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights in memory: on a CPU float32, exact and no slower here."""
    automatic = "float32" if device.type == "cpu" else stored
    dtype: torch.dtype = getattr(torch, automatic if options.dtype == "auto" else options.dtype)
    return dtype
