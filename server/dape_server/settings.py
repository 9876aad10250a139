"""The server's settings, apart from the engine's. The command line fills them in."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class ServerSettings(BaseModel):
    """Address, key, names and limits of one HTTP server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 lets the system choose a free one."""
    api_key: tuple[Annotated[SecretStr, Field(min_length=1)], ...] = ()
    """Accepted keys; none: every client is served."""
    served_model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name of the model in requests and answers; by default the model folder's."""
    max_body_size: Annotated[int, Field(ge=1 << 10)] = 8 << 20
    """Bytes of one request body; longer ones are refused. Reading JSON holds up everyone else."""
    shutdown_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """Seconds that running requests are given to finish after SIGTERM."""
    health_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds without a finished step, while there is work, after which /health answers 503."""
    access_log: bool = True
    """Log a line for every HTTP request."""
