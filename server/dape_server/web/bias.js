// Panel "Bias": static bias B against adapted bias B + f(A, B) of one query, for every head.

import { floats, post } from "./api.js";
import { Chart, axis, compact, octaves } from "./charts.js";
import { $, Work, el, say, short, visible, whole } from "./dom.js";
import { BIAS_EXAMPLE } from "./examples.js";

const MOST_KEYS = 320;
const work = new Work($("bias-go"), $("bias-stop"), $("b-status"));
const place = $("b-charts");
let charts = [];
let answer = null;
let text = "";
let waiting = 0;

const LINES = [
  { name: "static_bias", label: "B", colour: "static", width: 1.5, dash: [5, 4] },
  { name: "adapted_bias", label: "B + f(A, B)", colour: "adapted", width: 1.75 },
  { name: "scores", label: "A", colour: "scores", width: 1 },
];

/** Ask for every layer at once: changing the layer then needs no further request. */
async function look(signal, query) {
  if (!text) throw new Error("There is no text yet.");
  const body = { input: text, max_keys: MOST_KEYS, encoding_format: "base64", return_token_strs: true };
  if (query !== undefined) body.query = query;
  place.classList.toggle("stale", answer !== null);
  say($("b-status"), "Reading the text up to the query …");
  const started = performance.now();
  answer = await post("/v1/attention_bias", body, signal);
  for (const { heads } of answer.layers) {
    for (const head of heads) for (const { name } of LINES) head[name] = floats(head[name]);
  }
  place.classList.remove("stale");
  const kind = answer.dape_version === null ? "" : ` with DAPE${answer.dape_version > 1 ? ` version ${answer.dape_version}` : ""}`;
  say($("b-status"), `${answer.position_kind}${kind}: ${answer.num_layers} layers of ${answer.num_heads} heads, ${whole(answer.num_keys)} keys, ${Math.round(performance.now() - started)} ms.`);
  setControls(answer);
  draw();
}

function setControls({ query, num_layers, num_heads, usage, query_token, layers }) {
  const last = usage.prompt_tokens - 1;
  for (const input of [$("b-query"), $("b-query-number")]) Object.assign(input, { max: last, value: query, disabled: false });
  $("b-query-token").textContent = `token ${visible(query_token)}`;
  fill($("b-layer"), Array.from({ length: num_layers }, (_, layer) => [layer, `${layer}`]), liveliest(layers));
  fill($("b-head"), [["all", "all"], ...Array.from({ length: num_heads }, (_, head) => [head, `${head}`])], "all");
}

/** Fill a selection once for a model; what was chosen stays chosen. */
function fill(select, entries, chosen) {
  if (select.options.length === entries.length) return;
  select.replaceChildren(...entries.map(([value, label]) => new Option(label, value)));
  select.value = chosen;
  select.disabled = false;
}

/** The keys on the horizontal axis: ascending, and which key each one is. */
function columns(positions, query, kind) {
  const keys = positions.map((_, index) => index);
  if (kind === "position") return { x: positions, keys };
  keys.reverse();
  const shown = kind === "log" ? keys.filter((key) => positions[key] < query) : keys;
  return { x: shown.map((key) => query - positions[key]), keys: shown };
}

function draw() {
  if (!answer) return;
  charts.forEach((chart) => chart.remove());
  charts = [];
  const { heads } = answer.layers[Number($("b-layer").value)];
  const wanted = $("b-head").value;
  const shown = wanted === "all" ? heads : heads.filter(({ head }) => head === Number(wanted));
  place.classList.toggle("single", shown.length === 1);
  const axes = columns(answer.key_positions, answer.query, $("b-axis").value);
  if (!axes.x.length) {
    place.replaceChildren(el("p", { className: "empty" }, "The first token sees only itself: choose a later query."));
    return;
  }
  $("b-key-scores").hidden = !$("b-scores").checked;
  const lines = $("b-scores").checked ? LINES : LINES.slice(0, 2);
  const figures = shown.map((head) => {
    const chart = el("div", { className: "plot" });
    const figure = el("figure", { className: "head" }, el("figcaption", {}, `Head ${head.head}`, el("span", {}, change(head))), chart);
    return { figure, chart, head };
  });
  place.replaceChildren(...figures.map(({ figure }) => figure));
  for (const { chart, head } of figures) charts.push(drawHead(chart, head, lines, axes, shown.length === 1));
  const thinned = answer.key_positions.length < answer.num_keys;
  $("b-note").textContent = thinned
    ? `${whole(answer.key_positions.length)} of ${whole(answer.num_keys)} keys are drawn, evenly spaced; all of them were computed.`
    : `All ${whole(answer.num_keys)} keys are drawn.`;
}

/** The layer whose f(A, B) varies most from key to key, against its size: where content decides most. */
function liveliest(layers) {
  const share = ({ heads }) => {
    let steps = 0;
    let size = 1e-9;
    for (const { static_bias: before, adapted_bias: after } of heads) {
      for (let key = 1; key < after.length; key++) {
        const now = after[key] - before[key];
        steps += Math.abs(now - (after[key - 1] - before[key - 1]));
        size += Math.abs(now);
      }
    }
    return steps / size;
  };
  return layers.reduce((best, layer) => (share(layer) > share(best) ? layer : best)).layer;
}

/** Root mean square of f(A, B), in nats. */
function change({ static_bias: before, adapted_bias: after }) {
  const sum = after.reduce((total, value, index) => total + (value - before[index]) ** 2, 0);
  return `rms of f ${short(Math.sqrt(sum / after.length))}`;
}

function drawHead(chart, head, lines, { x, keys }, single) {
  const kind = $("b-axis").value;
  const data = [x, ...lines.map(({ name }) => keys.map((key) => head[name][key]))];
  const name = (index) => {
    if (index === null || index === undefined) return "–";
    const key = keys[index];
    return `${kind === "position" ? "" : "−"}${x[index]} ${visible(answer.key_tokens[key])}`;
  };
  const options = (width, colour) => ({
    width,
    height: single ? 380 : 170,
    scales: { x: kind === "log" ? octaves : { time: false } },
    cursor: { drag: { x: false, y: false }, sync: { key: "heads" }, points: { size: 5 } },
    axes: [
      axis({ size: single ? 34 : 24, space: 44, ...(single ? { label: kind === "position" ? "key position" : "distance to the key" } : {}), values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : compact(tick))) }),
      axis({ size: 40, values: (_, ticks) => ticks.map((tick) => String(+tick.toPrecision(6))) }),
    ],
    series: [
      { label: kind === "position" ? "key" : "distance", value: (_, __, ___, index) => name(index) },
      ...lines.map((line) => ({
        label: line.label, stroke: colour(line.colour), width: line.width, dash: line.dash,
        points: { show: false }, value: (_, value) => short(value),
      })),
    ],
  });
  const ends = lines.slice(0, 2).map(({ name: which, label }) => `${label} from ${short(Math.min(...head[which]))} to ${short(Math.max(...head[which]))}`);
  return new Chart(chart, `Head ${head.head}: ${ends.join(", ")} nats`, options, data);
}

$("bias-text").value = BIAS_EXAMPLE;
$("bias-form").addEventListener("submit", (event) => {
  event.preventDefault();
  text = $("bias-text").value;
  work.run((signal) => look(signal));
});
for (const input of [$("b-query"), $("b-query-number")]) {
  input.addEventListener("input", () => {
    if (!input.checkValidity() || input.value === "") return;
    const query = input.valueAsNumber;
    $("b-query").value = $("b-query-number").value = query;
    // While the slider moves only the last place is asked for.
    clearTimeout(waiting);
    waiting = setTimeout(() => work.run((signal) => look(signal, query)), 120);
  });
}
for (const id of ["b-layer", "b-head", "b-axis", "b-scores"]) $(id).addEventListener("change", draw);
