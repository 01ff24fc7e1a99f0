"""The peer of throughput.py: a DeepSpeed loop as one writes it by hand, under torchrun.

It takes the plan of our run for its figures: the same rows in the same order, micro-batch,
DeepSpeed configuration, optimizer and schedule. Rows are collated before the clock starts and kept
in memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForCausalLM, get_linear_schedule_with_warmup

from orchestrator.data.stream import unpack_rows
from orchestrator.plan.plan import Plan
from orchestrator.train.data_loader import open_source


class Rows(Dataset[dict[str, torch.Tensor]]):
    """This rank's rows of all steps, in order, as tensors of one length."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def load_rows(plan: Plan, rank: int, world_size: int, steps: int) -> Rows:
    """The rows that our run hands to this rank, read from the same prepared shards."""
    import numpy as np

    source = open_source(plan, plan.train_data, plan.global_batch_size, for_training=True)
    ids = np.concatenate([source.order.rank_rows(s, rank, world_size) for s in range(steps)])
    rows = unpack_rows(source.reader.take(ids))
    return Rows(plan.spec.task.collate(rows, np.ones(len(rows)), pad_id=0))


def build_model(plan: Plan) -> Any:
    fields = dict(plan.spec.model.config or {})
    torch.manual_seed(plan.spec.seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32
    )


def build_engine(plan: Plan, steps: int) -> Any:
    deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled, as in our run
    deepspeed.init_distributed(dist_backend="gloo")
    model, spec = build_model(plan), plan.spec.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, weight_decay=spec.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=get_linear_schedule_with_warmup(optimizer, 0, steps),
        config=dict(plan.deepspeed),
    )
    return engine


def train(engine: Any, loader: DataLoader[Any]) -> Iterator[tuple[float, int, float]]:
    """(time of day, tokens, loss) after each step."""
    for batch in loader:
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        yield time.time(), batch["input_ids"].numel(), loss.item()


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    plan = Plan.model_validate_json(Path(given["plan"]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engine = build_engine(plan, given["steps"])
    rows = load_rows(plan, rank, world_size, given["steps"])
    loader = DataLoader(rows, batch_size=plan.micro_batch_size, shuffle=False)
    times, tokens, losses = zip(*train(engine, loader), strict=True)
    facts = {"times": times, "tokens": tokens, "losses": losses}
    Path(f"{given['out']}.{rank}").write_text(json.dumps(facts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # threads that live on at the end abort the process


if __name__ == "__main__":
    main()
