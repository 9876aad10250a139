// Line charts in the colours of the page, redrawn when its theme or width changes.

import uPlot from "./vendor/uplot/uPlot.esm.js";

const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);

/** The present value of one of the page's colours. */
export function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

const live = new Set();

/** One chart inside an element. `options(width, colour)` returns uPlot's options, `data` its columns. */
export class Chart {
  #width = 0;
  #plot = null;

  constructor(place, label, options, data) {
    Object.assign(this, { place, options, data });
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", label);
    this.observer = new ResizeObserver(() => this.draw(false));
    this.observer.observe(place);
    live.add(this);
    this.draw(true);
  }

  draw(anew) {
    const width = Math.floor(this.place.clientWidth);
    if (!width || (!anew && width === this.#width)) return;
    this.#width = width;
    const options = this.options(width, colour);
    // A legend without values would only be in the way.
    const mark = (plot) => this.place.classList.toggle("idle", plot.cursor.left < 0);
    options.hooks = { ready: [mark], setCursor: [mark] };
    if (this.#plot && !anew) return this.#plot.setSize({ width, height: options.height });
    this.#plot?.destroy();
    this.place.replaceChildren();
    this.#plot = new uPlot(options, this.data, this.place);
  }

  remove() {
    this.observer.disconnect();
    live.delete(this);
    this.#plot?.destroy();
    this.#plot = null;
  }
}

window.addEventListener("theme-changed", () => live.forEach((chart) => chart.draw(true)));

const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

/** An axis in quiet colours. */
export const axis = (more = {}) => ({
  stroke: colour("muted"),
  font: FONT,
  labelFont: FONT,
  labelSize: 18,
  size: 42,
  grid: { stroke: colour("line"), width: 1 },
  ticks: { stroke: colour("line"), width: 1, size: 4 },
  ...more,
});

/** A logarithmic scale to base 2 that ends where the data end. */
export const octaves = { time: false, distr: 3, log: 2, range: (_, low, high) => [low, high > low ? high : 2 * low] };

/** A number of tokens in few characters: 16384 is 16K. */
export const compact = (value) => (value >= 1024 && value % 1024 === 0 ? `${value / 1024}K` : value >= 10000 ? `${Math.round(value / 1000)}k` : String(value));
