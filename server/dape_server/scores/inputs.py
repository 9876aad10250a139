"""The inputs of a perplexity request as token ids, with a beginning-of-text token by the rule asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dape_engine.errors import RequestError
from dape_server.context import Context
from dape_server.protocol.perplexity import PerplexityRequest
from dape_server.text import EncodedPrompt


@dataclass(frozen=True, slots=True)
class Input:
    """One input as the model reads it."""

    token_ids: tuple[int, ...]
    text: str | None
    """Where it came as text."""
    bos: int | None
    """The beginning-of-text token that it begins with."""
    added_bos: bool
    """Whether that was put before the input, rather than being part of it."""


async def read_inputs(body: PerplexityRequest, context: Context) -> list[Input]:
    """Return the inputs as token ids; references are as long as their inputs.

    Raises:
        RequestError: an input or the BOS token is refused, or a reference has another length.
        ContextLengthError: a text cannot fit the full window.
    """
    own = isinstance(body.bos, str)
    bos = context.engine.config.bos_token_id if isinstance(body.bos, str) else body.bos
    if body.bos == "always" and bos is None:
        raise RequestError("bos: this model has no beginning-of-text token", param="bos")
    if not own:
        context.texts.check_ids([body.bos] if isinstance(body.bos, int) else [], "bos")
    whole = body.window in (None, "full") and body.lengths is None
    prompts = await context.texts.encode(
        body.input,
        "input",
        add_special_tokens=own and body.bos != "never",
        max_tokens=context.engine.max_model_len if whole else None,
    )
    inputs = [_with_bos(prompt, bos, add=body.bos not in ("auto", "never")) for prompt in prompts]
    for index, (reference, given) in enumerate(zip(body.reference or (), inputs, strict=False)):
        if reference is not None and len(reference) != len(given.token_ids):
            added = ", the added beginning-of-text token included" if given.added_bos else ""
            raise RequestError(
                f"reference[{index}]: {len(reference)} values for {len(given.token_ids)} tokens{added}",
                param="reference",
            )
    return inputs


def _with_bos(prompt: EncodedPrompt, bos: int | None, *, add: bool) -> Input:
    """Return a prompt that begins with BOS: where it does so already, and where it is to be added."""
    ids = prompt.token_ids
    begins = bos is not None and ids[:1] == (bos,)
    if bos is None or begins or not add:
        return Input(ids, prompt.text, bos if begins else None, prompt.added_bos)
    return Input((bos, *ids), prompt.text, bos, True)
