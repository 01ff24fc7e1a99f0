"""Environment of a submitted job, besides its files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.values import Frozen

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class RuntimeSpec(Frozen):
    """Environment of the job's processes on a cluster. `submit` requests it, and `render` writes it into manifests,
    where the driver has its own pod or the head's and reserves nothing. `train` on this machine does not read it."""

    pip: tuple[str, ...] = ()
    """Packages that Ray installs on every node before the job starts, as `pip install` takes them."""
    pip_options: tuple[str, ...] = ()
    """Options of that `pip install`, as in `--no-index` and `--find-links=/shared/wheels`."""
    env_vars: dict[VariableName, str] = Field(default={})
    """Environment variables of driver and workers. The cluster shows them to everyone who may list its
    jobs, so no secrets."""
    secrets: tuple[VariableName, ...] = ()
    """Names of environment variables that the cluster's own containers have, from a Secret for example
    (`HF_TOKEN`). Values are never sent; a missing one is found before training."""
    excludes: tuple[str, ...] = ()
    """Patterns as in `.gitignore` for what of the working directory is not packed, besides what
    `.gitignore` and `.rayignore` name. What the job itself names is always packed."""
    driver_cpus: Annotated[float, Field(ge=0)] = 0
    """CPUs reserved for the driver, beside those of the workers. Reserving anything lets the driver run on any
    node; without a reservation it runs on the head."""
    driver_memory_gib: Annotated[float, Field(ge=0)] = 0
    """Memory reserved for the driver, which exports the model at the end."""
    driver_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Custom Ray resources that the driver's node must have."""
    stop_wait_s: Annotated[int, Field(ge=1)] = 120
    """Seconds that a stopped job has to commit its checkpoint before Ray kills it (Ray's default: 3)."""
