"""Write the pages that follow from the code: routes, commands, metrics. No row is typed by hand.

`python docs/tools/generate_reference.py` writes docs/routes.md and docs/commands.md, and the table of
docs/observability.md. A test compares them with the code.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.app import create_app
from dape_server.cli import cli
from dape_server.settings import ServerSettings
from dape_training.markdown import fill
from reference_commands import commands_page
from reference_routes import Exchange, RoutesPage

DOCS = Path(__file__).resolve().parents[1]
EXCHANGES = DOCS / "tools/exchanges.json"


def pages(app: FastAPI) -> dict[str, str]:
    """Return the text of every generated page by its name, for one application."""
    exchanges = Exchange.read(EXCHANGES.read_text(encoding="utf-8"))
    observability = (DOCS / "observability.md").read_text(encoding="utf-8")
    return {
        "routes.md": RoutesPage(app.openapi(), exchanges).markdown(),
        "commands.md": commands_page(cli, EngineOptions.model_fields),
        "observability.md": fill(observability, "metrics", metrics_table(app.state.context.metrics.registry)),
    }


def metrics_table(registry: CollectorRegistry) -> str:
    """Return all metrics but those of the process as a table."""
    rows = ["| Name | Kind | Meaning |", "|---|---|---|"]
    for family in registry.collect():
        if not family.name.startswith("process_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


def main() -> None:
    engine = AsyncEngine(resolve_model(DEFAULT_MODEL), EngineOptions(kv_cache_memory="64MiB"))
    for name, text in pages(create_app(engine, ServerSettings())).items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
