"""A trial as Ray Tune sees it: a process that holds no torch and waits for what a slot reports.

It imports Tune and nothing of ours: every one that starts takes its time from a trial that trains.
"""

from __future__ import annotations

import json
from typing import Any

import ray
from ray import tune


class TrialProxy(tune.Trainable):
    """Each `step` is the next report of a trial that runs in a slot."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trial: str = config["trial"]
        self.broker = ray.get_actor(config["broker"])
        self.heard = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same process takes the next trial."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        answer: Any = self.broker.next_report.remote(self.trial, self.heard)
        self.heard, said = ray.get(answer)
        # As text: Tune takes nested results apart.
        return {"said": json.dumps(said), "done": said["kind"] == "end"}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: the trial's checkpoints are its own."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""
