"""The table of a sweep: what is done, begun and left, and the time of each run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from rich.table import Table

from dape_training.run_folder import last_progress
from dape_training.sweep import Job, Sweep


def status_table(sweep: Sweep, jobs: Sequence[Job]) -> Table:
    """Return one row for each run and one column for each data set, which holds all seeds in their order."""
    done = sum(job.finished for job in jobs)
    begun = sum(0 < job.share_done < 1 for job in jobs)
    table = Table(
        "run",
        *sweep.datasets,
        title=f"{done} runs done, {begun} begun, {len(jobs) - done - begun} left",
        caption=_hours(jobs),
    )
    for name, run in sweep.runs.items():
        cells = [
            "  ".join(_cell(job) for job in jobs if (job.run, job.dataset) == (name, dataset))
            for dataset in sweep.datasets
        ]
        table.add_row(run.label, *cells)
    return table


def _cell(job: Job) -> str:
    """Return the minutes of a finished run, the share done of a begun one."""
    if job.finished:
        return f"{job.result['seconds'] / 60:.1f} min"
    return f"{job.share_done:.0%}" if job.share_done else "-"


def _hours(jobs: Sequence[Job]) -> str:
    """Return the hours spent, and those left at the measured speed."""
    spent = {job.name: last_progress(job.folder).seconds for job in jobs}
    whole: dict[str, list[float]] = {}
    for job in jobs:
        if job.share_done:
            whole.setdefault(job.run, []).append(spent[job.name] / job.share_done)
    text = f"{sum(spent.values()) / 3600:.1f} core hours spent"
    if not whole:
        return text
    # A run that was not begun anywhere is taken to last as long as the others do on average.
    default = mean(mean(times) for times in whole.values())
    left = sum((1 - job.share_done) * mean(whole.get(job.run, [default])) for job in jobs)
    return f"{text}, about {left / 3600:.1f} left"
