"""How many engines run behind one server, and where."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=1024)]


class ReplicaSettings(BaseModel):
    """Number, bounds and place of the replicas; without `replicas` the engine runs in the server itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    replicas: Count | None = None
    """Run so many engines, one per device, as Ray Serve replicas; needs the extra `ray`."""
    min_replicas: Count | None = None
    """Fewest replicas when there is little work; by default `replicas`."""
    max_replicas: Count | None = None
    """Most replicas when there is much work; by default `replicas`."""
    target_requests: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Requests at work or waiting per replica, above which replicas are added and below which they are
    taken away; by default max_num_seqs."""
    replica_cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """CPUs that Ray sets aside for a replica; by default an even share of this machine's."""
    ray_address: Annotated[str, Field(min_length=1)] | None = None
    """Address of a running Ray cluster, or auto; by default Ray is started here and ends with the server."""

    @property
    def fewest(self) -> int:
        """Replicas at all times."""
        return self.min_replicas or self.replicas or 1

    @property
    def most(self) -> int:
        """Replicas at most."""
        return self.max_replicas or self.replicas or 1
