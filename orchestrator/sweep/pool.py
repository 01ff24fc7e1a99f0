"""Pool of slots: long-lived Ray Train worker groups that run trial after trial."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, DamagedFileError, TrainingError
from orchestrator.launch.repeated_failures import failure_signature, failure_text
from orchestrator.launch.workers import log_to, must_see, node_taken_away_at_s
from orchestrator.plan.plan import Plan
from orchestrator.plan.resources import Workers
from orchestrator.report.records import append_event
from orchestrator.run_folder import RunFolder, SweepFolder, read_outcome, write_json

RESTARTS_WITHOUT_WORK = 3
"""Times in a row that a slot may fail to start before it is given up."""
NO_END = ("stopped", "storage_failed")
"""A trial that left its slot like this goes on when the sweep does."""

logger = logging.getLogger(__name__)


class WorkerGroupPool:
    """All slots; each is a thread of the driver around one `TorchTrainer.fit()` after another."""

    def __init__(
        self,
        workers: Workers,
        slots: int,
        root: Path,
        broker: Any,
        broker_name: str,
        health_timeout_s: float,
    ) -> None:
        self.workers, self.root, self.broker, self.broker_name = workers, root, broker, broker_name
        self.health_timeout_s = health_timeout_s
        self.work_dir = Path.cwd()
        self.errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._keep, args=(slot,), name=f"slot-{slot}", daemon=True)
            for slot in range(slots)
        ]

    def start(self) -> None:
        """Start all slots at once; their workers import while the sweep is planned."""
        for thread in self._threads:
            thread.start()

    def alive(self) -> bool:
        """Whether any slot can still run a trial."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self, timeout_s: float) -> None:
        """Wait for the slots to leave; the broker has been closed."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _keep(self, slot: int) -> None:
        """A slot's life: a worker group of the size that is wanted, again and again until none is."""
        import ray

        failures, workers = 0, self.workers.count
        while failures < RESTARTS_WITHOUT_WORK:
            error = self._fit(slot, workers)
            failures += 1
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self.broker.lost.remote(slot))  # nothing, where the slot left by itself
                if error is None or ray.get(self.broker.came.remote(slot)):
                    failures = 0
            if error is not None and failures == RESTARTS_WITHOUT_WORK:
                self.errors.append(error)
                return
            with contextlib.suppress(ray.exceptions.RayError):
                wanted = ray.get(self.broker.wanted.remote())
                if wanted is None:
                    return
                workers = wanted

    def _fit(self, slot: int, workers: int) -> Exception | None:
        """One worker group until it leaves; what ended it, where it did not leave by itself."""
        import ray

        try:
            self._trainer(slot, workers).fit()
            refusal = ray.get(self.broker.refusal.remote(slot))
            return TrainingError(refusal) if refusal else None
        except Exception as error:  # noqa: BLE001, a slot's end is not the sweep's
            logger.warning("slot %d: %s", slot, error)
            return error

    def _trainer(self, slot: int, workers: int) -> Any:
        from orchestrator.launch.trainer import make_group
        from orchestrator.sweep.requeue import RequeueCallback

        return make_group(
            f"slot-{slot}-{uuid.uuid4().hex[:6]}",
            serve,
            {
                "slot": slot,
                "root": str(self.root),
                "broker": self.broker_name,
                "work_dir": str(self.work_dir),
            },
            replace(self.workers, count=workers),
            self.root / "ray",
            max_failures=-1,  # the broker counts them, per trial
            health_timeout_s=self.health_timeout_s,
            callbacks=[RequeueCallback(self.broker_name, slot)],
        )


def serve(config: dict[str, Any]) -> None:
    """What each worker of a slot runs: take a trial, run it, report, until there is no more."""
    import ray
    import torch.distributed as dist

    from orchestrator.train.engine import import_ahead
    from orchestrator.train.group import broadcast, together
    from orchestrator.train.worker_cache import WorkerCache

    root, slot, rank = Path(config["root"]), config["slot"], dist.get_rank()
    if Path(config["work_dir"]).is_dir():
        os.chdir(config["work_dir"])
    broker = ray.get_actor(config["broker"])
    try:
        together(lambda: must_see(SweepFolder(root).events))
    except CheckpointError as error:
        if rank == 0:
            ray.get(broker.refuse.remote(slot, str(error)))
        return
    log_to(root / "logs" / f"slot-{slot:03d}-{rank:05d}.log")
    import_ahead()
    warm = WorkerCache()
    while True:
        task: Any = None
        if rank == 0:
            task = ray.get(broker.next_task.remote(slot, dist.get_world_size()))
        task = broadcast(task)
        if task["kind"] == "leave":
            return
        if task["kind"] == "run":
            began = time.time()
            _run(Plan.model_validate_json(task["plan"]), task["trial"], slot, broker, warm)
            warm.trial_ended()
            if rank == 0:
                times = {"slot": slot, "began": began, "ended": time.time()}
                append_event(root / "slots.jsonl", "ran", trial=task["trial"], **times)


def _run(plan: Plan, trial: str, slot: int, broker: Any, warm: Any) -> None:
    """One trial, its outcome on disk before the broker hears of it."""
    import ray
    import torch
    import torch.distributed as dist

    from orchestrator.train.trial import run_trial

    folder, rank = RunFolder(Path(plan.run_dir)), dist.get_rank()
    torch.set_num_threads(plan.cpus_per_worker)
    outcome: dict[str, Any] | None = None
    with contextlib.suppress(DamagedFileError):  # the trial runs again, from its last checkpoint
        outcome = read_outcome(folder)
    if outcome is None:

        def judge(record: dict[str, Any], last: bool) -> tuple[bool, bool]:
            figures = {k: v for k, v in record.items() if isinstance(v, float) and k != "eval_s"}
            answer = broker.report.remote(trial, record["step"], figures, last)
            decision: tuple[bool, bool] = ray.get(answer)
            return decision

        def ask() -> float | None:
            at_s = node_taken_away_at_s()
            if at_s is not None and rank == 0:
                ray.get(broker.drained.remote(slot))
            return at_s

        try:
            outcome = asdict(run_trial(plan, folder, warm, judge, ask))
        except Exception as error:
            ray.get(broker.crashed.remote(trial, failure_text(), failure_signature(error, folder)))
            raise
        if rank == 0 and outcome["status"] not in NO_END:
            write_json(folder.outcome, outcome)
    if rank == 0:
        ended = (slot, trial, outcome["status"], outcome["step"], outcome["message"])
        ray.get(broker.ended.remote(*ended))
