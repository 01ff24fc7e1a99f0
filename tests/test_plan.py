"""The plan: every number follows from job, data and cluster, and says why."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.prepare import Prepared, Split
from orchestrator.errors import OrchestratorError, PlanError
from orchestrator.model.build import build_model
from orchestrator.model.parts import parameter_groups
from orchestrator.plan import Cluster, Plan, describe_cluster, make_plan
from orchestrator.plan import plan as plan_module
from orchestrator.plan.cluster import GIB, GPU_MEMORY_GIB, Node, ray_cluster, this_machine
from orchestrator.plan.fit import MEMORY_SHARE
from orchestrator.plan.memory import ModelStats
from orchestrator.plan.model_stats import model_stats
from orchestrator.plan.plan import at_workers
from orchestrator.plan.show import show_plan
from orchestrator.spec import JobSpec, apply_overrides, parse_spec

LAPTOP = Cluster(source="described", nodes=(Node(cpus=4, memory_bytes=16 * GIB),))
LABELS = ("bad", "good")


def prepared(rows: int = 1000, longest: int = 32, eval_rows: int = 0) -> dict[Split, Prepared]:
    """What `prepare` hands to the planner."""

    def one(name: str, count: int) -> Prepared:
        manifest = Manifest(
            fingerprint=name,
            inputs=("rows.jsonl",),
            features={"input_ids": "ints", "label": "int"},
            labels=LABELS,
            max_length_tokens=longest,
            longest_tokens=longest,
            rows=count,
            tokens=count * longest,
            target_tokens=count,
            input_rows=count,
            truncated_rows=0,
            bad_rows=0,
            shards=(Shard(file="a", rows=count, size_bytes=1, sha256=""),),
        )
        return Prepared(Path(name), manifest)

    splits: dict[Split, Prepared] = {"train": one("train", rows)}
    return splits | ({"eval": one("eval", eval_rows)} if eval_rows else {})


@pytest.fixture(scope="module")
def spec(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("job")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))
    return tiny.job(models.bert, rows, folder)


def changed(spec: JobSpec, *overrides: str) -> JobSpec:
    data = spec.model_dump(mode="json", exclude_unset=True)
    return parse_spec(apply_overrides(data, list(overrides)))


def large(parameters: int) -> ModelStats:
    """Figures of a Llama-shaped model of about that size."""
    return ModelStats(
        model_type="llama",
        parameters=parameters,
        trainable=parameters,
        hidden_size=4096,
        layers=max(1, parameters // 200_000_000),
        heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        eager_attention=False,
    )


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the planner a model of any size without building one; adapters train 1 % of it."""

    def set_size(parameters: int) -> None:
        def facts(spec: JobSpec, labels: tuple[str, ...]) -> ModelStats:
            share = 0.01 if spec.tuning.type == "lora" else 1
            return large(parameters).model_copy(update={"trainable": int(parameters * share)})

        monkeypatch.setattr(plan_module, "model_stats", facts)

    return set_size


# --- arithmetic


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 16), st.one_of(st.just("auto"), st.integers(1, 300)))
def test_micro_batches_of_all_workers_cover_the_global_batch(
    spec: JobSpec, global_batch_size: int, workers: int, micro: int | str
) -> None:
    if micro != "auto" and int(micro) > global_batch_size:
        micro = global_batch_size
    job = changed(
        spec,
        f"batch.global_batch_size={global_batch_size}",
        f"batch.micro_batch_size={micro}",
        f"resources.num_workers={workers}",
    )
    plan = make_plan(job, describe_cluster("16cpux1"), prepared())
    covered = plan.micro_batch_size * plan.accumulation * plan.num_workers
    assert plan.rows_per_worker * workers >= global_batch_size
    assert plan.micro_batch_size * plan.accumulation >= plan.rows_per_worker
    assert plan.micro_batch_size * (plan.accumulation - 1) < plan.rows_per_worker, (
        "no pass is empty"
    )
    assert plan.deepspeed["train_batch_size"] == covered
    assert plan.deepspeed["gradient_accumulation_steps"] == plan.accumulation
    if micro != "auto":
        assert plan.micro_batch_size == min(int(micro), plan.rows_per_worker)


@pytest.mark.parametrize(
    ("stop", "steps"),
    [
        ([], 32),
        (["stop.max_epochs=3"], 96),
        (["stop.max_epochs=0.5"], 16),
        (["stop.max_epochs=0.01"], 1),
        (["stop.max_steps=50"], 50),
        (["stop.max_steps=50", "stop.max_epochs=1"], 32),
        (["stop.max_steps=20", "stop.max_epochs=1"], 20),
    ],
)
def test_training_ends_at_whichever_limit_comes_first(
    spec: JobSpec, stop: list[str], steps: int
) -> None:
    plan = make_plan(changed(spec, *stop), LAPTOP, prepared(rows=1000))
    assert plan.steps_per_epoch == 32, "the last batch is partly padding, no row is dropped"
    assert plan.total_steps == steps


@pytest.mark.parametrize(
    ("overrides", "eval_rows", "every"),
    [
        ([], 0, 0),
        ([], 10, 32),
        (["evaluation.every_steps=end"], 10, 96),
        (["evaluation.every_steps=7"], 10, 7),
        (["evaluation.every_steps=999"], 10, 96),
    ],
)
def test_evaluation_comes_as_often_as_asked(
    spec: JobSpec, overrides: list[str], eval_rows: int, every: int
) -> None:
    job = changed(spec, "stop.max_epochs=3", *overrides)
    plan = make_plan(job, LAPTOP, prepared(eval_rows=eval_rows))
    assert plan.eval_every_steps == every
    assert (plan.eval_data is None) == (eval_rows == 0)


def test_checkpoints_default_to_ten_but_not_to_one_every_few_steps(spec: JobSpec) -> None:
    def every(*overrides: str) -> int:
        return make_plan(changed(spec, *overrides), LAPTOP, prepared()).checkpoint_every_steps

    assert every("stop.max_steps=1000") == 100
    assert every("stop.max_steps=50") == 20
    assert every("stop.max_steps=5") == 5
    assert every("stop.max_steps=50", "checkpoint.every_steps=7") == 7


def test_the_default_batch_is_capped_by_the_data(spec: JobSpec) -> None:
    assert make_plan(spec, LAPTOP, prepared(rows=1000)).global_batch_size == 32
    assert make_plan(spec, LAPTOP, prepared(rows=5)).global_batch_size == 5


def test_every_number_that_was_chosen_has_a_reason(spec: JobSpec) -> None:
    auto = make_plan(spec, LAPTOP, prepared(eval_rows=9))
    chosen = {
        "num_workers", "gpus_per_worker", "cpus_per_worker", "bf16", "global_batch_size", "stage",
        "micro_batch_size", "memory_limit_bytes", "total_steps", "eval_every_steps", "group_by_length",
        "checkpoint_every_steps", "optimizer_class",
    }  # fmt: skip
    assert chosen <= set(auto.reasons) <= set(Plan.model_fields)
    assert all(auto.reasons.values())
    said = make_plan(
        changed(
            spec, "resources={num_workers: 1, gpus_per_worker: 0, cpus_per_worker: 1}",
            "precision=fp32", "batch={global_batch_size: 8, micro_batch_size: 8}", "zero.stage=1",
            "stop.max_steps=9", "checkpoint.every_steps=3", "evaluation.every_steps=4",
            "data.order.group_by_length=true", "optimizer.implementation=torch",
        ),
        LAPTOP,
        prepared(eval_rows=9),
    )  # fmt: skip
    assert set(said.reasons) == {"memory_limit_bytes"}, "what the job says needs no reason"


def test_rows_are_grouped_by_length_unless_that_gains_nothing_or_the_order_is_fixed(
    spec: JobSpec, models: tiny.Tiny
) -> None:
    def grouped(*overrides: str) -> bool:
        return make_plan(changed(spec, *overrides), LAPTOP, prepared()).group_by_length

    language = ("task={type: causal_lm}", f"model.pretrained={models.llama}")
    assert grouped()
    assert grouped("data.order.shuffle=windows")
    assert not grouped("data.order.shuffle=none")
    assert grouped("data.order.shuffle=none", "data.order.group_by_length=true")
    assert not grouped(*language)
    assert grouped(*language, "task.packing=false")


def test_a_plan_survives_json(spec: JobSpec) -> None:
    plan = make_plan(changed(spec, "schedule={type: cosine}"), LAPTOP, prepared(eval_rows=9))
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.model_dump_json() == plan.model_dump_json()
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


def test_the_same_job_gives_the_same_plan(spec: JobSpec) -> None:
    assert make_plan(spec, LAPTOP, prepared()) == make_plan(spec, LAPTOP, prepared())


# --- clusters


def test_clusters_are_described_in_words() -> None:
    gpus = describe_cluster("8xH100x4")
    assert (len(gpus.nodes), gpus.gpus, gpus.cpus) == (4, 32, 512)
    assert gpus.nodes[0].gpu_memory_bytes == 80 * GIB
    cpus = describe_cluster("16cpux2:cpus=12,memory_gib=30.5")
    assert (len(cpus.nodes), cpus.gpus, cpus.cpus) == (2, 0, 24)
    assert cpus.nodes[0].memory_bytes == int(30.5 * GIB)


@pytest.mark.parametrize("name", GPU_MEMORY_GIB)
def test_every_known_gpu_has_its_own_memory(name: str) -> None:
    node = describe_cluster(f"1x{name.lower()}x1").nodes[0]
    assert node.gpu_memory_bytes == GPU_MEMORY_GIB[name] * GIB


@pytest.mark.parametrize(
    "text",
    ["", "8xH100", "0xH100x4", "8xH100x0", "0cpux1", "8xTPUx1", "4cpux1:memory=3",
     "4cpux1:cpus=many", "4cpux1:cpus=0"],
)  # fmt: skip
def test_a_cluster_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        describe_cluster(text)


def test_a_cluster_without_a_living_node_is_said_to_be_one() -> None:
    with pytest.raises(PlanError, match="Ray cluster at x has no living node"):
        ray_cluster("Ray cluster at x", [])


def test_this_machine_is_a_cluster_of_one(spec: JobSpec) -> None:
    here = this_machine()
    assert len(here.nodes) == 1
    assert here.cpus >= 1
    assert here.nodes[0].memory_bytes > GIB


@pytest.mark.parametrize(
    ("cluster", "overrides", "expected"),
    [
        ("4cpux1", [], (2, 0, 2)),
        ("1cpux1", [], (1, 0, 1)),
        ("4cpux2", ["resources.num_workers=4"], (4, 0, 2)),
        ("8xH100x4", [], (32, 1, 16)),
        ("1xT4x3", ["resources.gpus_per_worker=0.7"], (3, 0.7, 16)),
        ("1xT4x1", ["resources.gpus_per_worker=0.5"], (2, 0.5, 8)),
        ("8xH100x1", ["resources.gpus_per_worker=0"], (2, 0, 64)),
        ("4cpux2", ["resources.num_workers=3"], (3, 0, 2)),
        ("8xH100x2:cpus=6", ["resources.cpus_per_worker=2"], (6, 1, 2)),
    ],
)
def test_workers_share_the_cluster(
    spec: JobSpec, cluster: str, overrides: list[str], expected: tuple[int, float, int]
) -> None:
    plan = make_plan(changed(spec, *overrides), describe_cluster(cluster), prepared())
    assert (plan.num_workers, plan.gpus_per_worker, plan.cpus_per_worker) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["resources.num_workers=9"],
        ["resources.num_workers=2", "resources.cpus_per_worker=3"],
        ["resources.gpus_per_worker=1"],
    ],
)
def test_workers_that_do_not_fit_are_refused_with_a_setting_that_does(
    spec: JobSpec, overrides: list[str]
) -> None:
    refused_with_a_fix(changed(spec, *overrides), LAPTOP)


def refused_with_a_fix(job: JobSpec, cluster: Cluster) -> str:
    """The setting that the refusal names, with which the job fits."""
    with pytest.raises(PlanError, match=r"Set (resources\.\w+=\d+)\.$") as caught:
        make_plan(job, cluster, prepared())
    (fix,) = re.findall(r"Set (resources\.\w+=\d+)\.$", str(caught.value))
    make_plan(changed(job, fix), cluster, prepared())
    return str(fix)


@pytest.mark.parametrize(
    ("cluster", "workers", "cpus", "fix"),
    [("4cpux4", 2, 5, 4), ("6cpux2", 3, 4, 3), ("1xT4x2:cpus=4", 2, 6, 4)],
)
def test_workers_that_fit_in_sum_but_on_no_node_are_refused(
    spec: JobSpec, cluster: str, workers: int, cpus: int, fix: int
) -> None:
    wanted = (f"resources.num_workers={workers}", f"resources.cpus_per_worker={cpus}")
    found = refused_with_a_fix(changed(spec, *wanted), describe_cluster(cluster))
    assert found == f"resources.cpus_per_worker={fix}"


def test_gpu_workers_share_the_nodes_that_have_gpus(spec: JobSpec) -> None:
    """CPU nodes beside them hold no worker; a plan that counts on them waits for ever."""
    gpus, cpus = describe_cluster("8xH100x1:cpus=64").nodes[0], describe_cluster("64cpux3").nodes
    plan = make_plan(spec, Cluster(source="described", nodes=(gpus, *cpus)), prepared())
    assert (plan.num_workers, plan.cpus_per_worker) == (8, 8)


def test_workers_that_may_all_lie_on_one_node_share_its_memory(spec: JobSpec) -> None:
    """Ray Train fills a node before it takes the next."""
    wanted = ("resources.num_workers=2", "resources.cpus_per_worker=1")
    plan = make_plan(changed(spec, *wanted), describe_cluster("8cpux2:memory_gib=32"), prepared())
    assert plan.memory_limit_bytes == 16 * GIB


def test_a_gpu_that_is_not_known_is_asked_for_and_one_of_another_size_can_be_told(
    spec: JobSpec,
) -> None:
    nodes = [
        {"CPU": 16, "GPU": 1, "memory": 2**36, f"accelerator_type:{n}": 1} for n in ("RTX-9", "L40")
    ]
    unknown, l40 = (ray_cluster("Ray cluster", [one]) for one in nodes)
    assert l40.nodes[0].gpu_memory_bytes == 48 * GIB, "an L40 is no L4"
    assert refused_with_a_fix(spec, unknown) == "resources.gpu_memory_gib=80"
    told = changed(spec, "resources.gpu_memory_gib=40")
    for cluster in (unknown, l40, describe_cluster("1xA100x1")):
        assert make_plan(told, cluster, prepared()).memory_limit_bytes == 40 * GIB
    assert describe_cluster("2xRTX-9x1:gpu_memory_gib=24").nodes[0].gpu_memory_bytes == 24 * GIB
    with pytest.raises(PlanError, match="Add :gpu_memory_gib="):
        describe_cluster("2xRTX-9x1")


# --- a number of workers that follows the cluster

RANGE = "resources.num_workers={min: 1, max: 6}"


@pytest.mark.parametrize(
    ("cluster", "overrides", "count", "limits"),
    [
        ("8cpux1", [RANGE], 6, (1, 6)),
        ("2cpux2", [RANGE], 4, (1, 6)),
        ("3cpux2", [RANGE, "resources.cpus_per_worker=2"], 2, (1, 6)),
        ("8xH100x1", ["resources.num_workers={min: 2, max: 32}"], 8, (2, 32)),
        ("8cpux1", ["resources.num_workers=3"], 3, (3, 3)),
    ],
)
def test_a_range_takes_what_there_is_room_for(
    spec: JobSpec, cluster: str, overrides: list[str], count: int, limits: tuple[int, int]
) -> None:
    plan = make_plan(changed(spec, *overrides), describe_cluster(cluster), prepared())
    assert (plan.num_workers, plan.worker_range) == (count, limits)


def test_a_range_whose_fewest_do_not_fit_is_refused(spec: JobSpec) -> None:
    job = changed(spec, "resources.num_workers={min: 5, max: 6}")
    with pytest.raises(PlanError, match=r"Set resources\.num_workers\.min=4"):
        make_plan(job, LAPTOP, prepared())
    make_plan(changed(job, "resources.num_workers.min=4"), LAPTOP, prepared())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 6), st.sampled_from(["auto", 2, 5]))
def test_at_another_size_it_is_the_plan_that_would_have_been_made_there(
    spec: JobSpec, global_batch_size: int, workers: int, micro: int | str
) -> None:
    micro = micro if micro == "auto" else min(int(micro), global_batch_size)
    batch = (
        f"batch.global_batch_size={global_batch_size}",
        f"batch.micro_batch_size={micro}",
        "zero.stage=2",
    )
    where = describe_cluster("8cpux1:memory_gib=64")
    elastic = make_plan(changed(spec, RANGE, *batch), where, prepared())
    fixed = make_plan(changed(spec, f"resources.num_workers={workers}", *batch), where, prepared())
    there = at_workers(elastic, workers)
    for field in (
        "num_workers",
        "rows_per_worker",
        "micro_batch_size",
        "accumulation",
        "deepspeed",
    ):
        assert getattr(there, field) == getattr(fixed, field), field
    kept = ("spec", "global_batch_size", "total_steps", "stage", "memory_limit_bytes", "train_data")
    assert all(getattr(there, field) == getattr(elastic, field) for field in kept)


def test_the_zero_stage_of_a_range_is_that_of_its_fewest_workers(spec: JobSpec, sized: Any) -> None:
    sized(13 * 10**9)
    where = describe_cluster("8xH100x4")
    job = changed(spec, "gradient_checkpointing=true")

    def stage(workers: str) -> int:
        plan = make_plan(changed(job, f"resources.num_workers={workers}"), where, prepared())
        assert all(
            sum(at_workers(plan, n).memory_bytes.values()) <= plan.memory_limit_bytes
            for n in plan.worker_range
        )
        return plan.stage

    assert stage("{min: 4, max: 32}") == stage("4") > stage("32")
    with pytest.raises(PlanError, match=r"with resources\.num_workers\.min = 1: one worker needs"):
        stage("{min: 1, max: 32}")


def test_the_plan_states_both_ends_of_a_range(spec: JobSpec) -> None:
    plan = make_plan(changed(spec, RANGE), describe_cluster("2cpux2"), prepared())
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(show_plan(plan))
    text = console.export_text()
    assert "4, 1 to 6" in text
    assert "total at 1 worker" in text
    assert "total at 6 workers" in text


# --- memory


def test_a_node_too_small_for_its_workers_whole_models_at_the_start_is_warned_of(
    spec: JobSpec, sized: Any
) -> None:
    sized(7 * 10**9)
    job = changed(spec, "zero.stage=3", "gradient_checkpointing=true")
    large, small = (describe_cluster(f"8xH100x1:memory_gib={n}") for n in (256, 128))
    assert not make_plan(job, large, prepared()).warnings
    (warning,) = make_plan(job, small, prepared()).warnings
    assert "209 GiB" in warning


def test_the_automatic_stage_is_the_lowest_that_fits(spec: JobSpec, sized: Any) -> None:
    stages = {}
    for billions in (1, 4, 5, 7, 13, 30):
        sized(billions * 10**9)
        job = changed(spec, "gradient_checkpointing=true")
        plan = make_plan(job, describe_cluster("8xH100x1"), prepared())
        room = int(plan.memory_limit_bytes * MEMORY_SHARE)
        assert sum(plan.memory_bytes.values()) <= room
        stages[billions] = plan.stage
        if plan.stage > 0:
            lower = changed(job, f"zero.stage={plan.stage - 1}")
            with pytest.raises(PlanError):
                make_plan(lower, describe_cluster("8xH100x1"), prepared())
    assert list(stages.values()) == sorted(stages.values())
    assert {0, 1, 3} <= set(stages.values())


@pytest.mark.parametrize(
    ("billions", "cluster", "overrides"),
    [
        (7, "8xH100x1", ["zero.stage=0"]),
        (7, "1xH100x1", []),
        (20, "1xH100x1", []),
        (7, "8xH100x1", ["zero.stage=1", "batch={global_batch_size: 4096, micro_batch_size: 512}"]),
        (30, "8xA100x1", ["zero.stage=2"]),
        (4, "16cpux1", ["resources.num_workers=1"]),
    ],
)
def test_a_job_that_is_too_big_is_told_changes_that_fit(
    spec: JobSpec, sized: Any, billions: int, cluster: str, overrides: list[str]
) -> None:
    sized(billions * 10**9)
    job, where = changed(spec, *overrides), describe_cluster(cluster)
    data = prepared(rows=10**6, longest=512)
    with pytest.raises(PlanError) as caught:
        make_plan(job, where, data)
    offers = str(caught.value).split("What helps: ")[1].rstrip(".").split(", or ")
    assert "smaller model" not in offers[0]
    for offer in offers:
        fixes = re.findall(r"[\w.]+=[\w.]+", offer)
        assert fixes
        plan = make_plan(changed(job, *fixes), where, data)
        assert sum(plan.memory_bytes.values()) <= plan.memory_limit_bytes


def test_a_stage_that_is_too_low_is_told_to_be_left_to_the_plan(spec: JobSpec, sized: Any) -> None:
    sized(7 * 10**9)
    with pytest.raises(PlanError, match=r"(helps: |or )zero\.stage=auto"):
        make_plan(changed(spec, "zero.stage=0"), describe_cluster("8xH100x1"), prepared())


def test_what_no_setting_helps_is_said_to_need_another_model_or_machine(
    spec: JobSpec, sized: Any
) -> None:
    sized(10**12)
    with pytest.raises(PlanError, match="smaller model"):
        make_plan(spec, describe_cluster("1xT4x1"), prepared())


def test_less_memory_means_smaller_micro_batches_and_the_same_global_batch(
    spec: JobSpec, sized: Any
) -> None:
    sized(10**9)
    job = changed(spec, "batch.global_batch_size=512")
    plans = [
        make_plan(job, describe_cluster(f"1x{gpu}x1"), prepared(longest=512))
        for gpu in ("H200", "L40S", "A10G")
    ]
    assert plans[0].micro_batch_size > plans[1].micro_batch_size > plans[2].micro_batch_size
    for plan in plans:
        assert plan.micro_batch_size * plan.accumulation >= 512
        assert sum(plan.memory_bytes.values()) <= plan.memory_limit_bytes


def test_checkpoints_that_exceed_the_disk_are_refused(spec: JobSpec, sized: Any) -> None:
    sized(10**13)
    node = Node(cpus=4, memory_bytes=2**50)
    with pytest.raises(PlanError, match=r"checkpoints need up to .* free"):
        make_plan(spec, Cluster(source="this machine", nodes=(node,)), prepared())
    described = Cluster(source="described", nodes=(node,))
    assert make_plan(spec, described, prepared()).checkpoint_bytes > 10**13


def test_a_run_that_fits_its_disk_fits_it_when_it_goes_on(
    spec: JobSpec, sized: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sized(10**6)
    here = Cluster(source="this machine", nodes=(Node(cpus=4, memory_bytes=2**40),))
    plan = make_plan(changed(spec, f"storage_path={tmp_path}"), here, prepared())
    most = plan.spec.checkpoint.num_to_keep + 2  # those kept, the best, one being written
    disk_bytes = most * plan.checkpoint_bytes

    def usage(_: Path) -> Any:
        held = sum(f.stat().st_size for f in tmp_path.rglob("*.pt"))
        return SimpleNamespace(free=disk_bytes - held)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    make_plan(plan.spec, here, prepared())
    for step in range(most - 1):
        (Path(plan.run_dir) / f"checkpoints/step-{step}").mkdir(parents=True)
        with open(Path(plan.run_dir) / f"checkpoints/step-{step}/a.pt", "wb") as file:
            file.truncate(plan.checkpoint_bytes)
    make_plan(plan.spec, here, prepared())
    (tmp_path / "other.pt").write_bytes(b"x")
    with pytest.raises(PlanError, match="checkpoints need up to"):
        make_plan(plan.spec, here, prepared())


def test_checkpoints_at_better_evaluations_are_counted_beside_those_that_are_due(
    spec: JobSpec,
) -> None:
    job = changed(spec, "stop.max_steps=100", "checkpoint.every_steps=10", "data.eval_fraction=0.1")
    for every, said in (
        ("25", "10, and up to 2 at better evaluations, ×"),  # at 25 and 75; 50 and 100 are due
        ("20", "10 ×"),
        ("end", "10 ×"),
    ):
        plan = make_plan(
            changed(job, f"evaluation.every_steps={every}"), LAPTOP, prepared(eval_rows=9)
        )
        console = Console(file=io.StringIO(), width=200)
        console.print(show_plan(plan))
        assert said in console.file.getvalue(), every  # type: ignore[attr-defined]


# --- precision, optimizer, DeepSpeed


def test_precision_follows_the_gpus(spec: JobSpec) -> None:
    def bf16(cluster: str, *overrides: str) -> bool:
        return make_plan(changed(spec, *overrides), describe_cluster(cluster), prepared()).bf16

    assert bf16("1xH100x1")
    assert not bf16("1xV100x1")
    assert not bf16("4cpux1")
    assert bf16("4cpux1", "precision=bf16")
    assert not bf16("1xH100x1", "precision=fp32")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gets_what_the_plan_says(spec: JobSpec, stage: int) -> None:
    job = changed(spec, f"zero.stage={stage}", "zero.bucket_elements=1000", "gradient_clipping=0.5")
    plan = make_plan(job, LAPTOP, prepared())
    config = plan.deepspeed
    assert config["train_micro_batch_size_per_gpu"] == plan.micro_batch_size
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": False}
    assert "optimizer" not in config
    assert "scheduler" not in config
    zero = config["zero_optimization"]
    assert zero["stage"] == stage == plan.stage
    assert zero.get("reduce_bucket_size") == (1000 if stage else None)
    assert ("stage3_prefetch_bucket_size" in zero) == (stage == 3)


def test_offload_and_no_clipping_reach_deepspeed(spec: JobSpec) -> None:
    job = changed(
        spec, "zero.offload_optimizer=cpu", "zero.offload_param=cpu", "gradient_clipping=null"
    )
    plan = make_plan(job, describe_cluster("2xH100x1"), prepared())
    zero = plan.deepspeed["zero_optimization"]
    assert plan.stage == 3, "the lowest stage that can offload parameters"
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert plan.deepspeed["gradient_clipping"] == 0.0


def test_buckets_are_sized_to_the_model(spec: JobSpec, sized: Any) -> None:
    def bucket() -> int:
        plan = make_plan(changed(spec, "zero.stage=1"), describe_cluster("1xB200x1"), prepared())
        return int(plan.deepspeed["zero_optimization"]["reduce_bucket_size"])

    assert bucket() == 500_000
    sized(40_000_000)
    assert bucket() == 10_000_000
    sized(4_000_000_000)
    assert bucket() == 50_000_000
    sized(6_000_007)
    assert bucket() == 1_500_000, "DeepSpeed refuses an odd number"


# --- what is trained


def counted(spec: JobSpec) -> tuple[int, int]:
    """(all, trainable) parameters of the model as it is really loaded."""
    model: Any = build_model(spec, LABELS)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, on in sizes if on)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tuning.freeze=['*embeddings*']"],
        ["tuning.freeze=['bert.*']"],
        ["tuning.freeze=['*encoder.layer.[01].*', '*pooler*']"],
        ["tuning={type: lora}"],
        ["tuning={type: lora, r: 3, target_modules: all-linear}"],
        ["tuning={type: lora, target_modules: [query]}"],
    ],
)
def test_the_plan_counts_what_will_be_trained(spec: JobSpec, overrides: list[str]) -> None:
    job = changed(spec, *overrides)
    facts = model_stats(job, LABELS)
    assert (facts.parameters, facts.trainable) == counted(job)
    assert (facts.hidden_size, facts.layers, facts.heads) == (tiny.HIDDEN, tiny.LAYERS, tiny.HEADS)


def test_a_frozen_pattern_freezes_those_names_and_no_others(spec: JobSpec) -> None:
    job = changed(spec, "tuning.freeze=['*embeddings*', 'bert.encoder.layer.0.*']")
    model: Any = build_model(job, LABELS)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    wanted = {n for n, _ in model.named_parameters() if "embeddings" in n or "layer.0." in n}
    assert frozen == wanted
    assert wanted


def test_adapters_of_rank_r_train_r_numbers_per_row_and_column(spec: JobSpec) -> None:
    job = changed(spec, "tuning={type: lora, r: 3, target_modules: [query]}")
    head = (tiny.HIDDEN + 1) * len(LABELS)
    adapters = tiny.LAYERS * 3 * (tiny.HIDDEN + tiny.HIDDEN)
    assert model_stats(job, LABELS).trainable == adapters + head


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("tuning.freeze=['*embedings*']", "'\\*embedings\\*' matches no parameter"),
        ("tuning.freeze=['*']", "leaves nothing to train"),
        ("tuning={type: lora, target_modules: [no_such_layer]}", "target_modules"),
    ],
)
def test_a_tuning_that_hits_nothing_is_an_error(spec: JobSpec, override: str, why: str) -> None:
    with pytest.raises(OrchestratorError, match=why):
        make_plan(changed(spec, override), LAPTOP, prepared())


def test_norms_and_biases_are_left_out_of_weight_decay(spec: JobSpec) -> None:
    job = changed(spec, "tuning.freeze=['*embeddings*']", "optimizer.weight_decay=0.1")
    model: Any = build_model(job, LABELS)
    decayed, spared = parameter_groups(model, job, 1e-3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(spared["params"]) == len(trainable)


def test_a_new_head_is_the_same_for_the_same_seed(spec: JobSpec, models: tiny.Tiny) -> None:
    def head(seed: int) -> Any:
        model: Any = build_model(
            changed(spec, f"seed={seed}", f"model.pretrained={models.llama}"), LABELS
        )
        return model.score.weight

    assert head(1).equal(head(1))
    assert not head(1).equal(head(2))


def test_a_classifier_for_other_labels_keeps_its_body_and_gets_a_new_head(
    spec: JobSpec, models: tiny.Tiny
) -> None:
    three = (*LABELS, "so-so")
    fitting: Any = build_model(spec, LABELS)
    model: Any = build_model(spec, three)
    assert model.classifier.weight.shape == (3, tiny.HIDDEN)
    assert model.classifier.weight.std() > 0
    assert model.classifier.weight.equal(build_model(spec, three).classifier.weight)
    body = dict(fitting.bert.named_parameters())
    assert all(p.equal(body[name]) for name, p in model.bert.named_parameters())
    assert model_stats(spec, three).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_model_without_positions_is_trained_on_rows_of_one_document(
    spec: JobSpec, models: tiny.Tiny, packing: str
) -> None:
    config = "{model_type: bloom, hidden_size: 16, n_head: 2, n_layer: 1, vocab_size: 400}"
    model = f"model={{config: {config}, tokenizer: {models.llama}}}"
    job = changed(spec, model, "task={type: causal_lm}", f"task.packing={packing}")
    plan = make_plan(job, LAPTOP, prepared())
    assert plan.spec.task.packing is False  # type: ignore[attr-defined]
    assert plan.group_by_length
    said = [text for text in plan.warnings if text.startswith("task.packing is off")]
    assert len(said) == (packing == "true")
    lora = changed(job, f"model={{pretrained: {models.gpt2}}}", "tuning={type: lora}")
    assert make_plan(lora, LAPTOP, prepared()).spec.task.packing is (packing == "true")  # type: ignore[attr-defined]
    make_plan(changed(spec, model), LAPTOP, prepared())


def test_dropout_is_set_everywhere(spec: JobSpec, models: tiny.Tiny) -> None:
    from torch.nn import Dropout

    for folder in (models.bert, models.gpt2):
        job = changed(spec, "model.dropout=0.3", f"model.pretrained={folder}")
        rates = {m.p for m in build_model(job, LABELS).modules() if isinstance(m, Dropout)}
        assert rates == {0.3}
