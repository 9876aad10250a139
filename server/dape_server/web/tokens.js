// A text as coloured tokens: drawn in slices so that the page stays responsive, read by pointer or keys.

import { el, short, visible } from "./dom.js";

// Upper bounds of -log p in nats; the tenth colour is for all above.
const STEPS = [0.1, 0.3, 0.7, 1.5, 2.5, 4, 6, 8, 11];
const SLICE = 1500;

const step = (nll) => {
  const found = STEPS.findIndex((bound) => nll <= bound);
  return found < 0 ? STEPS.length : found;
};

export function drawLegend(place) {
  const bounds = [0, ...STEPS];
  place.replaceChildren(...bounds.map((bound, index) => el("li", { className: `p${index}` }, `${bound ? "−" : ""}${bound}`)));
}

export class TokenView {
  #chosen = null;
  #frame = 0;
  #shown = [];

  constructor(place, facts) {
    Object.assign(this, { place, facts, tokens: [] });
    place.addEventListener("pointerover", (event) => this.#point(event));
    place.addEventListener("click", (event) => this.#point(event));
    place.addEventListener("keydown", (event) => this.#key(event));
    place.addEventListener("focus", () => this.place.querySelector("i") && this.choose(this.#index() ?? 0));
  }

  /** Begin a text of these tokens; nothing is known of them yet. */
  begin(texts) {
    this.texts = texts;
    this.tokens = [];
    this.#shown = readable(texts);
    this.#chosen = null;
    this.place.replaceChildren();
    this.place.scrollTop = 0;
    this.facts.replaceChildren(el("p", { className: "empty" }, "No token chosen."));
  }

  /** Colour the next tokens: {logprob (null: not scored), top: {text: logprob} or null}. */
  add(tokens) {
    this.tokens.push(...tokens);
    this.#frame ||= requestAnimationFrame(() => this.#slice());
  }

  #slice() {
    const first = this.place.children.length;
    const end = Math.min(first + SLICE, this.tokens.length);
    const nodes = document.createDocumentFragment();
    for (let index = first; index < end; index++) {
      const { logprob } = this.tokens[index];
      const className = logprob === null ? "none" : `p${step(-logprob)}`;
      nodes.append(el("i", { className }, this.#shown[index]));
    }
    this.place.append(nodes);
    this.#frame = end < this.tokens.length ? requestAnimationFrame(() => this.#slice()) : 0;
  }

  #index() {
    return this.#chosen && [...this.place.children].indexOf(this.#chosen);
  }

  #point(event) {
    if (event.target.tagName !== "I" || event.target === this.#chosen) return;
    this.choose([...this.place.children].indexOf(event.target));
  }

  #key(event) {
    const last = this.place.children.length - 1;
    const now = this.#index() ?? -1;
    const next = {
      ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + 10, ArrowUp: now - 10,
      PageDown: now + 200, PageUp: now - 200, Home: 0, End: last,
    }[event.key];
    if (next === undefined || !this.place.querySelector("i")) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(next, 0), last), true);
  }

  choose(index, scroll = false) {
    this.#chosen?.classList.remove("chosen");
    this.#chosen = this.place.children[index];
    this.#chosen.classList.add("chosen");
    if (scroll) this.#chosen.scrollIntoView({ block: "nearest" });
    this.facts.replaceChildren(...this.#describe(index));
  }

  #describe(index) {
    const text = this.texts[index];
    const { logprob, top } = this.tokens[index];
    const title = el("p", {}, el("code", {}, visible(text)), ` at position ${index}`);
    if (logprob === null) return [title, el("p", { className: "empty" }, "Not scored: there is nothing before it.")];
    const entries = Object.entries(top ?? {}).sort((a, b) => b[1] - a[1]);
    const better = entries.filter(([other, value]) => value > logprob && other !== text).length;
    const known = entries.some(([other]) => other === text);
    const rank = known ? `rank ${better + 1}` : `rank above ${entries.length}`;
    const value = el("p", {}, `log p = ${short(logprob)}, p = ${percent(logprob)}, ${rank}`);
    const rows = known ? entries : [...entries, [text, logprob]];
    const table = el(
      "table", {}, el("caption", {}, "Likeliest tokens here"),
      el("tbody", {}, ...rows.map(([other, at]) => el(
        "tr", { className: other === text ? "own" : "" },
        el("th", { scope: "row" }, el("code", {}, visible(other))), el("td", {}, short(at)), el("td", {}, percent(at)),
      ))),
    );
    return [title, value, table];
  }
}

/** What each token shows: bytes of one character are told apart, the last of them shows the character. */
function readable(texts) {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let bytes = [];
  return texts.map((text) => {
    if (!text.startsWith("bytes:")) {
      bytes = [];
      return text;
    }
    for (const [part, hex] of text.slice(6).matchAll(/\\x([0-9a-f]{2})|[^]/gu)) {
      bytes.push(...(hex ? [parseInt(hex, 16)] : new TextEncoder().encode(part)));
    }
    try {
      const character = decoder.decode(Uint8Array.from(bytes));
      bytes = [];
      return character;
    } catch {
      return "·";
    }
  });
}

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)} %` : `${value.toPrecision(2)} %`;
};
