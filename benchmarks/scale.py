"""Thousands of simulated trials: the real Tune controller, controller, decisions and log; curves instead of training.

Slots are coroutines in the broker's process: they take trials, and report points of a learning-curve model
at the rungs. Everything else is what a sweep runs. Shown: trials per second, CPU and memory of the driver, and
how both grow with the number of trials.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from common import MINILM, REVIEWS, Options, report, require_data, workspace

from orchestrator.data.prepare import prepare
from orchestrator.launch.session import ray_session, send_chatter_to
from orchestrator.metric import Metric
from orchestrator.plan import this_machine
from orchestrator.report.trial_log import SweepLog
from orchestrator.run_folder import SweepFolder
from orchestrator.spec import parse_spec
from orchestrator.sweep.broker import Broker
from orchestrator.sweep.plan import plan_sweep

STEP_S = 0.001
"""Simulated seconds per optimizer step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    require_data()
    with ray_session(2), workspace() as folder:
        send_chatter_to(None)
        found = [simulate(folder / str(n), n, given.slots) for n in given.trials]
    show(found, given)


def accuracy(values: dict[str, Any], step: int) -> float:
    """Rises to a ceiling that falls away on both sides of a learning rate of 2e-4, fast where it is high."""
    distance = abs(math.log10(values["optimizer.lr"]) + 3.7)
    ceiling = 0.5 + 0.33 * math.exp(-(distance**2)) - 0.05 * values["optimizer.weight_decay"]
    return ceiling - (ceiling - 0.5) * math.exp(-step / 12)


class SimulatedSlots(Broker):
    """The broker, with slots inside it that pretend to train."""

    async def start(self, slots: int, rungs: list[int]) -> None:
        """Let the slots take trials."""
        self.rungs = rungs
        self.slot_tasks = [asyncio.create_task(self._slot(k)) for k in range(slots)]

    async def _slot(self, slot: int) -> None:
        while True:
            task = await self.next_task(slot, 1)
            if task["kind"] == "leave":
                return
            if task["kind"] == "run":
                await self._trial(slot, task["trial"], json.loads(task["plan"]))

    async def _trial(self, slot: int, trial: str, values: dict[str, Any]) -> None:
        done = 0
        for step in self.rungs:
            await asyncio.sleep((step - done) * STEP_S)
            done, last = step, step == self.rungs[-1]
            figures = {"accuracy": accuracy(values, step)}
            go_on, _ = await self.report(trial, step, figures, last)
            if not go_on:
                await self.ended(slot, trial, "pruned", step, "")
                return
        await self.ended(slot, trial, "finished", done, "")


def simulate(folder: Path, trials: int, slots: int) -> dict[str, Any]:
    """One sweep; seconds, and driver's CPU and memory at every tenth of it."""
    import ray

    from orchestrator.sweep.controller import SweepController
    from orchestrator.sweep.tuning import make_tuner

    folder.mkdir()
    spec = parse_spec(job(folder, trials, slots))
    plan = plan_sweep(spec, this_machine(), prepare(spec))
    sweep = SweepFolder(Path(plan.run_dir))
    log = SweepLog(sweep.log, Metric("accuracy", maximize=True))
    name = f"simulated-{trials}"
    actor: Any = ray.remote(SimulatedSlots)
    broker = actor.options(name=name, num_cpus=0, max_concurrency=10_000).remote(0)
    ray.get(broker.start.remote(slots, list(plan.rungs)))

    class Simulated(SweepController):
        """Hands over the values alone: planning a trial is measured elsewhere, and costs 0.1 s."""

        def _prepare(self, trial: Any) -> None:
            self.per_step[trial.id] = 1.0
            self.broker.enqueue.remote(trial.id, json.dumps(trial.values), 1)

        def ended(self, said: dict[str, Any]) -> None:
            super().ended(said)
            marks.take()

    marks = Marks(trials)
    controller = Simulated(plan, log, broker, sweep, lambda *_: plan.base)
    started = time.monotonic()
    make_tuner(controller, name, folder / "ray", slots + 1).fit()
    seconds = time.monotonic() - started
    ray.get(broker.close.remote())
    ray.kill(broker)
    reports = sum(kind == "report" for kind, _, _ in log.order)
    return {
        "trials": trials, "slots": slots, "seconds": round(seconds, 1),
        "trials_per_s": round(trials / seconds, 2), "decisions_per_s": round(reports / seconds, 1),
        "best": log.best().best if log.best() else None, "tenths": marks.rows,
    }  # fmt: skip


class Marks:
    """The driver's CPU and memory each time another tenth of the trials has ended."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.process = psutil.Process()
        self.rows: list[dict[str, float]] = []
        self._ended = 0
        self._at, self._cpu = time.monotonic(), sum(self.process.cpu_times()[:2])

    def take(self) -> None:
        self._ended += 1
        if self._ended % max(self.trials // 10, 1):
            return
        now, cpu = time.monotonic(), sum(self.process.cpu_times()[:2])
        tenth = max(self.trials // 10, 1)
        self.rows.append(
            {
                "ended": self._ended,
                "rss_mib": round(self.process.memory_info().rss / 2**20),
                "cpu_ms_per_trial": round(1000 * (cpu - self._cpu) / tenth, 1),
                "ms_per_trial": round(1000 * (now - self._at) / tenth, 1),
            }
        )
        self._at, self._cpu = now, cpu


def job(folder: Path, trials: int, slots: int) -> dict[str, Any]:
    return {
        "name": "scale",
        "storage_path": str(folder / "runs"),
        "task": {"type": "text_classification", "labels": ["negative", "positive"]},
        "model": {"pretrained": str(MINILM)},
        "data": {
            "train": str(REVIEWS), "eval": str(REVIEWS.with_name("eval.csv")),
            "max_length_tokens": 128, "prepared_dir": str(folder.parent / "prepared"),
        },
        "stop": {"max_steps": 54},
        "resources": {"num_workers": 1, "cpus_per_worker": 1},
        "sweep": {
            "num_trials": trials, "max_concurrent_trials": 2,
            "space": {
                "optimizer.lr": {"type": "log_uniform", "low": 1e-6, "high": 1e-2},
                "optimizer.weight_decay": {"type": "uniform", "low": 0.0, "high": 0.3},
            },
            "scheduler": {"type": "asha", "grace_period": 6, "reduction_factor": 3},
        },
    }  # fmt: skip


def show(found: list[dict[str, Any]], given: Any) -> None:
    rows = [
        (
            "trials",
            "seconds",
            "trials/s",
            "decisions/s",
            "driver ms CPU a trial, first → last tenth",
            "driver RSS, MiB",
        )
    ]
    for one in found:
        first, last = one["tenths"][0], one["tenths"][-1]
        rows.append(
            (
                f"{one['trials']:,}", f"{one['seconds']:.0f}", f"{one['trials_per_s']:.1f}",
                f"{one['decisions_per_s']:.1f}",
                f"{first['cpu_ms_per_trial']:.0f} → {last['cpu_ms_per_trial']:.0f}",
                f"{first['rss_mib']:.0f} → {last['rss_mib']:.0f}",
            )
        )  # fmt: skip
    options = Options(quick=False, json=given.json, repetitions=1)
    report(f"Simulated trials on {given.slots} simulated slots", rows, {"runs": found}, options)


if __name__ == "__main__":
    sys.exit(main())
