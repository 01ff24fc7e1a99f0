"""The actor between Tune and the slots: nothing that was said is lost with those who heard it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from orchestrator.sweep.broker import Broker

RETRY_S = 10


def play(story: Coroutine[Any, Any, None]) -> None:
    """Run to the end, or fail: what waits for ever is what these tests are about."""
    asyncio.run(asyncio.wait_for(story, RETRY_S))


def a_broker(max_failures: int = 0) -> Broker:
    return Broker(max_failures)


async def begin(broker: Broker, slot: int, trial: str = "t0") -> dict[str, Any]:
    """A trial is queued and a slot takes it."""
    await broker.enqueue(trial, "{}", 1)
    return await broker.next_task(slot, 1)


def test_the_report_of_a_lost_trial_proxy_is_handed_out_again_until_it_is_answered() -> None:
    async def story() -> None:
        broker = a_broker()
        slot = asyncio.create_task(broker.report("t0", 4, {"loss": 1.0}, False))
        heard, said = await broker.next_report("t0", 0)
        assert (heard, said["step"]) == (1, 4)
        lost = asyncio.create_task(broker.next_report("t0", heard))  # its process dies here
        again, said = await broker.next_report("t0", 0)
        assert (again, said["step"]) == (1, 4), "nobody has answered it"
        await broker.decision("t0", 4, True, False)
        assert await slot == (True, False)
        slot = asyncio.create_task(broker.report("t0", 8, {"loss": 0.9}, True))
        heard, said = await broker.next_report("t0", 0)
        assert (heard, said["step"]) == (2, 8), "step 4 has its answer"
        await broker.decision("t0", 8, True, True)
        assert await slot == (True, True)
        await broker.ended(0, "t0", "finished", 8, "")
        for after in (0, heard):
            assert (await broker.next_report("t0", after))[1]["kind"] == "end"
        await lost

    play(story())


def test_a_trial_that_nobody_follows_any_more_waits_for_no_verdict() -> None:
    async def story() -> None:
        broker = a_broker()
        waiting = asyncio.create_task(broker.report("t0", 4, {}, False))
        await broker.next_report("t0", 0)
        await broker.give_up("t0")
        assert await waiting == (False, False)
        assert await broker.report("t0", 8, {}, False) == (False, False)

    play(story())


def test_what_a_lost_slot_held_goes_to_the_slot_that_is_free_first() -> None:
    async def story() -> None:
        broker = a_broker(max_failures=1)
        assert (await begin(broker, 0))["trial"] == "t0"
        idle = asyncio.create_task(broker.next_task(1, 1))
        await asyncio.sleep(0)
        await broker.lost(0)
        assert (await idle)["trial"] == "t0"
        await broker.enqueue("t1", "{}", 1)
        assert (await broker.next_task(0, 1))["trial"] == "t1"
        await broker.lost(1)
        _, said = await broker.next_report("t0", 0)
        assert (said["kind"], said["status"]) == ("end", "failed")
        assert "lost 2 times" in said["message"]

    play(story())


def test_a_drained_node_counts_against_no_trial() -> None:
    async def story() -> None:
        broker = a_broker(max_failures=0)
        assert (await begin(broker, 0))["trial"] == "t0"
        await broker.drained(0)
        assert (await broker.next_task(0, 1))["trial"] == "t0", (
            "the slot comes back with new workers"
        )
        await broker.lost(0)
        assert (await broker.next_report("t0", 0))[1]["status"] == "failed", "that one was no drain"

    play(story())


def test_a_sweep_that_is_stopping_does_not_begin_what_was_lost() -> None:
    async def story() -> None:
        broker = a_broker(max_failures=1)
        await begin(broker, 0)
        await broker.cancel()
        await broker.lost(0)
        assert (await broker.next_report("t0", 0))[1]["status"] == "stopped"

    play(story())


def test_a_slot_that_was_lost_at_work_has_not_failed_to_start() -> None:
    async def story() -> None:
        broker = a_broker(max_failures=1)
        assert not await broker.came(0)
        await begin(broker, 0)
        await broker.lost(0)
        assert await broker.came(0)
        assert not await broker.came(0), "since it was asked last"

    play(story())


def test_a_trial_that_dies_twice_in_the_same_place_is_not_tried_again() -> None:
    async def story() -> None:
        broker = a_broker(max_failures=9)
        await begin(broker, 0)
        for where in (None, None, "step 3: ValueError in a.py:7", "step 9: ValueError in a.py:7"):
            await broker.crashed("t0", "Traceback …", where)
            await broker.lost(0)
            assert (await broker.next_task(0, 1))["trial"] == "t0", "that may pass"
        await broker.crashed("t0", "Traceback … out of memory", "step 9: ValueError in a.py:7")
        await broker.lost(0)
        _, said = await broker.next_report("t0", 0)
        assert (said["status"], "out of memory" in said["message"]) == ("failed", True)

    play(story())


def test_a_slot_leaves_to_come_back_with_as_many_workers_as_are_wanted() -> None:
    async def story() -> None:
        broker = a_broker()
        await broker.enqueue("t0", "{}", 2)
        assert (await broker.next_task(0, 1))["kind"] == "leave"
        assert await broker.wanted() == 2
        assert (await broker.next_task(0, 2))["trial"] == "t0"
        await broker.ended(0, "t0", "finished", 4, "")
        await broker.close()
        assert await broker.wanted() is None

    play(story())


def test_the_controller_gives_a_lost_group_s_trial_back_before_it_asks_for_another_one(
    ray: Any,
) -> None:
    from orchestrator.sweep.requeue import RequeueCallback

    actor: Any = ray.remote(Broker)
    broker = actor.options(name="hand-back", num_cpus=0, max_concurrency=10).remote(1)
    ray.get(broker.enqueue.remote("t0", "{}", 1))
    assert ray.get(broker.next_task.remote(0, 1))["trial"] == "t0"
    RequeueCallback("hand-back", 0).after_worker_group_abort(None)
    assert ray.get(broker.next_task.remote(1, 1))["trial"] == "t0", "another slot goes on with it"
    ray.kill(broker)
    RequeueCallback("hand-back", 1).after_worker_group_shutdown(
        None
    )  # the sweep has ended: nobody to tell
