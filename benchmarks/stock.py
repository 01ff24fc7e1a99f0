"""The peer of recovery.py: Ray Train and DeepSpeed as Ray's documentation puts them together.

    python stock.py FOLDER INTERVAL STEPS THREADS MODEL CSV

MiniLM on movie reviews, rows through Ray Data, tokenized in the collate function, a checkpoint
every INTERVAL steps, restarts by FailureConfig. All settings are Ray's defaults. What it adds is a
line per step and per phase in FOLDER, in the words of our own records.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

WORKERS = 2
ROWS_PER_WORKER = 16
LABELS = ("negative", "positive")


def write(folder: str, file: str, **record: Any) -> None:
    """Append a record, from rank 0 only."""
    if ray.train.get_context().get_world_rank() == 0:
        with open(Path(folder) / file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"time": time.time(), **record}) + "\n")


def train_func(config: dict[str, Any]) -> None:
    folder = config["folder"]
    write(folder, "events.jsonl", kind="imports")
    import deepspeed
    import deepspeed.ops
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled, as in our run
    torch.set_num_threads(config["threads"])
    write(folder, "events.jsonl", kind="model")
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=2)
    write(folder, "events.jsonl", kind="engine")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True),
        config=config["deepspeed"],
    )
    write(folder, "events.jsonl", kind="load")
    step = load(engine)
    write(folder, "events.jsonl", kind="ready")

    def collate(rows: dict[str, Any]) -> dict[str, Any]:
        texts = [str(text) for text in rows["text"]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        labels = torch.tensor([LABELS.index(str(label)) for label in rows["label"]])
        return {**batch, "labels": labels}

    rows = ray.train.get_dataset_shard("train")
    first = True
    while step < config["steps"]:
        for batch in rows.iter_torch_batches(batch_size=ROWS_PER_WORKER, collate_fn=collate):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            step += 1
            write(folder, "steps.jsonl", step=step, loss=loss.item())
            if first:
                write(folder, "events.jsonl", kind="first_step", step=step)
                first = False
            if step % config["interval"] == 0:
                save(engine, step, loss.item())
            if step == config["steps"]:
                break


def load(engine: Any) -> int:
    """Restore the checkpoint that Ray Train hands out, if any; returns its step."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, client_state = engine.load_checkpoint(folder)
    return int(client_state["step"])


def save(engine: Any, step: int, loss: float) -> None:
    """Every rank writes and reports its part; Ray Train merges them."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, client_state={"step": step})
        dist.barrier()
        ray.train.report({"loss": loss}, checkpoint=Checkpoint.from_directory(folder))


def main() -> None:
    folder, interval, steps, threads, model, csv = sys.argv[1:]
    ray.init(address="local", include_dashboard=False, num_cpus=4)
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": ROWS_PER_WORKER,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    trainer = TorchTrainer(
        train_func,
        train_loop_config={
            "folder": folder,
            "interval": int(interval),
            "steps": int(steps),
            "threads": int(threads),
            "model": model,
            "deepspeed": deepspeed_config,
        },
        datasets={"train": ray.data.read_csv(csv)},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            name="stock", storage_path=folder, failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
