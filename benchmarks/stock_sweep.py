"""The peer of sweep.py: Ray Tune starting a TorchTrainer per trial, as Ray's documentation puts them together.

    python stock_sweep.py SETUP.json

SETUP: points (one mapping per trial), slots, steps, rungs, rows, threads, model, train, eval, factor,
folder. Rows are tokenized once per trial, in memory: cheaper than a stream of its own for each.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

LABELS = ("negative", "positive")


def train_func(config: dict[str, Any]) -> None:
    import deepspeed
    import deepspeed.ops
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled, as in our run
    torch.set_num_threads(config["threads"])
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=2)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"], fused=True
        ),
        config={
            "train_micro_batch_size_per_gpu": config["rows"],
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    train, held_out = read(config["train"]), read(config["eval"])
    order = np.random.default_rng(42).permutation(len(train))

    def batch(rows: list[tuple[str, int]]) -> dict[str, Any]:
        texts = [text for text, _ in rows]
        out = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return {**out, "labels": torch.tensor([label for _, label in rows])}

    began = time.time()
    for step in range(1, config["steps"] + 1):
        ids = order[(step - 1) * config["rows"] : step * config["rows"]]
        loss = engine(**batch([train[i] for i in ids])).loss
        engine.backward(loss)
        engine.step()
        if step in config["rungs"]:
            engine.eval()
            with torch.no_grad():
                right = sum(
                    int((engine(**b).logits.argmax(-1) == b["labels"]).sum())
                    for b in (batch(held_out[k : k + 16]) for k in range(0, len(held_out), 16))
                )
            engine.train()
            accuracy = right / len(held_out)
            ray.train.report(
                {"step": step, "accuracy": accuracy, "training_s": time.time() - began}
            )


def read(path: str) -> list[tuple[str, int]]:
    with open(path, encoding="utf-8") as handle:
        return [(row["text"], LABELS.index(row["label"])) for row in csv.DictReader(handle)]


def main() -> None:
    setup = json.loads(Path(sys.argv[1]).read_text())
    ray.init(address="local", num_cpus=2 + setup["slots"])

    def trial(point: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            train_func,
            train_loop_config={**setup, **point["point"]},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name=ray.tune.get_context().get_trial_id(),
                storage_path=setup["folder"],
                callbacks=[TuneReportCallback()],
            ),
        )
        trainer.fit()

    results = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),
        param_space={"point": tune.grid_search(setup["points"])},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            max_concurrent_trials=setup["slots"],
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=10**9,
                grace_period=setup["rungs"][0],
                reduction_factor=setup["factor"],
            ),
        ),
        run_config=tune.RunConfig(name="stock", storage_path=setup["folder"]),
    ).fit()
    trials = [
        {"step": r.metrics.get("step"), "training_s": r.metrics.get("training_s")} for r in results
    ]
    Path(setup["folder"], "result.json").write_text(
        json.dumps({"trials": trials, "errors": len(results.errors)})
    )


if __name__ == "__main__":
    main()
