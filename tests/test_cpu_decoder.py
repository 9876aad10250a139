"""All layers in one call of the C++ library against the same layers in PyTorch, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dape_engine.model import DapeForCausalLM
from dape_kernels.attention import BACKENDS
from dape_kernels.cpu.decoder import pack_weight
from dape_kernels.decoder import Decoder
from dape_kernels.encoding import Encoding
from dape_kernels.paged import KeyShard, RaggedBatch
from dape_kernels.reference import reference_attention
from layers import relative_error
from models import DAPE_KERPLE, random_model

BLOCK_SIZE = 16
LENGTH = 320
CPU = torch.device("cpu")
# Contexts and new rows of the sequences of a step: decode rows, chunks and whole prompts, so many rows
# that register tiles, row blocks and items all have remainders.
SPANS = {
    "one decode row": [(70, 1)],
    "decode rows": [(5, 1), (64, 1), (131, 1), (17, 1), (1, 1), (90, 1), (33, 1)],
    "a short prompt": [(13, 13)],
    "a mix": [(200, 190), (70, 1), (40, 7), (65, 65)],
}


def make_model(**settings: Any) -> DapeForCausalLM:
    """A model of two layers whose sizes are no multiples of what the kernels multiply at a time."""
    sizes = {
        "vocab_size": 211,
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 200,
        "train_length": 32,
        "max_model_len": 512,
    }
    return random_model({**sizes, **(settings or DAPE_KERPLE)}, seed=1)


def make_decoder(
    model: DapeForCausalLM, spans: list[tuple[int, int]], encodings: list[Encoding] | None = None
) -> tuple[Decoder, RaggedBatch]:
    """A decoder with caches that hold nothing, and a batch of sequences given as (context, rows)."""
    backend, config = BACKENDS["cpu"], model.config
    tables, used = [], 0
    for context, _ in spans:
        blocks = -(-context // BLOCK_SIZE)
        tables.append(list(range(used, used + blocks)))
        used += blocks
    dtype = model.word_embeddings.weight.dtype
    heads, head_dim = config.num_attention_heads, config.head_dim
    caches = [backend.cache.allocate(used, BLOCK_SIZE, heads, head_dim, dtype, CPU) for _ in model.layers]
    encodings = encodings or [backend.prepare(e.encoding(), LENGTH, CPU) for e in model.encodings]
    decoder = backend.decoder(model.decoder_modules(), caches, encodings, LENGTH)
    assert decoder is not None
    width = max(map(len, tables))
    padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
    starts = [0, *torch.tensor([rows for _, rows in spans]).cumsum(0).tolist()]
    return decoder, RaggedBatch(starts, [context for context, _ in spans], padded, BLOCK_SIZE)


def run(model: DapeForCausalLM, spans: list[tuple[int, int]], tokens: list[Tensor]) -> tuple[Tensor, Decoder]:
    """Hidden states of the last rows of each sequence, after a step for what comes before them."""
    earlier = [(context - rows, context - rows) for context, rows in spans]
    decoder, last = make_decoder(model, spans)
    starts = [0, *torch.tensor([rows for _, rows in earlier]).cumsum(0).tolist()]
    before = RaggedBatch(starts, [context for context, _ in earlier], last.block_tables, BLOCK_SIZE)
    hidden = torch.empty(0)
    for batch in (before, last):
        if batch.query_starts[-1] == 0:
            continue
        ids = torch.cat([tokens[s][list(batch.positions(s))] for s in range(len(spans))])
        positions = torch.cat(
            [torch.tensor(batch.positions(s), dtype=torch.int64) for s in range(len(spans))]
        )
        x = model.embed(ids, positions).float()
        hidden = decoder.run(x, batch)
    return hidden, decoder


def expected(model: DapeForCausalLM, spans: list[tuple[int, int]], tokens: list[Tensor]) -> Tensor:
    """The same by the definition in float64."""
    wide = make_wide(model)
    encodings = [encoding.encoding() for encoding in wide.encodings]

    def attend(layer: int, *qkv: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in qkv)
        return reference_attention(query, key, value, encodings[layer])[0].transpose(0, 1)

    rows = []
    for ids, (context, count) in zip(tokens, spans, strict=True):
        rows.append(wide(ids[:context], torch.arange(context), attend)[-count:])
    return torch.cat(rows)


def make_wide(model: DapeForCausalLM) -> DapeForCausalLM:
    wide = DapeForCausalLM(model.config).double()
    wide.load_state_dict(model.state_dict())
    return wide.requires_grad_(False)


def random_tokens(spans: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 211, (context,), generator=generator) for context, _ in spans]


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16 weights"])
def test_float32_agrees_with_the_definition(spans: list[tuple[int, int]], narrow: bool) -> None:
    model = make_model()
    if narrow:  # float32 weights that are bfloat16 numbers are stored as such
        model = model.bfloat16().float()
    tokens = random_tokens(spans)
    hidden, _ = run(model, spans, tokens)
    assert relative_error(hidden, expected(model, spans, tokens)) < 3e-6


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_bfloat16_agrees_within_its_rounding(spans: list[tuple[int, int]]) -> None:
    model = make_model().bfloat16()
    for encoding in model.encodings:
        encoding.float()
    tokens = random_tokens(spans)
    hidden, _ = run(model, spans, tokens)
    assert relative_error(hidden, expected(model, spans, tokens)) < 3e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"position": {"kind": "alibi"}, "parallel_residual": True},
        {"position": {"kind": "nope"}, "num_attention_heads": 9, "intermediate_size": 8},
        {"position": {"kind": "learned", "max_positions": 512}, "hidden_act": "gelu_tanh"},
        {"position": {"kind": "fire"}, "dape": {"version": 2, "width": 5, "kernel": 3}},
    ],
    ids=lambda settings: settings["position"]["kind"],
)
def test_every_form_of_the_decoder(settings: dict[str, Any]) -> None:
    model, spans = make_model(**settings), SPANS["a mix"]
    tokens = random_tokens(spans)
    hidden, _ = run(model, spans, tokens)
    assert relative_error(hidden, expected(model, spans, tokens)) < 3e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_threads(threads: int) -> None:
    model, spans = make_model(), SPANS["a mix"]
    tokens = random_tokens(spans)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        hidden, _ = run(model, spans, tokens)
    finally:
        torch.set_num_threads(before)
    assert relative_error(hidden, expected(model, spans, tokens)) < 3e-6


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("rows", [1, 7, 16, 33])
def test_logits(rows: int) -> None:
    model = make_model()
    decoder, _ = make_decoder(model, [(1, 1)])
    hidden = torch.randn(rows, 72)
    wanted = hidden.double() @ model.final_linear.weight.double().t()
    assert relative_error(decoder.logits(hidden), wanted) < 1e-6


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize("rows", [1, 7, 33, 192, 450])
def test_tally(rows: int, scale: float) -> None:
    model = make_model()
    decoder, _ = make_decoder(model, [(1, 1)])
    hidden = torch.randn(rows, 72) * scale
    scores = hidden.double() @ model.final_linear.weight.double().t()
    targets = torch.arange(rows) * 31 % scores.shape[1]
    marks = scores.sort(-1).values[:, 100:102].mean(-1).float()
    tally = decoder.tally(hidden, targets, marks)
    size = float(scores.abs().max())
    own = scores.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(tally.own.double(), own, rtol=0, atol=1e-6 * size)
    sums = tally.peak.double() + tally.total.double().log()
    torch.testing.assert_close(sums, scores.logsumexp(-1), rtol=0, atol=1e-6 * size + 1e-6)
    torch.testing.assert_close(tally.above, (scores > marks[:, None]).sum(-1))
    assert bool((scores.amax(-1) <= tally.peak + 20.001).all())


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 63, 64, 65, 211, 1000])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(vocabulary: int, dtype: torch.dtype) -> None:
    """Many tokens are alike, so that their logits are equal to the bit; all those of one row are negative."""
    sizes = {"vocab_size": vocabulary, "position": {"kind": "nope"}}
    model = make_model(**sizes).to(dtype)
    weight = model.final_linear.weight
    weight.copy_(weight[torch.randint(-(-vocabulary // 3), (vocabulary,))])
    weight[:, 0] = 1
    decoder, _ = make_decoder(model, [(1, 1)])
    for rows, scale in ((1, 1.0), (7, 1e-30), (200, 3e27)):
        hidden = torch.randn(rows, 72) * scale
        hidden[rows // 2, 0] = -100 * scale  # so that no logit of the row is above zero
        scores = decoder.logits(hidden)
        targets = torch.arange(rows) % vocabulary
        tally = decoder.tally(hidden, targets, torch.zeros(rows))
        largest, first = scores.max(-1)
        assert torch.equal(tally.best_id, first)
        assert torch.equal(tally.best, largest)
        assert torch.equal(tally.own, scores.gather(1, targets[:, None])[:, 0])


def test_what_is_no_number_shows_in_the_tally() -> None:
    model = make_model()
    decoder, _ = make_decoder(model, [(1, 1)])
    hidden = torch.randn(3, 72)
    hidden[1, 5] = math.inf
    hidden[2, 5] = math.nan
    tally = decoder.tally(hidden, torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    finite = (tally.own - tally.peak - tally.total.log()).isfinite()
    assert finite.tolist() == [True, False, False]


def test_weights_that_are_bfloat16_numbers_take_half_the_memory() -> None:
    weight = torch.randn(40, 16)
    assert pack_weight(weight).dtype == torch.float32
    narrow = pack_weight(weight.bfloat16().float())
    assert narrow.dtype == torch.bfloat16
    panel, pair, output, lane = 1, 3, 5, 1
    assert narrow[panel, pair, output, lane] == weight[21, 7].bfloat16()
    assert narrow.shape == (4, 8, 16, 2)
    assert not narrow[2, :, 8:].any()


def test_weights_may_begin_anywhere_in_a_file() -> None:
    stored = torch.randn(1 + 64 * 16).bfloat16()
    weight = stored[1:].view(64, 16)
    assert torch.equal(pack_weight(weight), pack_weight(weight.clone()))


def test_tables_live_as_long_as_the_decoder() -> None:
    model, spans = make_model(), SPANS["a short prompt"]
    tokens = random_tokens(spans)
    encodings = [BACKENDS["cpu"].prepare(e.encoding(), LENGTH, CPU) for e in model.encodings]
    decoder, batch = make_decoder(model, spans, encodings)
    for encoding in encodings:
        BACKENDS["cpu"].prepare(encoding, 8 * LENGTH, CPU)  # replaces the tables
    hidden = decoder.run(model.embed(tokens[0], torch.arange(13)), batch)
    assert relative_error(hidden, expected(model, spans, tokens)) < 3e-6


def test_layers_one_by_one_give_the_same_as_all_at_once() -> None:
    model, spans = make_model(), SPANS["a short prompt"]
    x = model.embed(random_tokens(spans)[0], torch.arange(13))
    decoder, batch = make_decoder(model, spans)
    whole = decoder.run(x.clone(), batch)
    for layer in range(len(model.layers)):
        x = decoder.run(x, batch, range(layer, layer + 1))
    assert torch.equal(x, whole)


def test_misfits_are_refused() -> None:
    model = make_model()
    decoder, batch = make_decoder(model, [(4, 4)])
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        decoder.run(torch.zeros(3, 72), batch)
    long = RaggedBatch([0, 1], [LENGTH + 1], torch.zeros(1, 40, dtype=torch.int32), BLOCK_SIZE)
    with pytest.raises(ValueError, match="321 tokens"):
        decoder.run(torch.zeros(1, 72), long)
    with pytest.raises(ValueError, match=r"layers 1 to 2 are not among 0 to 1"):
        decoder.run(torch.zeros(4, 72), batch, range(1, 3))
    with pytest.raises(ValueError, match="spread over ranks are not supported by the fused decoder"):
        decoder.run(torch.zeros(4, 72), replace(batch, shard=KeyShard(0, 2, 4)))


@pytest.mark.usefixtures("cpu")
def test_tanh_gelu_in_every_build() -> None:
    model, spans = make_model(hidden_act="gelu_tanh", position={"kind": "nope"}), SPANS["a mix"]
    with torch.no_grad():  # far out, where exponentials overflow
        model.layers[0].mlp.linear1.weight *= 40
    tokens = random_tokens(spans)
    hidden, _ = run(model, spans, tokens)
    assert relative_error(hidden, expected(model, spans, tokens)) < 3e-6


@pytest.mark.parametrize(
    "settings",
    [{"position": {"kind": "rope"}}, {"position": {"kind": "nope"}, "clip_qkv": 1.0}],
    ids=["rope", "clipped"],
)
def test_what_changes_queries_and_keys_runs_layer_by_layer(settings: dict[str, Any]) -> None:
    assert make_model(**settings).decoder_modules() is None


@pytest.mark.parametrize(
    "settings", [{"intermediate_size": 60}, {"dtype": "float16"}], ids=["odd inputs", "float16"]
)
def test_what_cannot_be_fused_runs_layer_by_layer(settings: dict[str, Any]) -> None:
    model = make_model(position={"kind": "nope"}, **settings)
    if settings.get("dtype") == "float16":
        model = model.half()
    backend = BACKENDS["cpu"]
    assert backend.decoder(model.decoder_modules(), [], [], LENGTH) is None
