"""Going on with an answer whose replica was lost, so that its reader notices nothing but the time.

A text is generated again on another replica and what the reader has already is left out: with a seed, which
every request gets, the same tokens come again. Scores go on at the first token that is missing.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Protocol

from dape_engine.errors import StepError
from dape_engine.inspection import Inspection, InspectionRequest
from dape_engine.request import GenerationOutput, GenerationRequest, ScoreRequest, WindowScores
from dape_server.replicas.order import Request

SEEDS = 1 << 63


class Resume(Protocol):
    """One answer over all attempts."""

    finished: bool
    """Whether nothing more will come."""

    def request(self) -> Request:
        """Return what the next attempt asks for."""

    def news(self, item: Any) -> Any | None:
        """Return what of an item the reader does not have yet."""


class GenerationResume:
    """One completion over all attempts.

    Args:
        request: of the client; one that draws without a seed gets one.
    """

    def __init__(self, request: GenerationRequest):
        sampling = request.sampling
        if sampling.seed is None and sampling.temperature > 0:
            sampling = replace(sampling, seed=random.randrange(SEEDS))
        self._request = replace(request, sampling=sampling)
        self._tokens: list[int] = []
        self._sent = 0
        self._begun = False
        self._again = 0
        self._text = 0
        self.finished = False
        """Whether the last output has come."""

    def request(self) -> GenerationRequest:
        """Return what the next attempt asks for."""
        self._again = self._text = 0
        return self._request

    def news(self, output: GenerationOutput) -> GenerationOutput | None:
        """Return what of an output the reader does not have yet; None: all of it is known.

        Raises:
            StepError: the tokens differ from those that the reader has, as rounding may have it.
        """
        if output.progress is not None:
            return None if self._begun else output
        known = self._tokens[self._again :]
        same = min(len(known), len(output.token_ids))
        if tuple(known[:same]) != output.token_ids[:same]:
            raise StepError("the replica of this request was lost, and its text cannot be continued exactly")
        self._again += len(output.token_ids)
        self._tokens += output.token_ids[same:]
        text = output.text[max(self._sent - self._text, 0) :]
        self._text += len(output.text)
        self._sent = max(self._sent, self._text)
        self.finished = output.finish_reason is not None
        begun, self._begun = self._begun, True
        if not begun:
            return output
        rest = replace(
            output,
            text=text,
            token_ids=output.token_ids[same:],
            logprobs=output.logprobs[same:],
            text_offsets=output.text_offsets[same:],
            # These come with an answer's first output, which the reader has.
            prompt_logprobs=None,
            num_cached_tokens=0,
        )
        return rest if rest.text or rest.token_ids or rest.finish_reason else None


class ScoreResume:
    """The scores of one input over all attempts."""

    def __init__(self, request: ScoreRequest):
        self._request = request
        self._reached = 0
        self.finished = False
        """Whether every window has its scores."""

    def request(self) -> ScoreRequest:
        """Return what the next attempt asks for: the windows and tokens that have no score yet."""
        return self._request

    def news(self, scores: WindowScores) -> WindowScores | None:
        """Return scores that the reader does not have yet; None: a piece that was only read once more."""
        window, *later = self._request.windows
        if scores.window.end <= self._reached:
            return None
        self._reached = scores.window.end
        if self._reached < window.end:
            later = [replace(window, score_from=max(window.score_from, self._reached)), *later]
        else:
            self._reached = 0
        self._request = replace(self._request, windows=tuple(later))
        self.finished = not later
        return scores


class InspectionResume:
    """An answer that comes whole."""

    finished = False

    def __init__(self, request: InspectionRequest):
        self._request = request

    def request(self) -> InspectionRequest:
        """Return the request."""
        return self._request

    def news(self, item: Inspection) -> Inspection:
        """Return the answer."""
        self.finished = True
        return item
