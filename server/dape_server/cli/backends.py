"""`dape backends`: which attention kernels run here."""

from __future__ import annotations

import click
import torch
from rich.console import Console
from rich.table import Table

from dape_engine.config import DapeConfig, PositionConfig
from dape_engine.encoding import PositionalEncoding
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_kernels.attention import BACKENDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
BLOCK_SIZE = EngineOptions.model_fields["block_size"].default
EXAMPLES = {
    "kerple": (PositionConfig(kind="kerple"), None),
    "DAPE-Kerple": (PositionConfig(kind="kerple"), DapeConfig()),
    "DAPE-FIRE": (PositionConfig(kind="fire"), DapeConfig()),
    "DAPE V2-Kerple": (PositionConfig(kind="kerple"), DapeConfig(version=2, kernel=3)),
    "CoPE": (PositionConfig(kind="cope"), None),
}


@click.command()
def backends() -> None:
    """List the attention backends, what each can run here, and which one is chosen."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    console = Console(markup=False)
    for key, backend in BACKENDS.items():
        try:
            console.print(f"{key}: {backend.describe()}", highlight=False)
        except ValueError as error:  # a wrong setting in the environment
            raise SettingsError(str(error)) from error
    table = Table("device", "cache", "encoding", "chosen", "why not the faster ones")
    for device in devices:
        for dtype in DTYPES:
            for name, (position, dape) in EXAMPLES.items():
                encoding = PositionalEncoding(position, dape, 12, 64).encoding()
                chosen, reasons = "none", []
                for key, backend in BACKENDS.items():
                    reason = backend.unsupported(encoding, dtype, device, BLOCK_SIZE)
                    if reason is None:
                        chosen = key
                        break
                    reasons.append(f"{key}: {reason}")
                cache = str(dtype).removeprefix("torch.")
                table.add_row(str(device), cache, name, chosen, "; ".join(reasons))
    console.print(table)
