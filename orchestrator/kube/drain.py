"""A worker pod's last act: tell Ray that its node goes, so that training commits a checkpoint in time.

KubeRay turns no pod's end into a drain, so the pod's preStop hook runs `python -m orchestrator.kube.drain`.
It is the same request as `ray drain-node` makes, for the node of this pod. It never fails the pod's end.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from typing import Any

POLL_S = 0.5
RPC_TIMEOUT_S = 5


def drain(address: str, deadline_s: float) -> str:
    """Ask for the drain and wait until Ray has let the node go; returns what happened.

    `address` is GCS's host:port. Raises OSError where it cannot be reached, and what Ray's client raises.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    own_address = _own_address(address)
    client = GcsClient(address=address)
    node_id = _this_node(client, own_address)
    if node_id is None:
        return "this pod is no node of the cluster (any more)"
    end = time.time() + deadline_s
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
    given = parser.parse_args()
    try:
        said = drain(given.address, given.deadline_s) if given.address else "RAY_ADDRESS is not set"
    except Exception as error:  # noqa: BLE001, whatever happened: the pod ends anyway
        said = f"not drained: {error}"
    print(f"drain: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
