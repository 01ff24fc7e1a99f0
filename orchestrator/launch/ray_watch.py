"""PreemptionMonitor that the Ray of a run is lost, before Ray's library ends this process without a word to the user.

Without its GCS, Ray's C++ code exits the driver after a time-out; without its raylet, at once. The driver
has to write the run's outcome before that. Process handles are those of Ray 2.60.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from orchestrator.launch.session import attached_address

LOOK_EVERY_S = 2.0
CONNECT_TIMEOUT_S = 2.0
MARGIN_S = 10.0
"""How long before Ray's own time-out a cluster's head is given up."""
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""The variable with Ray's own time-out, in seconds."""
PROCESSES = {"gcs_server": "Ray's head process (GCS)", "raylet": "Ray's node process (raylet)"}


class RayWatch:
    """Looks whether the Ray that this process uses is still there; cheap enough for every turn of a loop."""

    def __init__(self) -> None:
        import ray

        self._attached = attached_address() is not None
        self._node: Any = ray._private.worker._global_node
        self._address = ray.get_runtime_context().gcs_address
        reconnect_s = float(os.environ.get(RECONNECT, "60"))
        self._patience_s = max(reconnect_s - MARGIN_S, reconnect_s / 2)
        self._looked_at = self._answered_at = time.monotonic()

    def lost(self) -> str | None:
        """Return what is lost, as a sentence; None while Ray is there."""
        return self._head_silent() if self._attached else self._process_ended()

    def workers_live(self) -> bool:
        """Return whether the workers can still commit a checkpoint: they can without a GCS."""
        return not self._attached and self._ended("gcs_server") and not self._ended("raylet")

    def _process_ended(self) -> str | None:
        for kind, name in PROCESSES.items():
            if self._ended(kind):
                return f"{name} on this machine ended: killed, or out of memory."
        return None

    def _ended(self, kind: str) -> bool:
        started = getattr(self._node, "all_processes", {}).get(kind, [])
        return any(one.process.poll() is not None for one in started)

    def _head_silent(self) -> str | None:
        """Try to reach the head every LOOK_EVERY_S; one with its state in Redis may come back in time."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return None
        self._looked_at = now
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError:
            silent_s = time.monotonic() - self._answered_at
            if silent_s < self._patience_s:
                return None
            return f"the cluster's head at {self._address} has not answered for {silent_s:.0f} s."
        self._answered_at = time.monotonic()
        return None
