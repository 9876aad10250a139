// The page's frame: tabs, theme, key, and what the model is.

import { get, hasKey, setKey } from "./api.js";
import { $, say, whole } from "./dom.js";
import "./bias.js";
import "./complete.js";
import "./score.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];

function open(tab, focus = false) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  const name = tab.getAttribute("aria-controls");
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  window.dispatchEvent(new Event("panel-opened"));
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    open(tabs.at(step % tabs.length), true);
  });
}

const fromHash = () => open(tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0]);
window.addEventListener("hashchange", fromHash);
fromHash();

// Theme: system, light, dark.
const THEMES = ["system", "light", "dark"];

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "system";
  $("theme").textContent = { system: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[theme];
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
  window.dispatchEvent(new Event("theme-changed"));
}

$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "system";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("dape-theme", next);
  } catch {
    // Storage may be forbidden: the choice then lasts as long as the page.
  }
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();

// Key.
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key").value = "";
  $("key-box").open = false;
  $("key-box").querySelector("summary").focus();
  showModel();
});
$("key-box").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  $("key-box").open = false;
  $("key-box").querySelector("summary").focus();
});
document.addEventListener("click", (event) => {
  if (!$("key-box").contains(event.target)) $("key-box").open = false;
});
document.addEventListener("key-needed", () => {
  $("key-box").open = true;
  $("key").focus();
});

async function showModel() {
  $("key-box").querySelector("summary").textContent = hasKey() ? "API key set" : "API key";
  const facts = $("model");
  try {
    const [model] = (await get("/v1/models")).data;
    say(facts, `${model.id} · trained on ${whole(model.train_length)} tokens · serves ${whole(model.max_model_len)}`);
    $("max-tokens").max = model.max_model_len;
  } catch (error) {
    say(facts, error.message);
  }
}
showModel();
