"""The server's settings, apart from the engine's. The command line fills them in."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr

from dape_server.limits import MAX_SECONDS
from dape_server.logs import LogFormat, LogLevel

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]


class ServerSettings(BaseModel):
    """Address, key, names and limits of one HTTP server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 lets the system choose a free one."""
    api_key: tuple[Annotated[SecretStr, Field(min_length=1)], ...] = ()
    """Accepted keys; none: every client is served."""
    api_key_file: FilePath | None = None
    """File of further keys, one a line, that only the server's user should be able to read."""
    served_model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name of the model in requests and answers; by default the model folder's."""
    max_body_size: Annotated[int, Field(ge=1 << 10)] = 16 << 20
    """Bytes of one request body; longer ones are refused."""
    max_total_body_size: Annotated[int, Field(ge=1 << 10)] = 256 << 20
    """Bytes of the bodies of all requests under way; what does not fit is refused for now."""
    max_connections: Annotated[int, Field(ge=1)] = 1024
    """Open connections. Clients above are told to come back; from twice as many on they are cut off."""
    keep_alive_timeout: Seconds = 65.0
    """Seconds that a connection may wait between two requests."""
    receive_timeout: Seconds = 30.0
    """Seconds in which a client must have sent a request's headers, and as many for its body."""
    send_timeout: Seconds = 30.0
    """Seconds in which a client must take 64 KiB of its answer, or all that waits, or be cut off."""
    request_timeout: Seconds = 600.0
    """Seconds after which a request ends, finished or not; its own `timeout` can only be shorter."""
    max_request_tokens: Annotated[int, Field(ge=1)] = 1 << 20
    """Tokens that one request may cost: n x (prompt + max_tokens), summed over its prompts."""
    sse_ping_interval: Seconds = 15.0
    """Seconds after which a stream without news sends a comment, so that nobody in between closes it."""
    shutdown_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """Seconds that running requests are given to finish after SIGTERM."""
    health_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds without a finished step, while there is work, after which /health answers 503."""
    health_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port on which /health and /ready also answer, without a key and from a thread of their own."""
    access_log: bool = True
    """Log a line for every HTTP request: its route, status and seconds."""
    log_format: LogFormat = "text"
    """Form of the log's lines."""
    log_level: LogLevel = "info"
    """Least level of what is logged."""
    log_stats_interval: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Seconds between two lines about the engine's work, while there is any; 0: none."""
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """URL that takes OpenTelemetry traces, e.g. http://localhost:4318/v1/traces; needs the extra `otel`."""
