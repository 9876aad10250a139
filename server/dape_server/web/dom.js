// Small helpers for elements, numbers and running work.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, never HTML. */
export function el(name, props = {}, ...children) {
  const node = Object.assign(document.createElement(name), props);
  node.append(...children);
  return node;
}

const count = new Intl.NumberFormat("en");
export const whole = (value) => count.format(value);

/** A number with three or four significant digits. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toExponential(2);
  return size >= 1000 ? whole(Math.round(value)) : size >= 100 ? value.toFixed(1) : value.toFixed(size >= 10 ? 2 : 3);
}

export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

/** Show a token as one visible word: its spaces and line ends would be lost in a table. */
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

/** Show a line that is read out when it changes, so only then. */
export function say(node, text, isError = false) {
  if (node.textContent !== text) node.textContent = text;
  node.classList.toggle("error", isError);
}

/** The work of one panel: one run at a time, ended by its stop button or by the next run. */
export class Work {
  #controller = null;

  constructor(go, stop, status) {
    Object.assign(this, { go, stop, status });
    stop.addEventListener("click", () => this.#controller?.abort());
  }

  /** Run `task(signal)` and put into words how it ended; return whether it ended well. */
  async run(task) {
    this.#controller?.abort();
    const controller = (this.#controller = new AbortController());
    this.stop.disabled = false;
    say(this.status, "Waiting for the server …");
    this.status.scrollIntoView({ block: "nearest" });
    try {
      await task(controller.signal);
      return true;
    } catch (error) {
      if (controller !== this.#controller) return false;
      if (controller.signal.aborted) say(this.status, "Stopped.");
      else say(this.status, error.message, true);
      return false;
    } finally {
      if (controller === this.#controller) {
        // The focus must not vanish with the button that holds it.
        if (document.activeElement === this.stop) this.go.focus();
        this.stop.disabled = true;
      }
    }
  }
}
