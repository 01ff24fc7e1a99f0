"""Ray sessions: attach to the cluster we were told of, or start one here that is ours alone."""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXTRA_CPUS = 2
"""Logical CPUs a local Ray gets beyond the machine's: reads and actors run beside the workers."""

TRAIN_SETTINGS = {
    # Ray Train notices a dead worker at the next health check; its default is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Ray nices its workers by 15; anything else on the machine would starve them.
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).parent / "ray_data_logging.yaml"),
}

LOCAL_SETTINGS = {
    # Each is a process, or work in one, that a Ray of our own on one machine has no use for.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def attached_address() -> str | None:
    """The address of the cluster this process belongs to; None where it is on its own."""
    return os.environ.get("RAY_ADDRESS")


@contextmanager
def ray_session(cpus: float, gpus: float = 0) -> Iterator[Any]:
    """A connected `ray` module.

    Inside a Ray job, or with RAY_ADDRESS set, this attaches to that cluster; otherwise a Ray of our
    own starts on this machine and ends with the block. `ray.init()` alone would attach to any Ray
    that happens to run here. A session that is already open is used and left open.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    set_here: list[str] = []
    if attached_address():
        settings = {
            "env_vars": {k: os.environ[k] for k in TRAIN_SETTINGS if k not in _job_variables()}
        }
        ray.init(
            address="auto", runtime_env=settings, log_to_driver=False, logging_level=logging.ERROR
        )
    else:
        set_here = [name for name in LOCAL_SETTINGS if name not in os.environ]
        os.environ.update({name: LOCAL_SETTINGS[name] for name in set_here})
        # Workers inherit the settings from this process. A runtime_env would do as well, but Ray's
        # prestarted worker processes have none and would stay unused: every start would be cold.
        with _importing(("torch", "transformers.modeling_utils")):
            ray.init(
                address="local",
                num_cpus=int(cpus) + EXTRA_CPUS,
                num_gpus=int(gpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    send_chatter_to(None)
    try:
        yield ray
    finally:
        ray.shutdown()
        for name in set_here:
            del os.environ[name]


@contextmanager
def _importing(modules: tuple[str, ...]) -> Iterator[None]:
    """Import what the plan will need beside a block that mostly waits for other processes.

    None of these modules may be among those that the block imports itself.
    """
    thread = threading.Thread(target=lambda: [importlib.import_module(m) for m in modules])
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _job_variables() -> dict[str, str]:
    """Variables that the job this process belongs to has set; Ray refuses to have them set again."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found: dict[str, str] = config.get("runtime_env", {}).get("env_vars", {})
    return found


def send_chatter_to(log_file: Path | None) -> None:
    """Send Ray's, DeepSpeed's and transformers' logging to a file, or nowhere.

    Ray Data and Ray Train install their own handlers when they are imported, so that comes first.
    """
    for module in ("ray.data", "ray.train"):
        importlib.import_module(module)
    for name in ("ray", "ray.train", "deepspeed", "transformers"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = False
        if log_file is None:
            logger.addHandler(logging.NullHandler())
        else:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(log_file)
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
            )
            logger.addHandler(handler)
