"""A pod's last act, so that training commits a checkpoint in time; it never fails the pod's end.

KubeRay turns no pod's end into a drain, so the pods' preStop hooks run `python -m orchestrator.kube.drain`.

- A worker tells Ray that its node goes: the same request as `ray drain-node` makes, for the node of this pod.
- The pod with the driver (`--driver`) asks it to commit and leave, as SIGTERM does anywhere.
- The head (`--head`) does the same where the driver is with it. Where it is not, the head stays until the
  other nodes have gone: they end together where a whole cluster does, and need it for their drain.

See docs/decisions/0030-the-drain-hook-is-a-module-not-ray-drain-node.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from itertools import pairwise
from typing import Any

POLL_S = 0.5
RPC_TIMEOUT_S = 5


def drain(address: str, deadline_s: float) -> str:
    """Ask for the drain and wait until Ray has let the node go; returns what happened.

    `address` is GCS's host:port. Raises OSError where it cannot be reached, and what Ray's client raises.
    """
    end = time.time() + deadline_s  # the pod's time runs while Ray is being imported
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    own_address = _own_address(address)
    client = GcsClient(address=address)
    node_id = _this_node(client, own_address)
    if node_id is None:
        return "this pod is no node of the cluster (any more)"
    accepted, why_not = client.drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the pod is being ended",
        int(end * 1000),
    )
    if not accepted:
        return f"Ray refuses: {why_not}"
    while time.time() < end:
        if not _alive(client).get(node_id):
            return f"gone after {deadline_s - (end - time.time()):.0f} s"
        time.sleep(POLL_S)
    return f"still busy after {deadline_s:g} s"


def stop_drivers(timeout_s: float) -> int:
    """Ask the drivers in this pod to commit and leave, and wait for them; returns how many there were."""
    import psutil

    found = [p for p in psutil.process_iter(["cmdline"]) if _is_driver(p.info["cmdline"] or [])]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(found, timeout=timeout_s)
    return len(found)


def _is_driver(words: list[str]) -> bool:
    """`orchestrator train …` and `python -m orchestrator train …`, but not the shell around it."""
    return any(
        before.rpartition("/")[2] == "orchestrator" and verb in ("train", "sweep")
        for before, verb in pairwise(words)
    )


def wait_for_others(address: str, timeout_s: float) -> str:
    """Until no node but this one is left; returns what happened. Raises as `drain` does."""
    end = time.time() + timeout_s
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    own_address = _own_address(address)
    client = GcsClient(address=address)
    while any(node.node_manager_address != own_address for node in _alive(client).values()):
        if time.time() > end:
            return f"other nodes are still here after {timeout_s:g} s"
        time.sleep(POLL_S)
    return "no other node is left"


def last_act(given: argparse.Namespace) -> str:
    """What a pod of this kind does before it ends; returns what happened."""
    if given.driver or given.head:
        stopped = stop_drivers(given.deadline_s)
        if stopped or given.driver:
            return f"{stopped} driver(s) asked to leave"
    if not given.address:
        return "RAY_ADDRESS is not set"
    act = wait_for_others if given.head else drain
    return act(given.address, given.deadline_s)


def _alive(client: Any) -> dict[str, Any]:
    """Node id (hex) → what GCS knows of it, for nodes that are up."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    nodes = client.get_all_node_info(timeout=RPC_TIMEOUT_S)
    return {i.hex(): node for i, node in nodes.items() if node.state == GcsNodeInfo.ALIVE}


def _this_node(client: Any, own_address: str) -> str | None:
    """By the pod's name, which KubeRay hands to Ray as the instance id, or else by the pod's address."""
    name, alive = os.environ.get("RAY_CLOUD_INSTANCE_ID"), _alive(client)
    named = [i for i, node in alive.items() if name and node.instance_id == name]
    here = [i for i, node in alive.items() if node.node_manager_address == own_address]
    return next(iter(named or here), None)


def _own_address(address: str) -> str:
    """This pod's address on the way to GCS. Where the head is gone this fails in seconds; Ray's client
    would try for longer than the pod has."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), RPC_TIMEOUT_S) as connection:
        found: str = connection.getsockname()[0]
        return found


def main() -> None:
    """Run the hook; what it has to say goes to the pod's log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--deadline-s", type=float, required=True, help="Seconds until the pod ends."
    )
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="GCS's host:port.")
    parser.add_argument("--driver", action="store_true", help="The pod holds a job's driver.")
    parser.add_argument("--head", action="store_true", help="The pod is the head.")
    given = parser.parse_args()
    try:
        said = last_act(given)
    except Exception as error:  # noqa: BLE001, whatever happened: the pod ends anyway
        said = f"not drained: {error}"
    print(f"drain: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
