"""One trial in the workers of one process group. Re-entrant: nothing outlives the call."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from orchestrator.data.stream import StepRows
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.plan.data import DataStats
from orchestrator.plan.plan import Plan, at_workers
from orchestrator.run_folder import RunFolder
from orchestrator.train import engine as zero
from orchestrator.train import messages
from orchestrator.train.averaging import average_share
from orchestrator.train.checkpoint import Committed
from orchestrator.train.evaluate import Evaluator
from orchestrator.train.group import broadcast, together
from orchestrator.train.history import ended_early, out_of_time, rate_factor, remember
from orchestrator.train.metrics_logger import MetricsLogger
from orchestrator.train.objective import Objective
from orchestrator.train.preemption import Ask, PreemptionMonitor
from orchestrator.train.reference import Reference, find_reference
from orchestrator.train.setup import (
    find_checkpoint,
    load_state,
    open_model,
    open_stream,
    open_writer,
    progress_in,
)
from orchestrator.train.state import (
    Judge,
    Progress,
    Pulse,
    Result,
    Status,
    is_better,
    memory_in_use_bytes,
    peak_memory_bytes,
    summed,
)
from orchestrator.train.worker_cache import WorkerCache


def run_trial(
    plan: Plan,
    folder: RunFolder,
    warm: WorkerCache | None = None,
    judge: Judge | None = None,
    ask: Ask | None = None,
) -> Result:
    """Train to the plan's last step, from the newest valid checkpoint. Collective.

    `warm`: what this worker keeps from trial to trial. `judge`: who decides after each evaluation.
    `ask` says when a node of this group will be taken away; a checkpoint is committed before.

    Returns the same Result on all ranks. Raises what the cluster did (a lost peer), so that Ray Train
    restarts the group; what the job itself did wrong comes back as a status: trying again is no use.
    """
    try:
        trial = Trial(plan, folder, warm, judge, ask)
    except OrchestratorError as error:
        return Result("failed", 0, None, None, str(error))
    try:
        return trial.train()
    finally:
        trial.close()


class Trial:
    """The verbs of training, in the order of the loop.

    Making one finds the checkpoint, opens the stream, and then, while the stream warms up in the
    background, builds the model and the engine and loads their state.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        warm: WorkerCache | None = None,
        judge: Judge | None = None,
        ask: Ask | None = None,
    ) -> None:
        self.folder = folder
        self.warm, self.judge = warm, judge
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.plan = plan = at_workers(plan, self.world_size)
        self.started_at = time.monotonic()
        self.notice = PreemptionMonitor(ask, self.rank)
        self.metrics_logger = MetricsLogger(folder, self.rank)
        found = find_checkpoint(folder, self.metrics_logger)
        self.evaluate: Evaluator | None = None
        self.progress = progress_in(found) if found else Progress()
        self.resumed_at_s = self.progress.elapsed_s
        best_step = (self.progress.best or {}).get("step")
        self.writer = open_writer(plan, folder, best_step, self._committed)
        self.stream = open_stream(plan, self.progress.step, self.metrics_logger)
        self.engine: Any = None
        try:
            self._set_up(found)
        except OrchestratorError:  # the same on all ranks
            self.close()
            raise

    def _set_up(self, found: Committed | None) -> None:
        """Model, engine and evaluation rows, in the state of the checkpoint that was found."""
        plan = self.plan
        model = open_model(plan, self.warm, self.metrics_logger)
        self.metrics_logger.event("engine")
        self.objective = together(lambda: Objective(plan, model))
        self.engine = zero.open_engine(plan, model)
        self.averager = zero.after_each_step(self.engine, plan)
        self.reference = self._refer(plan.train_data, "train")
        if plan.eval_data:
            kept = self.warm.eval_rows if self.warm else None
            self.evaluate = Evaluator(plan, kept, self._refer(plan.eval_data, "eval"))
        if found is not None:
            load_state(self.engine, plan, found, self.metrics_logger)
        self.metrics_logger.event("ready")

    def _refer(self, data: DataStats, split: str) -> Reference | None:
        """What the model says of a split before it is trained, where the task compares with it."""
        if not self.plan.spec.task.has_reference:
            return None
        self.metrics_logger.event("reference", split=split)
        kept = self.folder.root / "reference" / f"{split}.npz"
        return find_reference(self.plan, data, self.engine, self.engine.device, kept)

    def train(self) -> Result:
        """The loop. Every decision is taken from figures that all ranks share."""
        if reason := ended_early(self.plan, self.progress):
            return self._result("finished", reason)
        wanted = time.perf_counter()
        for batch in self.stream:
            pulse, message = self._step(batch, wanted)
            if message:
                return self._result("diverged", message)
            if (ended := self._settle(pulse)) is not None:
                return self._result(*ended)
            wanted = time.perf_counter()
        return self._result("finished")

    def _step(self, batch: StepRows, wanted: float) -> tuple[Pulse, str]:
        """One step of the optimizer, written down: (what all ranks know, how it diverged where it did).

        `wanted`: when the rows were asked for, by `time.perf_counter`.
        """
        got = time.perf_counter()
        plan, progress = self.plan, self.progress
        batch = self.reference.joined(batch) if self.reference else batch
        lr = zero.set_learning_rate(self.engine, plan, progress.step, rate_factor(plan, progress))
        skipped_before = self.engine.skipped_steps
        if self.averager:
            self.averager.share = average_share(plan, progress.step)
        losses = zero.train_step(self.engine, plan, batch, self.objective)
        pulse = self._pulse(losses, batch.tokens)
        norm = zero.gradient_norm(self.engine)
        progress.elapsed_s = pulse.elapsed_s
        loss = pulse.loss_sum / max(batch.denominator, 1)
        task_loss = pulse.task_loss_sum / max(batch.denominator, 1)
        if self._diverged(loss, norm, self.engine.skipped_steps > skipped_before):
            return pulse, messages.divergence(progress.step + 1, loss, norm, lr)
        progress.step += 1
        progress.first_loss = task_loss if progress.step == 1 else progress.first_loss
        progress.loss_sum += pulse.task_loss_sum
        progress.targets += batch.denominator
        self.metrics_logger.step(
            step=progress.step,
            loss=loss,
            **({"task_loss": task_loss} if task_loss != loss else {}),
            lr=lr,
            grad_norm=norm,
            tokens=pulse.tokens,
            rows=plan.global_batch_size,
            step_s=round(time.perf_counter() - wanted, 5),
            wait_s=round(got - wanted, 5),
            memory_bytes=memory_in_use_bytes(self.engine.device),
        )
        return pulse, ""

    def _settle(self, pulse: Pulse) -> tuple[Status, str] | None:
        """What is due after a step, evaluation, checkpoint, leaving; (status, message) where training ends."""
        plan, progress = self.plan, self.progress
        stopping = pulse.stop and progress.step < plan.total_steps
        try:
            if pulse.storage_failed:
                self._check_storage()
            go_on, worth_saving = self._evaluate_if_due(stopping)
            reason = ended_early(plan, progress)
            leaving = self._react_to_notice(pulse) or pulse.handover
            self._save_if_due(worth_saving, stopping or bool(reason) or leaving)
        except CheckpointError as error:
            return "storage_failed", str(error)
        if stopping:
            return "stopped", messages.how_to_resume(progress.step, plan.total_steps)
        if reason or progress.step == plan.total_steps:
            return "finished", reason
        if not go_on:
            return "pruned", ""
        if pulse.handover:
            self._hand_over()
        if pulse.leave:
            self.notice.wait_to_be_taken()
        return None

    def _hand_over(self) -> None:
        """All is committed, and a group of another size is to go on from here: wait for the end.

        Where none comes, this one goes on, after the time that the asking side may have waited.
        """
        self.metrics_logger.event("handover", step=self.progress.step)
        if self.rank == 0:
            self.folder.handover_request.unlink(missing_ok=True)
        time.sleep(self.plan.spec.fault_tolerance.health_timeout_s)

    def close(self) -> None:
        """Give back everything the trial held."""
        self.stream.close()
        self.metrics_logger.flush()
        if self.engine is not None:
            zero.close_engine(self.engine)

    def _pulse(self, losses: tuple[float, float], tokens: int) -> Pulse:
        """What all ranks know after a step: the loss, and every reason to stop."""
        leads = self.rank == 0
        spent_s = self.resumed_at_s + time.monotonic() - self.started_at
        mine = Pulse(
            *losses,
            tokens=tokens,
            elapsed_s=spent_s if leads else 0.0,
            stop=leads and self.folder.stop_request.exists(),
            handover=leads and self.folder.handover_request.exists(),
            storage_failed=self.writer.failed(),
            ask=self.notice.due(),
            leave=self.notice.over(),
        )
        return summed(mine, self.engine.device)

    def _react_to_notice(self, pulse: Pulse) -> bool:
        """Whether a checkpoint must be committed now: a node has been announced to go, or goes."""
        heard = pulse.ask and self.notice.heard()
        if heard:
            self.metrics_logger.event(
                "notice", step=self.progress.step, deadline_s=self.notice.deadline_s
            )
        return heard or pulse.leave

    def _diverged(self, loss: float, norm: float | None, skipped: bool) -> bool:
        """A non-finite loss or gradient, or too many updates that DeepSpeed skipped without a word."""
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.metrics_logger.event(
                "warning", text=f"step {self.progress.step}: update skipped, gradient not finite"
            )
        broken = not math.isfinite(loss) or (
            norm is not None and not math.isfinite(norm) and not skipped
        )
        return (
            broken
            or self.progress.skipped_in_a_row >= self.plan.spec.fault_tolerance.max_skipped_steps
        )

    def _evaluate_if_due(self, stopping: bool) -> tuple[bool, bool]:
        """Evaluate at the plan's steps, and when time is up: (whether to go on, whether the state is
        worth a checkpoint)."""
        step, plan = self.progress.step, self.plan
        if self.evaluate is None or stopping:
            return True, False
        last = step == plan.total_steps or out_of_time(plan, self.progress)
        if step % plan.eval_every_steps and step not in plan.rungs and not last:
            return True, False
        started = time.perf_counter()
        with zero.averaged(self.engine, self.averager):
            metrics = self.evaluate(self.engine, self.engine.device)
        record = {"step": step, "eval_s": round(time.perf_counter() - started, 3), **metrics}
        remember(plan, self.progress, record)
        self.metrics_logger.evaluation(record)
        better = is_better(metrics[plan.metric], self.progress.best, plan)
        if better:
            self.progress.best = record
        go_on, worth_saving = True, better
        if self.judge is not None:
            go_on, worth_saving = broadcast(self.judge(record, last) if self.rank == 0 else None)
        if better and worth_saving:
            self.writer.best_step = step
        return go_on, worth_saving

    def _save_if_due(self, worth_saving: bool, stopping: bool) -> None:
        step, plan = self.progress.step, self.plan
        last = step == plan.total_steps
        ending = stopping or (last and self.judge is None)  # a judged trial's last step is a report
        due = step % plan.checkpoint_every_steps == 0 and not last
        if not (worth_saving or ending or due):
            return
        self.metrics_logger.flush()
        started = time.perf_counter()
        self._check_storage()
        self.writer.save(
            step,
            lambda staging: zero.save_shards(self.engine, staging, self.rank, self.averager),
            {"stage": plan.stage, "progress": asdict(self.progress)},  # a copy: training goes on
        )
        if plan.spec.checkpoint.mode == "sync" or ending:
            self._check_storage()
        stall_s = time.perf_counter() - started
        if ending:
            self.notice.commit_s = stall_s
        self.metrics_logger.event("save", step=step, stall_s=round(stall_s, 4))

    def _check_storage(self) -> None:
        """Wait for the checkpoint in flight; a failure on any rank is raised on all, soon: the commit
        needs every rank's files."""
        try:
            together(self.writer.wait_published)
        except CheckpointError:
            self.writer.abandon()
            raise
        together(self.writer.wait)

    def _result(self, status: Status, message: str = "") -> Result:
        if status != "storage_failed":
            try:
                self._check_storage()
            except CheckpointError as error:
                status, message = "storage_failed", str(error)
        progress = self.progress
        facts = {
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
            "elapsed_s": progress.elapsed_s,
            "out_of_time": out_of_time(self.plan, progress)
            and progress.step < self.plan.total_steps,
        }
        if status == "diverged":  # what the first broken step began from is no good either
            facts["good_until_step"] = progress.step - max(progress.skipped_in_a_row, 1)
        return Result(status, progress.step, progress.best, progress.last_eval, message, facts)

    def _committed(self, checkpoint: Committed) -> None:
        self.metrics_logger.event("commit", step=checkpoint.step, folder=checkpoint.folder.name)
