"""Ray sessions: attach to the cluster we were told of, or start one here that is ours alone."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.launch import local_ray
from orchestrator.launch.forks import fork_server
from orchestrator.launch.signals import hangup_blocked, hangup_ends
from orchestrator.launch.temporary import session_folder
from orchestrator.redaction import redact

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
}
DATA_LOGGING = Path(__file__).with_name("ray_data_logging.yaml")

MEMORY_SETTINGS = {
    # glibc reads this when a worker starts: freed memory stays with the process and is used again, whole. By itself
    # it maps each block of over 32 MiB anew, and the kernel fills its pages one by one at their first touch; a step
    # takes and frees such blocks all the time. Chunks kept per thread would split what is freed.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1099511627776"
    ":glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0",
}

LOCAL_SETTINGS = {
    # Each is a process, or work in one, that a Ray of our own on one machine has no use for.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Workers are forked when they are wanted; those that Ray starts ahead would stay unused.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Above this Ray writes a warning across the screen, again and again. By itself it is the number of CPUs.
    "RAY_worker_maximum_startup_concurrency": "64",
}


def attached_address() -> str | None:
    """The address of the cluster this process belongs to; None where it is on its own."""
    return os.environ.get("RAY_ADDRESS")


@contextmanager
def ray_session(cpus: int | None = None) -> Iterator[Any]:
    """A connected `ray` module.

    Inside a Ray job, or with RAY_ADDRESS set, this attaches to that cluster; otherwise a Ray of our
    own starts on this machine, with `cpus` (default: all) and its GPUs, and ends with the block.
    `ray.init()` alone would attach to any Ray that happens to run here. A session that is already
    open is used and left open.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    keep_ray_data_quiet()
    loaded: Any = sys.modules.get("ray")
    if loaded is not None and loaded.is_initialized():
        yield loaded
        return
    session = _attached() if attached_address() else _own(cpus or len(os.sched_getaffinity(0)))
    with hangup_ends(), session as ray:
        send_chatter_to(None)
        _log_node_errors(ray)
        yield ray


def _log_node_errors(ray: Any) -> None:
    """Send what Ray says of lost nodes to its log; it prints 20 lines of a raylet's log, twice, on standard output.

    The loss itself is noticed and told by the run. The function is that of Ray 2.60.
    """
    worker = ray._private.worker
    show = worker.print_to_stdstream
    if getattr(show, "sends_node_errors_to_log", False):
        return

    def log_or_show(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") == "raylet":
            logging.getLogger("ray").error("\n".join(data["lines"]))
        else:
            show(data, ignore_prefix)

    log_or_show.sends_node_errors_to_log = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = log_or_show


@contextmanager
def _attached() -> Iterator[Any]:
    """A connection to the cluster that this process belongs to."""
    import ray

    ray.init(
        address="auto",
        runtime_env={"env_vars": for_workers()},
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _own(cpus: int) -> Iterator[Any]:
    """A Ray on this machine that ends with the block."""
    set_here = [name for name in LOCAL_SETTINGS if name not in os.environ]
    os.environ.update({name: LOCAL_SETTINGS[name] for name in set_here})
    try:
        # The fork server first of all: whatever starts, waits for it.
        with session_folder() as folder, fork_server(folder, **MEMORY_SETTINGS) as python:
            import ray

            # Workers inherit the settings from this process.
            with _importing(("torch", "transformers.modeling_utils")), hangup_blocked():
                local_ray.start(ray, folder, cpus + EXTRA_CPUS, python)
            try:
                yield ray
            finally:
                ray.shutdown()
    finally:
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


def for_workers() -> dict[str, str]:
    """Return the environment variables of workers on a cluster; none depends on this machine."""
    wanted = {**MEMORY_SETTINGS, **{name: os.environ[name] for name in TRAIN_SETTINGS}}
    return {name: value for name, value in wanted.items() if name not in _job_variables()}


def keep_ray_data_quiet() -> None:
    """In this process Ray Data passes what it says on to the logger `ray`. The file lies where this package does, which
    may be elsewhere on each node."""
    os.environ.setdefault("RAY_DATA_LOGGING_CONFIG", str(DATA_LOGGING))


def _job_variables() -> dict[str, str]:
    """Variables that the job this process belongs to has set; Ray refuses to have them set again."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found: dict[str, str] = config.get("runtime_env", {}).get("env_vars", {})
    return found


class _Redacted(logging.Formatter):
    """Log lines without the credentials that libraries quote."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class LogFile(logging.FileHandler):
    """A log file whose lines are lost where the disk is full; logging would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record."""


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
            handler = LogFile(log_file)
            handler.setFormatter(_Redacted("%(asctime)s %(name)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
