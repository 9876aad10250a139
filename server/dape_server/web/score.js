// Panel "Score": a text coloured by log-probability, its curve and its length ladder.

import { events, floats, post } from "./api.js";
import { Chart, axis, compact, octaves } from "./charts.js";
import { $, Work, el, say, seconds, short, whole } from "./dom.js";
import { EXAMPLE } from "./examples.js";
import { TokenView, drawLegend } from "./tokens.js";

const LADDER = [128, 256, 512, 1024, 2048, 4096, 8192, 16384];
const SCORE_LAST = 64; // so that the ladder's first step has a context beyond what it scores
const PIECE = 2048;
const TOP = 5;
const MOST_BYTES = 4 * 2 ** 20;

const work = new Work($("score-go"), $("score-stop"), $("s-status"));
const view = new TokenView($("tokens"), $("token-facts"));
const progress = $("s-progress");
const charts = [];
progress.classList.add("idle");
drawLegend($("legend"));

async function score(signal) {
  const text = $("score-text").value;
  if (!text) throw new Error("There is no text to score yet.");
  progress.value = 0;
  progress.classList.remove("idle");
  try {
    say($("s-status"), "Splitting the text into tokens …");
    const split = await post("/tokenize", { prompt: text, return_token_strs: true }, signal);
    if (split.count < 2) throw new Error("The text has fewer than 2 tokens, so there is nothing to predict.");
    if (split.count > split.max_model_len) {
      throw new Error(`The text has ${whole(split.count)} tokens; this server reads ${whole(split.max_model_len)} at once. Shorten the text.`);
    }
    view.begin(split.token_strs);
    const tokens = [];
    let bytes = 0;
    for await (const result of results(split, signal)) {
      const more = tokensOf(result, tokens.length);
      tokens.push(...more);
      view.add(more);
      drawPositions(tokens);
      bytes += result.num_bytes;
      if (tokens.length < split.count) {
        const sofar = summary(tokens);
        showTotals({ ...sofar, bits_per_byte: (sofar.mean_nll * sofar.num_scored) / Math.LN2 / bytes }, split.count);
        continue;
      }
      showTotals(result, split.count);
      drawLadder(result.ladder);
    }
  } finally {
    progress.classList.add("idle");
  }
}

/**
 * Yield the results of a text piece by piece, then that of all of it with the ladder. The server keeps what
 * it has read and scored, so each request costs no more than what is new in it.
 */
async function* results({ tokens, count }, signal) {
  const started = performance.now();
  say($("s-status"), `Scoring ${whole(count)} tokens …`);
  for (let end = PIECE; end < count; end += PIECE) {
    const piece = { ...scoring(tokens.slice(0, end)), window: "last", score_last: PIECE };
    yield (await post("/v1/perplexity", piece, signal)).data[0];
    progress.value = end / count / 2;
  }
  const before = progress.value;
  // The last step of the ladder is the whole text.
  const lengths = count < LADDER[0] ? [] : [...LADDER.filter((length) => length < count), count];
  const ladder = lengths.length ? { lengths, ladder: "suffix", score_last: SCORE_LAST } : {};
  for await (const event of events("/v1/perplexity", { ...scoring(tokens), ...ladder, stream: true }, signal)) {
    if (event.object === "perplexity") yield event.data[0];
    else progress.value = before + (1 - before) * (event.tokens_done / event.tokens_total);
  }
  say($("s-status"), `Scored ${whole(count)} tokens in ${seconds((performance.now() - started) / 1000)}.`);
}

const scoring = (input) => ({
  input, window: "full", return_token_logprobs: true, top_logprobs: TOP, encoding_format: "base64",
});

function showTotals(result, count) {
  const error = result.stderr === null ? [] : [" ", el("span", { className: "pm" }, `± ${short(result.stderr)}`)];
  $("s-ppl").replaceChildren(short(result.perplexity), ...error);
  $("s-nll").textContent = short(result.mean_nll);
  $("s-bpb").textContent = short(result.bits_per_byte);
  const rest = result.num_scored < count - 1 ? [" ", el("span", { className: "pm" }, `of ${whole(count)}`)] : [];
  $("s-count").replaceChildren(whole(result.num_scored), ...rest);
}

/** What a result tells of its tokens from `first` on. */
function tokensOf(result, first) {
  const logprobs = floats(result.token_logprobs).subarray(first);
  return Array.from(logprobs, (logprob, index) => ({
    logprob: Number.isNaN(logprob) ? null : logprob,
    top: result.top_logprobs[first + index],
  }));
}

/** Statistics of the scored ones of some tokens, named as the server names them. */
function summary(tokens) {
  const losses = tokens.filter(({ logprob }) => logprob !== null).map(({ logprob }) => -logprob);
  const n = losses.length;
  const mean = losses.reduce((sum, loss) => sum + loss, 0) / n;
  const variance = losses.reduce((sum, loss) => sum + (loss - mean) ** 2, 0) / (n - 1);
  const perplexity = Math.exp(mean);
  return { num_scored: n, mean_nll: mean, perplexity, stderr: perplexity * Math.sqrt(variance / n) };
}

/** Perplexity by position: half octaves, but 16 tokens at least, as {from, to, perplexity, stderr}. */
function halfOctaves(tokens) {
  const entries = [];
  for (let from = 0, to; from < tokens.length; from = to) {
    to = Math.min(Math.max(from + 16, Math.round(from * Math.SQRT2)), tokens.length);
    const bucket = { from, to, ...summary(tokens.slice(from, to)) };
    // A mean of a few tokens says nothing: a short rest at the end is left out.
    if (bucket.num_scored >= 8) entries.push(bucket);
  }
  return entries;
}

function drawPositions(tokens) {
  const entries = halfOctaves(tokens);
  charts[0]?.remove();
  if (!entries.length) {
    $("s-position").replaceChildren(el("p", { className: "empty" }, "Needs a text of some more tokens."));
    $("s-position").setAttribute("aria-label", "Chart: the text is too short");
    return;
  }
  const label = `Perplexity by position: ${entries.map((entry) => `${entry.from} to ${entry.to - 1}: ${short(entry.perplexity)}`).join("; ")}`;
  const middle = entries.map(({ from, to }) => Math.sqrt(Math.max(from, 1) * to));
  redraw(0, $("s-position"), label, middle, entries, "tokens before", true);
}

function drawLadder(ladder) {
  const place = $("s-ladder");
  const steps = ladder.filter((step) => step.perplexity !== null);
  if (!steps.length) {
    charts[1]?.remove();
    place.replaceChildren(el("p", { className: "empty" }, "Needs a text of 128 tokens or more."));
    place.setAttribute("aria-label", "Chart: the text is too short");
    return;
  }
  $("s-ladder-hint").textContent = `Perplexity of the last ${steps[0].num_scored} tokens of the text, with growing context.`;
  const label = `Length ladder: ${steps.map((step) => `${step.length}: ${short(step.perplexity)}`).join("; ")}`;
  redraw(1, place, label, steps.map((step) => step.length), steps, "context in tokens", false);
}

/** Draw perplexities over a logarithmic axis, with a band of one standard error where it is asked for. */
function redraw(slot, place, label, x, entries, title, band) {
  charts[slot]?.remove();
  const name = (index) => {
    const { from, to, length } = entries[index];
    return length === undefined ? `${whole(from)} to ${whole(to - 1)}` : whole(length);
  };
  const values = entries.map((entry) => entry.perplexity);
  const errors = entries.map((entry) => entry.stderr ?? 0);
  // The error is that of the mean logarithm, so the band is one of factors.
  const bound = (sign) => values.map((value, index) => value * Math.exp((sign * errors[index]) / value));
  // The steps of a ladder share their tokens: their differences are far surer than each of them.
  const edges = band ? [bound(-1), bound(1)] : [];
  const data = [x, ...edges, values];
  const options = (width, colour) => ({
    width,
    height: 240,
    padding: [8, 16, 0, 0],
    // Steps that differ by less than the scale is wide differ by nothing that matters.
    scales: { x: octaves, y: band ? {} : { range: (_, low, high) => [0.9 * low, 1.1 * high] } },
    cursor: { drag: { x: false, y: false } },
    axes: [
      axis({ label: title, size: 34, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : compact(tick))), space: 34 }),
      axis({ size: 52, values: (_, ticks) => ticks.map((tick) => String(+tick.toPrecision(6))) }),
    ],
    bands: band ? [{ series: [2, 1], fill: colour("band") }] : [],
    series: [
      { label: title, value: (_, value, __, index) => (index === null ? "–" : name(index)) },
      ...edges.map(() => ({ class: "unnamed", width: 0, points: { show: false } })),
      {
        label: "perplexity", stroke: colour("accent"), width: 2, points: { show: true, size: 6, fill: colour("accent") },
        value: (_, value, __, index) => (index === null ? "–" : `${short(value)} ± ${short(errors[index])}`),
      },
    ],
  });
  charts[slot] = new Chart(place, label, options, data);
}

$("score-text").value = EXAMPLE;
$("score-form").addEventListener("submit", (event) => {
  event.preventDefault();
  work.run(score);
});
$("score-example").addEventListener("click", () => {
  $("score-text").value = EXAMPLE;
  $("score-text").focus();
});
$("score-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  if (file.size > MOST_BYTES) return say($("s-status"), `${file.name} has ${whole(file.size)} bytes; ${whole(MOST_BYTES)} at most can be scored.`, true);
  try {
    $("score-text").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    say($("s-status"), `${file.name} is ready to be scored.`);
  } catch {
    say($("s-status"), `${file.name} is not UTF-8 text.`, true);
  }
});
