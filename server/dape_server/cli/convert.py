"""`dape convert`: foreign checkpoints to model folders, and model folders to Hugging Face's form."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from dape_engine.convert.assemble import STATUSES, Report
from dape_engine.convert.export import export_hf
from dape_engine.convert.hf import import_hf
from dape_engine.convert.neox import import_gpt_neox
from dape_engine.convert.result import ImportOptions
from dape_engine.errors import SettingsError
from dape_engine.weights import resolve_model
from dape_server.cli.report import write_json

IMPORTERS = {"gpt-neox": import_gpt_neox, "hf": import_hf}


@click.command()
@click.option("--from", "source_format", type=click.Choice(list(IMPORTERS)), help="Format of SOURCE.")
@click.option("--to", "target_format", type=click.Choice(["hf"]), help="Format of OUT; SOURCE is a model.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--settings",
    multiple=True,
    type=click.Path(path_type=Path),
    help="gpt-neox: YAML file of the training run; may be given several times. [default: found beside]",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="tokenizer.json, 20B_tokenizer.json, vocab.json (merges beside) or a folder. [default: found there]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights written. [default: the checkpoint's]",
)
@click.option(
    "--max-model-len", type=click.IntRange(1), help="Longest text in tokens. [default: the checkpoint's]"
)
@click.option("--allow-missing", is_flag=True, help="Give tensors that the checkpoint lacks initial values.")
@click.option("--allow-unused", is_flag=True, help="Leave out tensors that have no place in the model.")
@click.option("--report", "report_path", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON.")
def convert(
    source_format: str | None,
    target_format: str | None,
    source: Path,
    out: Path,
    report_path: Path | None,
    settings: tuple[Path, ...],
    tokenizer: Path | None,
    dtype: str | None,
    max_model_len: int | None,
    allow_missing: bool,
    allow_unused: bool,
) -> None:
    """Convert the checkpoint SOURCE to the model folder OUT, or with --to a model to a foreign folder."""
    if (source_format is None) == (target_format is None):
        raise SettingsError("give either --from FORMAT or --to FORMAT")
    options = ImportOptions(settings, tokenizer, dtype, max_model_len, allow_missing, allow_unused)
    if source_format is None:
        if options != ImportOptions() or report_path is not None:
            raise SettingsError("--to hf copies a model as it is: it takes no other options")
        export_hf(resolve_model(str(source)), out)
        click.echo(f"wrote {out}: AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")
        return
    report = Report(str(source))
    try:
        IMPORTERS[source_format](source, out, options, report)
    finally:
        _print(report)
        if report_path is not None:
            write_json(report_path, report.as_json())
    click.echo(f"wrote {out}")


def _print(report: Report) -> None:
    """Print the report, unless the import failed before there was any."""
    if not report.entries:
        return
    console = Console(width=None if Console().is_terminal else 200)
    table = Table("status", "tensor of the checkpoint", "tensor of the model", "shape", "dtype", "note")
    for entry in report.entries:
        table.add_row(entry.status, entry.source, entry.target, str(entry.shape), entry.dtype, entry.note)
    console.print(table, markup=False, highlight=False)
    for note in report.notes:
        console.print(note, markup=False, highlight=False)
    counts = ", ".join(f"{report.count(status)} {status}" for status in STATUSES)
    console.print(f"tensors: {counts}", markup=False, highlight=False)
