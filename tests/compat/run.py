"""One cell from raw rows to plain `transformers`, through the product's own functions, in one process.

Ray and other workers are left out: rows are prepared by the function that Ray Data's tasks run, and the
trial is the one that a worker of a group of one runs, DeepSpeed's engine included.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import groups as deepspeed_groups
from PIL import Image

from compat.table import TUNINGS, Cell
from compat.tasks import CASES, COMPLETION_TOKENS, Exported
from orchestrator.api import predict
from orchestrator.data.manifest import read_manifest
from orchestrator.data.prepare import prepare
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import unpack_rows
from orchestrator.errors import OrchestratorError
from orchestrator.model.config import load_config
from orchestrator.model.weights import renamed_body
from orchestrator.plan import Plan, make_plan, this_machine
from orchestrator.plan.data import DataStats
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.spec import JobSpec
from orchestrator.tasks.batches import ragged
from orchestrator.train.export import build_base, export_run, load_exported
from orchestrator.train.trial import Trial

STEPS, TRAIN_ROWS, EVAL_ROWS = 3, 24, 5
CLOSE = {"rel": 2e-3, "abs": 2e-4}
"""How near figures in fp32 must be that are summed in another order."""


@dataclass(frozen=True)
class Outcome:
    """What the product did with a cell."""

    cell: Cell
    reason: str = ""
    """The product's sentence where it refuses the cell."""
    failure: str = ""
    """What broke where it neither works nor is refused."""


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone, and everything that would start Ray done here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        patch.setattr("orchestrator.data.prepare.run_all", _run_all)
        patch.setattr("orchestrator.tasks.generation.COMPLETION_TOKENS", COMPLETION_TOKENS)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # faster for tensors this small
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
            deepspeed_groups._WORLD_GROUP = None  # it would hand out the group that is gone
            torch.set_num_threads(threads)
            transformers.logging.set_verbosity(verbosity)


def _run_all(work: Sequence[Any], function: Any, **how: Any) -> list[dict[str, Any]]:
    """`data.commit.run_all` without Ray Data."""
    items = [{"work": one, "here": os.getcwd()} for one in work]
    return [json.loads(function(item)["out"]) for item in items]


def run(cell: Cell, model: Path, folder: Path) -> Outcome:
    """Take the cell all the way. Raises AssertionError, or whatever broke, where it does not work."""
    try:
        spec = spec_of(cell, model, folder)
        plan = make_plan(spec, this_machine(), prepare(spec))
    except OrchestratorError as error:
        return Outcome(cell, " ".join(str(error).split()).replace(str(model), "the model"))
    check(cell, plan, train(plan), folder)
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(cell)


def check(cell: Cell, plan: Plan, last: dict[str, Any], folder: Path) -> None:
    """Everything that must hold of a finished trial and its export. `last`: its last evaluation."""
    check_weights(plan)
    check_rows_apart(plan, last)
    if getattr(plan.spec.task, "packing", False):
        check_packing(plan)
    if "image_mean" in (cell.architecture.processor or {}):
        check_processor(plan)
    check_predictions(plan, cell, rows_of(cell, folder, EVAL_ROWS, seed=1))


def rows_of(cell: Cell, folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the cell's task; pictures and recordings are written below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make = CASES[cell.task].row
    return [make({**row, "folder": folder}) for row in tiny.labeled(count, seed)]


def spec_of(cell: Cell, model: Path, folder: Path, **changes: Any) -> JobSpec:
    """The cell as a job. ZeRO 2 for full tuning, 3 beside a frozen base, unless `changes` say otherwise."""
    tuning, case = TUNINGS[cell.tuning], CASES[cell.task]
    train = tiny.write_jsonl(folder / "train.jsonl", rows_of(cell, folder, TRAIN_ROWS, seed=0))
    held_out = tiny.write_jsonl(folder / "eval.jsonl", rows_of(cell, folder, EVAL_ROWS, seed=1))
    unpacked = {"packing": False} if case.packed and "num_virtual_tokens" in tuning else {}
    settings: dict[str, Any] = {
        "name": "cell",
        "task": {**case.fields, **cell.architecture.task, **unpacked},
        "tuning": tuning,
        "batch": {"global_batch_size": 8},
        "optimizer": {"lr": 2e-3},
        "stop": {"max_steps": STEPS},
        "evaluation": {"every_steps": "end"},
        "resources": {"num_workers": 1},
        "zero": {"stage": 2 if tuning["type"] == "full" else 3},
        **case.job,
        **changes,
    }
    settings["data"] = {"eval": str(held_out), **case.job.get("data", {})}
    return tiny.job(model, train, folder, **settings)


def train(plan: Plan) -> dict[str, Any]:
    """A trial to its last step and the export of its checkpoint; returns its last evaluation."""
    folder = RunFolder(Path(plan.run_dir))
    folder.root.mkdir(parents=True)
    write_json(folder.plan, plan.model_dump(mode="json"))
    trial = Trial(plan, folder)
    result = trial.train()
    trial.close()
    assert (result.status, result.step) == ("finished", STEPS), result.message
    last = result.last_eval
    assert last is not None
    assert all(math.isfinite(last[name]) for name in plan.spec.task.metric_names)
    export_run(plan, folder, folder.export, {"best": result.best})
    return last


def load_plainly(plan: Plan, folder: Path) -> tuple[Exported, dict[str, Any]]:
    """(the export as `transformers` and `peft` load it, what they say about its keys)."""
    auto = getattr(transformers, plan.spec.task.auto_class)
    tokenizer = None
    if plan.spec.task.reads_text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not (folder / "adapter_config.json").exists():
        model, keys = auto.from_pretrained(folder, output_loading_info=True)
        return Exported(folder, model.eval(), tokenizer), keys
    from peft import PeftModel

    named = plan.spec.task.config_overrides(plan.labels)
    base = auto.from_pretrained(plan.spec.model.pretrained, **named)
    return Exported(folder, PeftModel.from_pretrained(base, folder).eval(), tokenizer), {}


def check_weights(plan: Plan) -> None:
    """The export holds every weight under its name, tied ones once, and what was new has been trained."""
    folder = RunFolder(Path(plan.run_dir)).export
    exported, keys = load_plainly(plan, folder)
    wrong = {name: sorted(map(str, found)) for name, found in keys.items() if found}
    assert not wrong, f"loading the export: {wrong}"
    if not keys:
        return
    auto = getattr(transformers, plan.spec.task.auto_class)
    config = load_config(plan.spec, plan.labels)
    base, found = auto.from_pretrained(
        plan.spec.model.pretrained,
        config=config,
        ignore_mismatched_sizes=True,
        key_mapping=renamed_body(type(exported.model)),
        output_loading_info=True,
    )
    assert _is_tied(exported.model) == _is_tied(base), "weights are tied as in the base"
    before, after = build_base(plan).state_dict(), exported.model.state_dict()
    still = [k for k in found["missing_keys"] if torch.equal(before[k].float(), after[k].float())]
    assert not still, f"new weights were not trained: {still}"


def _is_tied(model: Any) -> bool:
    outputs = model.get_output_embeddings()
    return outputs is not None and outputs.weight is model.get_input_embeddings().weight


def check_processor(plan: Plan) -> None:
    """The export makes of an image what the checkpoint's own processor makes of it."""
    values = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    base, exported = (
        transformers.AutoImageProcessor.from_pretrained(folder)(
            images=Image.fromarray(values), return_tensors="np"
        )["pixel_values"]
        for folder in (plan.spec.model.pretrained, RunFolder(Path(plan.run_dir)).export)
    )
    assert np.allclose(base, exported, atol=1e-4), "pixels of the exported processor"


def prepared_rows(data: DataStats) -> list[dict[str, Any]]:
    """All rows of a prepared split, as the stream hands them out."""
    manifest = read_manifest(Path(data.folder))
    assert manifest is not None
    return unpack_rows(open_shards(data.folder, manifest).take(np.arange(data.rows)))


def measured(plan: Plan, rows: Sequence[Any], model: Any) -> dict[str, np.ndarray]:
    """What evaluation keeps of the rows in one batch."""
    task = plan.spec.task
    with torch.no_grad():
        batch = plan.collate(rows, np.ones(len(rows), np.float32))
        kept = {name: ragged([row[name] for row in rows]) for name in task.kept_features}
        return {**task.measure(model, batch), **kept}


def check_rows_apart(plan: Plan, last: dict[str, Any]) -> None:
    """A row's figures are the same alone and beside longer rows; so are the workers' metrics."""
    assert plan.eval_data is not None
    task = plan.spec.task
    _, model, tokenizer = load_exported(RunFolder(Path(plan.run_dir)).export)
    rows = _with_reference(plan, prepared_rows(plan.eval_data))
    alone = [measured(plan, [row], model) for row in rows]
    together = measured(plan, rows, model)
    for i, one in enumerate(alone):
        assert together["loss"][i] == pytest.approx(one["loss"][0], **CLOSE), f"row {i} in a batch"
    gathered = {name: np.concatenate([one[name] for one in alone]) for name in together}
    if task.needs_tokenizer:
        gathered = task.decode(gathered, tokenizer)
    figures = task.metrics(gathered, plan.labels)
    for name in task.metric_names:
        assert last[name] == pytest.approx(figures[name], **CLOSE), f"{name} after training"


def _with_reference(plan: Plan, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    path = Path(plan.run_dir) / "reference" / "eval.npz"
    if not path.exists():
        return rows
    with np.load(path) as stored:
        values = {name: stored[name] for name in stored.files if name != "prepared"}
    return [{**row, **{n: v[i] for n, v in values.items()}} for i, row in enumerate(rows)]


def check_packing(plan: Plan) -> None:
    """Each document has the same loss in a packed sequence as in a row of its own."""
    spec = plan.spec
    task = spec.task.model_copy(update={"packing": False})
    apart = spec.model_copy(update={"task": task, "name": "apart"})
    plan_apart = make_plan(apart, this_machine(), prepare(apart))
    assert plan.eval_data is not None
    assert plan_apart.eval_data is not None
    assert plan_apart.eval_data.rows == EVAL_ROWS
    assert plan_apart.eval_data.target_tokens == plan.eval_data.target_tokens
    _, model, _ = load_exported(RunFolder(Path(plan.run_dir)).export)
    documents = [row for packed in prepared_rows(plan.eval_data) for row in _documents(packed)]
    assert len(documents) == EVAL_ROWS
    together = measured(plan_apart, [alone for _, alone in documents], model)
    for i, (packed, alone) in enumerate(documents):
        expected = float(measured(plan_apart, [alone], model)["loss"][0])
        found = float(measured(plan, [packed], model)["loss"][0])
        assert found == pytest.approx(expected, **CLOSE), f"document {i} packed"
        assert together["loss"][i] == pytest.approx(expected, **CLOSE), f"document {i} padded"


def _documents(packed: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(the sequence with only this document learned, the document in a row of its own), for each."""
    edges = np.cumsum([0, *packed["doc_lengths"]])
    for start, stop in pairwise(edges):
        inside = (np.arange(edges[-1]) >= start) & (np.arange(edges[-1]) < stop)
        alone = {name: packed[name][start:stop] for name in ("input_ids", "is_target")}
        yield (
            {**packed, "is_target": np.where(inside, packed["is_target"], 0)},
            {**packed, **alone, "doc_lengths": np.array([stop - start])},
        )


def check_predictions(plan: Plan, cell: Cell, rows: Sequence[Any]) -> None:
    """`predict` and plain `transformers`, in padded batches, answer alike."""
    folder, case = RunFolder(Path(plan.run_dir)), CASES[cell.task]
    asked = [_prompted(row) for row in rows]
    ours = [case.ours(found) for found in predict(folder, [_input(plan, row) for row in asked])]
    exported, _ = load_plainly(plan, folder.export)
    plain = case.plain(exported, asked)
    assert len(plain) == len(ours)
    for i, (expected, found) in enumerate(zip(plain, ours, strict=True)):
        if isinstance(expected, dict):
            assert found == pytest.approx(expected, **CLOSE), f"prediction of row {i}"
        else:
            assert found == expected, f"prediction of row {i}"


def _prompted(row: dict[str, Any]) -> dict[str, Any]:
    """The row; of a conversation, its first turn as a prompt."""
    return {"prompt": row["messages"][0]["content"]} if "messages" in row else row


def _input(plan: Plan, row: dict[str, Any]) -> Any:
    """What `predict` is given for a row: the one text, or the row."""
    columns = plan.spec.task.predict_columns
    if len(columns) == 1 and isinstance(text := row.get(columns[0], row.get("prompt")), str):
        return text
    return row
