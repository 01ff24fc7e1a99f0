"""Drain a pod before it ends, so that training commits a checkpoint; errors never delay the pod's end.

KubeRay does not drain Ray nodes when pods end, so the preStop hooks run `python -m orchestrator.kube.drain`.

- A worker requests the drain of its own Ray node, as `ray drain-node` does.
- The pod with the driver (`--driver`) sends it SIGTERM, so that it commits a checkpoint and exits.
- The head (`--head`) does the same if the driver runs on it. Otherwise it waits for the other nodes to end:
  when a whole cluster is deleted, all pods end together, and the others need the head for their drain.

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
    """Request the drain of this pod's node, wait until Ray has removed it, and return the outcome.

    Args:
        address: GCS's host:port.
        deadline_s: Seconds until the pod ends.

    Raises:
        OSError: GCS cannot be reached. Ray's client raises errors of its own too.
    """
    end = time.time() + deadline_s  # importing Ray counts against the deadline
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    own_address = _own_address(address)
    client = GcsClient(address=address)
    node_id = _this_node(client, own_address)
    if node_id is None:
        return "this pod is not a node of the cluster"
    accepted, reason = client.drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the pod is terminating",
        int(end * 1000),
    )
    if not accepted:
        return f"Ray refused the drain: {reason}"
    while time.time() < end:
        if not _alive(client).get(node_id):
            return f"the node was removed after {deadline_s - (end - time.time()):.0f} s"
        time.sleep(POLL_S)
    return f"the node is still busy after {deadline_s:g} s"


def stop_drivers(timeout_s: float) -> int:
    """Send SIGTERM to the drivers in this pod, wait for them, and return their number."""
    import psutil

    drivers = [p for p in psutil.process_iter(["cmdline"]) if _is_driver(p.info["cmdline"] or [])]
    for process in drivers:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(drivers, timeout=timeout_s)
    return len(drivers)


def _is_driver(command: list[str]) -> bool:
    """Return True for `orchestrator train …` and `python -m orchestrator train …`, not for their shell."""
    return any(
        before.rpartition("/")[2] == "orchestrator" and verb in ("train", "sweep")
        for before, verb in pairwise(command)
    )


def wait_for_others(address: str, timeout_s: float) -> str:
    """Wait until this is the only node, and return the outcome. Raises the errors of `drain`."""
    end = time.time() + timeout_s
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    own_address = _own_address(address)
    client = GcsClient(address=address)
    while any(node.node_manager_address != own_address for node in _alive(client).values()):
        if time.time() > end:
            return f"other nodes are still alive after {timeout_s:g} s"
        time.sleep(POLL_S)
    return "no other node is alive"


def run_hook(given: argparse.Namespace) -> str:
    """Run the hook of this kind of pod, and return the outcome."""
    if given.driver or given.head:
        stopped = stop_drivers(given.deadline_s)
        if stopped or given.driver:
            return f"sent SIGTERM to {stopped} driver(s)"
    if not given.address:
        return "RAY_ADDRESS is not set"
    wait = wait_for_others if given.head else drain
    return wait(given.address, given.deadline_s)


def _alive(client: Any) -> dict[str, Any]:
    """Return GCS's records of the nodes that are alive, by node id (hex)."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    nodes = client.get_all_node_info(timeout=RPC_TIMEOUT_S)
    return {i.hex(): node for i, node in nodes.items() if node.state == GcsNodeInfo.ALIVE}


def _this_node(client: Any, own_address: str) -> str | None:
    """Return this pod's node id, found by the pod's name (Ray's instance id under KubeRay) or its address."""
    name, alive = os.environ.get("RAY_CLOUD_INSTANCE_ID"), _alive(client)
    named = [i for i, node in alive.items() if name and node.instance_id == name]
    here = [i for i, node in alive.items() if node.node_manager_address == own_address]
    return next(iter(named or here), None)


def _own_address(address: str) -> str:
    """Return this pod's address towards GCS.

    Without a head this fails in seconds; Ray's client would retry for longer than the pod has.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), RPC_TIMEOUT_S) as connection:
        own_address: str = connection.getsockname()[0]
        return own_address


def main() -> None:
    """Run the hook and write its outcome to the pod's log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--deadline-s", type=float, required=True, help="Seconds until the pod ends."
    )
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="GCS's host:port.")
    parser.add_argument("--driver", action="store_true", help="The pod runs a job's driver.")
    parser.add_argument("--head", action="store_true", help="The pod is the head.")
    given = parser.parse_args()
    try:
        outcome = run_hook(given)
    except Exception as error:  # noqa: BLE001, the pod ends in any case
        outcome = f"not drained: {error}"
    print(f"drain: {outcome}", file=sys.stderr)


if __name__ == "__main__":
    main()
