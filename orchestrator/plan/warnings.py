"""Warnings about a job that do not keep it from starting."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

from orchestrator.data.prepare import Prepared, Split, shared_rows
from orchestrator.model.build import unfit
from orchestrator.model.config import layer_drops, own_config
from orchestrator.model.generation import checkpoint_settings, keeps
from orchestrator.model.parts import LAYER
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.plan.memory import ModelStats
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import FullTuning


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
        out += [f"{split}: {n} of {m.input_rows} rows: {text}" for text, n in m.notes.items()]
        out += [f"{split}: {warning}" for warning in m.warnings]
    if "eval" in prepared and (shared := shared_rows(prepared["train"], prepared["eval"])):
        out.append(
            f"eval: {shared:,} of {prepared['eval'].manifest.input_rows:,} rows are training rows too"
        )
    if spec.data.order.shuffle == "windows":
        out.append(
            f"rows are shuffled within windows of {spec.data.order.window_rows:,} rows, not over all of them"
        )
    return out


def config_warnings(spec: JobSpec) -> Iterator[str]:
    """Yield warnings on parts of the model's config that are not taken over."""
    for name, value in layer_drops(own_config(spec)).items():
        yield (
            f"{name} = {value:g} of the model's config is taken as 0: each worker would leave out other layers"
        )


def packing_warnings(asked: JobSpec, settled: JobSpec, reasons: dict[str, str]) -> Iterator[str]:
    """Rows that hold one document though the job asks for several."""
    if getattr(asked.task, "packing", False) and not getattr(settled.task, "packing", False):
        yield f"task.packing is off: {reasons['packing']}. Each row is one document, padded."


def generation_warnings(spec: JobSpec) -> Iterator[str]:
    """Settings that shape what the model writes in evaluations, or were meant to."""
    if not hasattr(spec.task, "keep_generation_settings"):
        return
    if found := checkpoint_settings(spec):
        named = ", ".join(f"{name} = {value}" for name, value in found.items())
        if keeps(spec):
            yield f"the checkpoint's generation settings shape what evaluations write: {named}."
        else:
            yield (
                f"the checkpoint's generation settings are set aside: {named}. "
                "task.keep_generation_settings=true keeps them."
            )


def weight_warnings(spec: JobSpec, labels: tuple[str, ...]) -> Iterator[str]:
    """Weights of the checkpoint that go unused, but for another task's head; new ones that are frozen."""
    if spec.model.pretrained is None:
        return
    fit, body = unfit(spec, labels)
    if unused := [name for name in fit.unused if not _of_a_head(name, body)]:
        yield (
            f"{len(unused)} weight(s) of the checkpoint have no place in the model and go unused, as {unused[0]}: "
            "is it another version of the architecture?"
        )
    patterns = spec.tuning.freeze if isinstance(spec.tuning, FullTuning) else ()
    held = sorted(n for n in fit.new if any(fnmatch.fnmatch(n, pattern) for pattern in patterns))
    if held:
        yield (
            f"tuning.freeze holds {len(held)} parameter(s) that the checkpoint lacks, as {held[0]}: they stay at "
            "random values. Narrow the pattern."
        )


def _of_a_head(name: str, body: str) -> bool:
    """Tell whether an unused weight belongs to a part that lies beside or on top of the layers."""
    inside = name.removeprefix(f"{body}.") if body else name
    layered = LAYER.search(inside)
    return layered is None and "embed" not in inside


def start_warnings(cluster: Cluster, model: ModelStats, shares: dict[str, Any]) -> Iterator[str]:
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
