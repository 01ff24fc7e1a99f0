"""What needs no worker group, without Ray: rows are prepared by the functions that Ray Data's tasks run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.prepare import Prepared, Split, prepare
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import unpack_rows
from orchestrator.model.build import build_model
from orchestrator.model.padding import set_tokens
from orchestrator.plan import Plan, make_plan, this_machine
from orchestrator.spec import JobSpec
from orchestrator.train.export import write_export


def prepared(spec: JobSpec) -> dict[Split, Prepared]:
    """The job's rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.data.prepare.run_all", _run_all)
        return prepare(spec)


def _run_all(work: Sequence[Any], function: Any, **_: Any) -> list[dict[str, Any]]:
    items = [{"work": one, "here": os.getcwd()} for one in work]
    return [json.loads(function(item)["out"]) for item in items]


def planned(spec: JobSpec) -> Plan:
    """The job's plan on this machine."""
    return make_plan(spec, this_machine(), prepared(spec))


def encoded(spec: JobSpec) -> list[dict[str, Any]]:
    """The job's training rows as workers read them."""
    train = prepared(spec)["train"]
    reader = open_shards(train.folder, train.manifest)
    return unpack_rows(reader.take(np.arange(train.manifest.rows)))


def model_of(plan: Plan) -> Any:
    """The job's model as a worker has it before the first step, but at rest and without dropout."""
    model: Any = build_model(plan.spec, plan.labels)
    set_tokens(model, plan.pad_token_id, plan.target_start)
    return model.eval()


def measured(plan: Plan, model: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an evaluation keeps of rows that share one batch."""
    with torch.no_grad():
        return plan.spec.task.measure(model, plan.collate(rows, np.ones(len(rows), np.float32)))


def exported(plan: Plan, model: Any, folder: Path) -> Path:
    """The folder that `export` writes."""
    write_export(plan, model, folder, 0, {})
    return folder
