"""How many trials run at once, and what each one gets: it fits, and Ray Data keeps its CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import prepared

from orchestrator.errors import PlanError
from orchestrator.plan import Cluster, describe_cluster
from orchestrator.plan.cluster import GIB, Node
from orchestrator.plan.resources import DATA_CPUS, places
from orchestrator.plan.slots import Slots, slots_of
from orchestrator.remote.request import check_capacity, make_request
from orchestrator.spec import JobSpec, apply_overrides, load_spec, parse_spec
from orchestrator.sweep.plan import plan_sweep, plan_trial

SPACE = {"optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}}


@pytest.fixture(scope="module")
def job(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job with a sweep: `job(num_workers=2, slots=3)`."""
    folder = tmp_path_factory.mktemp("slots")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))

    def make(
        space: dict[str, Any] = SPACE, slots: Any = "auto", trials: int = 1000, **resources: Any
    ) -> JobSpec:
        sweep = {"space": space, "max_concurrent_trials": slots, "num_trials": trials}
        return tiny.job(
            models.bert, rows, folder, data={"eval": str(rows)}, resources=resources, sweep=sweep
        )  # fmt: skip

    return make


def nodes(*sizes: tuple[float, float], source: str = "described") -> Cluster:
    """Machines of (CPUs, GPUs)."""
    each = [
        Node(
            cpus=cpus, memory_bytes=64 * GIB, gpus=gpus, gpu_name="H100" if gpus else None,
            gpu_memory_bytes=80 * GIB if gpus else 0,
        )
        for cpus, gpus in sizes
    ]  # fmt: skip
    return Cluster(source=source, nodes=tuple(each))


def live(*sizes: tuple[float, float]) -> Cluster:
    return nodes(*sizes, source="Ray cluster")


def planned_slots(spec: JobSpec, cluster: Cluster) -> Slots:
    """The slots, after a whole plan was made with their share."""
    plan = plan_sweep(spec, cluster, prepared(rows=1000, longest=20, eval_rows=50))
    slots = slots_of(spec, cluster)
    assert plan.slots == slots.count
    assert plan.base.workers.count == slots.workers.count
    return slots


@pytest.mark.parametrize(
    ("gpus", "share", "slots"), [(1, 0.1, 10), (8, 0.3, 24), (2, 0.5, 4), (1, 0.25, 4)]
)
def test_slots_take_parts_of_gpus_as_many_as_ray_puts_on_them(
    job: Any, gpus: int, share: float, slots: int
) -> None:
    made = planned_slots(job(gpus_per_worker=share), nodes((64, gpus)))
    assert (made.count, made.workers.count, made.workers.gpus) == (slots, 1, share)


def test_several_workers_of_a_slot_share_gpus(job: Any) -> None:
    made = planned_slots(job(gpus_per_worker=0.5, num_workers=3), nodes((64, 3)))
    assert (made.count, made.share.gpus) == (2, 1.5)


@pytest.mark.parametrize(
    ("cluster", "resources", "count", "cpus"),
    [
        (live((4, 0)), {}, 3, 1),
        (live((4, 0), (4, 0)), {}, 7, 1),
        (live((3, 0), (3, 0), (3, 0)), {"cpus_per_worker": 2}, 3, 2),
        (live((1, 0), (3, 0), (3, 0), (3, 0)), {"cpus_per_worker": 2}, 3, 2),
        (nodes((4, 0)), {}, 4, 1),
    ],
)
def test_a_live_cluster_keeps_a_cpu_for_reads_whatever_its_nodes_are(
    job: Any, cluster: Cluster, resources: dict[str, Any], count: int, cpus: int
) -> None:
    made = planned_slots(job(**resources), cluster)
    assert (made.count, made.workers.cpus) == (count, cpus)


def test_slots_that_are_given_get_equal_shares_of_the_nodes_that_hold_them(job: Any) -> None:
    uneven = live((1, 0), (9, 0), (9, 0), (9, 0))
    made = planned_slots(job(slots=3, num_workers=1), uneven)
    assert (made.workers.count, made.workers.cpus) == (1, 9)
    assert planned_slots(job(slots=4, num_workers=1), uneven).workers.cpus == 4
    made = planned_slots(job(slots=6, num_workers=1), uneven)
    assert made.workers.cpus == 4


def test_a_slot_keeps_to_a_node_where_its_workers_fit_one(job: Any) -> None:
    assert planned_slots(job(num_workers=5), nodes((64, 8), (64, 8))).count == 2
    assert planned_slots(job(num_workers=16), nodes(*[(64, 8)] * 4)).count == 2
    one_node_each = planned_slots(job(num_workers=8, slots=2), nodes(*[(64, 8)] * 4))
    assert len(one_node_each.share.nodes) == 1
    spread = planned_slots(job(num_workers=2, slots=2), nodes(*[(8, 0)] * 4))
    assert (len(spread.share.nodes), spread.workers.cpus) == (2, 8)


def test_few_trials_get_all_there_is(job: Any) -> None:
    made = planned_slots(job(trials=2), nodes((64, 8), (64, 8)))
    assert (made.count, made.workers.count) == (2, 8)


@pytest.mark.parametrize(
    ("cluster", "fields", "why"),
    [
        (
            live((4, 0)),
            {"slots": 4},
            r"sweep\.max_concurrent_trials = 4.*at most 3.*sweep\.max_concurrent_trials=3",
        ),
        (live((4, 0)), {"cpus_per_worker": 4}, "none for Ray Data"),
        (live((1, 0)), {}, "none for Ray Data"),
        (nodes((4, 0)), {"num_workers": 5}, r"num_workers = 5.*at most 4"),
        (
            nodes((64, 2)),
            {"slots": 3},
            r"sweep\.max_concurrent_trials = 3, 1 × 1 GPU each.*at most 2",
        ),
    ],
)
def test_slots_that_do_not_fit_are_refused_before_anything_starts(
    job: Any, cluster: Cluster, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(PlanError, match=why):
        slots_of(job(**fields), cluster)


def test_a_slot_has_room_for_the_most_workers_that_are_searched(job: Any) -> None:
    spec = job({"resources.num_workers": [1, 2]}, num_workers=1)
    cluster = nodes((4, 0))
    made = planned_slots(spec, cluster)
    assert (made.count, made.workers.count, made.workers.cpus) == (2, 1, 1)
    plan = plan_sweep(spec, cluster, prepared(1000, 20, 50))
    two = plan_trial(plan, "t", {"resources.num_workers": 2}, prepared(1000, 20, 50))
    assert (two.num_workers, two.cpus_per_worker) == (2, 1)


def test_a_slot_has_room_for_the_fewest_workers_of_a_range(job: Any) -> None:
    assert planned_slots(job(num_workers={"min": 2, "max": 4}), nodes((4, 0))).count == 2


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from(["auto", 1, 2, 3]),
    st.sampled_from(["auto", 1, 2]),
    st.sampled_from(["auto", 0, 0.3, 0.5, 1]),
    st.integers(1, 12),
    st.booleans(),
)
def test_what_slots_reserve_fits_the_nodes(
    job: Any,
    sizes: list[tuple[float, float]],
    workers: Any,
    cpus: Any,
    gpus: Any,
    trials: int,
    is_live: bool,
) -> None:
    cluster = live(*sizes) if is_live else nodes(*sizes)
    spec = job(trials=trials, num_workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    try:
        made = slots_of(spec, cluster)
    except PlanError:
        return
    one = made.workers
    room = places(cluster.nodes, one.gpus, one.cpus)
    assert 1 <= made.count <= trials
    assert made.count * one.count <= room, "Ray finds a place for every worker"
    taken = made.count * one.count * one.cpus
    assert taken + (DATA_CPUS if is_live else 0) <= cluster.cpus


def test_a_submitted_sweep_runs_as_one_and_check_capacity_with_all_its_slots(job: Any) -> None:
    assert " sweep " in make_request(job(), Path("job.yaml"), [], "x.zip").entrypoint
    assert check_capacity(job(), live((4, 0))).startswith("3 slot(s) of 1 worker(s) of 1 CPU")
    with pytest.raises(PlanError, match=r"sweep\.max_concurrent_trials = 9"):
        check_capacity(job(slots=9), live((4, 0)))


def test_the_sweep_for_a_cluster_is_planned_there(
    models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, Qwen2Config

    shape = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, torch_dtype="bfloat16",
    )  # fmt: skip
    shape.save_pretrained(tmp_path / "7b")
    AutoTokenizer.from_pretrained(models.qwen2).save_pretrained(tmp_path / "7b")
    rows = tiny.write_jsonl(tmp_path / "chat.jsonl", tiny.chats(4))
    file = Path(__file__).parent.parent / "jobs" / "sweep_7b_lora.yaml"
    given = [f"model.pretrained={tmp_path / '7b'}", f"data.train={rows}", f"data.eval={rows}"]
    spec = load_spec(file, given)
    plan = plan_sweep(spec, describe_cluster("8xH100x8"), prepared(20000, 2048, 500))
    assert (plan.slots, plan.base.num_workers, plan.base.gpus_per_worker) == (8, 8, 1)
    assert plan.base.model.parameters > 7e9
    assert plan.milestones[0] == 30_000_000
    assert plan.rungs[0] == math.ceil(30_000_000 / (64 * 2048))


def test_a_trial_s_own_job_says_what_its_slot_decided(job: Any) -> None:
    from orchestrator.sweep.plan import as_planned

    plan = plan_sweep(job(), nodes((4, 0)), prepared(1000, 20, 50))
    trial = plan_trial(plan, "t00000", {"optimizer.lr": 1e-4}, prepared(1000, 20, 50))
    alone = parse_spec(
        apply_overrides(as_planned(trial).model_dump(mode="json", exclude_unset=True), [])
    )
    assert (alone.resources.num_workers, alone.resources.cpus_per_worker) == (1, 1)
    assert (alone.zero.stage, alone.batch.micro_batch_size) == (trial.stage, trial.micro_batch_size)
