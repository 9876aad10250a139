// Panel "Complete": one streamed completion with its speed.

import { events } from "./api.js";
import { $, Work, el, say, seconds, whole } from "./dom.js";

const work = new Work($("complete-go"), $("complete-stop"), $("c-status"));
const output = $("output");
const progress = $("c-progress");
progress.classList.add("idle");

function settings() {
  const seed = $("seed").value;
  return {
    prompt: $("prompt").value,
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    top_p: $("top-p").valueAsNumber,
    top_k: $("top-k").valueAsNumber,
    repetition_penalty: $("penalty").valueAsNumber,
    ...(seed === "" ? {} : { seed: Number(seed) }),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_progress: true,
  };
}

/** Clock readings of one completion, shown as they come. */
class Meter {
  start = performance.now();
  first = null;
  tokens = 0;

  count(tokens) {
    const now = performance.now();
    if (tokens > 0 && this.first === null) {
      this.first = now;
      this.atFirst = tokens;
      $("c-ttft").textContent = seconds((now - this.start) / 1000);
    }
    this.tokens = tokens;
    $("c-tokens").textContent = whole(tokens);
    // The first token's time is that of the prompt: the rate counts those after it.
    if (tokens > this.atFirst && now > this.first) $("c-rate").textContent = this.rate(now).toFixed(1);
  }

  rate = (now) => ((this.tokens - this.atFirst) * 1000) / (now - this.first);
}

function showProgress({ total, cache, processed }) {
  progress.value = total ? processed / total : 1;
  $("c-prompt").textContent = `${whole(processed)} / ${whole(total)}`;
  say($("c-status"), `Reading the prompt${cache ? `, ${whole(cache)} tokens of it from the cache` : ""} …`);
}

const ENDS = {
  length: "The limit of tokens is reached.",
  stop: "The model ended the text.",
  abort: "The server ended the request.",
};

async function complete(signal) {
  const body = settings();
  for (const id of ["c-ttft", "c-rate", "c-tokens", "c-prompt"]) $(id).textContent = "–";
  progress.value = 0;
  progress.classList.remove("idle");
  const made = el("span", { className: "made" });
  output.replaceChildren(el("span", { className: "prompt" }, body.prompt), made);
  output.scrollTop = output.scrollHeight;
  output.classList.add("busy");
  // Read out once, when it is complete: not word by word.
  output.setAttribute("aria-busy", "true");
  output.scrollIntoView({ block: "nearest" });
  const meter = new Meter();
  let ending = "";
  let text = "";
  let frame = 0;
  const draw = () => {
    frame = 0;
    const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
    made.textContent = text;
    if (atEnd) output.scrollTop = output.scrollHeight;
  };
  try {
    for await (const chunk of events("/v1/completions", body, signal)) {
      if (chunk.prompt_progress) showProgress(chunk.prompt_progress);
      if (chunk.usage) {
        meter.count(chunk.usage.completion_tokens);
        if (meter.first !== null) {
          progress.value = 1;
          $("c-prompt").textContent = whole(chunk.usage.prompt_tokens);
          say($("c-status"), "Generating …");
        }
      }
      const [choice] = chunk.choices;
      if (!choice) continue;
      text += choice.text;
      frame ||= requestAnimationFrame(draw);
      ending = choice.finish_reason ?? ending;
    }
    say($("c-status"), `${ENDS[ending] ?? "Done."} ${seconds((performance.now() - meter.start) / 1000)} in all.`);
  } finally {
    cancelAnimationFrame(frame);
    draw();
    output.classList.remove("busy");
    output.removeAttribute("aria-busy");
    progress.classList.add("idle");
  }
}

$("complete-form").addEventListener("submit", (event) => {
  event.preventDefault();
  work.run(complete);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("complete-form").requestSubmit();
});
