// Sets the chosen theme before the first paint; loaded as a plain script for that reason.
try {
  const chosen = localStorage.getItem("dape-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be forbidden: the system's theme stays.
}
