"""What a user should know before a job starts, though nothing keeps it from starting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.data.prepare import Prepared, Split
from orchestrator.model.config import layer_drops, own_config
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.plan.memory import ModelFacts
from orchestrator.spec import JobSpec


def data_warnings(spec: JobSpec, prepared: dict[Split, Prepared]) -> list[str]:
    """Rows that are skipped or cut, and an order that is not all of the data's."""
    out = []
    for split, one in prepared.items():
        m = one.manifest
        if m.bad_rows:
            out.append(f"{split}: {m.bad_rows} of {m.input_rows} rows were skipped as unusable")
        if m.truncated_rows:
            out.append(
                f"{split}: {m.truncated_rows} of {m.input_rows} rows were cut to {m.max_length_tokens} tokens"
            )
    if spec.data.order.shuffle == "windows":
        out.append(
            f"rows are shuffled within windows of {spec.data.order.window_rows:,} rows, not over all of them"
        )
    return out


def config_warnings(spec: JobSpec) -> Iterator[str]:
    """What of the model's config is not taken over."""
    for name, value in layer_drops(own_config(spec)).items():
        yield (
            f"{name} = {value:g} of the model's config is taken as 0: each worker would leave out other layers"
        )


def start_warnings(cluster: Cluster, model: ModelFacts, shares: dict[str, Any]) -> Iterator[str]:
    """At stage 3 every worker holds the whole model in host memory until DeepSpeed has cut it up."""
    if shares["stage"] < 3:
        return
    per_node = -(-shares["num_workers"] // len(cluster.nodes))
    need, have = per_node * 4 * model.parameters, min(n.memory_bytes for n in cluster.nodes)
    if need > have:
        yield (
            f"while they start, {per_node} workers of a node hold the whole model each, {need / GIB:.0f} GiB "
            f"of host memory in all; the node has {have / GIB:.0f} GiB. Use fewer workers per node."
        )
