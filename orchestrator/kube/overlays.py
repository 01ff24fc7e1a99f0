"""Render the RayClusters in `cluster/overlays`: `python -m orchestrator.kube.overlays FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from orchestrator.kube.render import render
from orchestrator.kube.text import dump_documents
from orchestrator.product import VERSION
from orchestrator.spec import parse_spec
from orchestrator.spec.load import STAND_INS

IMAGE = f"orchestrator:{VERSION}"
"""The image that the `images` field of a kustomization replaces."""
GPU = {"cluster": "8xH100x2"}
OVERLAYS: dict[str, dict[str, Any]] = {
    "cpu-small": {
        "kubernetes": {
            "cluster": "3cpux1:memory_gib=6", "node_reserve": 0, "head": {"cpus": 1, "memory_gib": 3},
        },
        "resources": {"num_workers": 2},
    },
    "gpu": {"kubernetes": GPU},
    "spot": {"kubernetes": {**GPU, "worker": {"spot": True}, "drain_s": 25}},
    "kueue": {"kubernetes": {**GPU, "kueue": {"queue": "training"}}},
    "gcs-ft": {
        "kubernetes": {
            **GPU,
            "gcs_fault_tolerance": {
                "redis": "redis://redis:6379", "password": {"secret": "redis", "key": "password"},
            },
        }
    },
    "s3": {"kubernetes": {**GPU, "s3": {"secret": "s3-keys", "endpoint_url": "https://minio.storage:9000"}}},
    "pvc": {"kubernetes": {**GPU, "storage": {"claim": "orchestrator", "mount_path": "/mnt/orchestrator"}}},
}  # fmt: skip
"""Settings by overlay. Each overlay shows one setting of the `kubernetes` section."""


def overlay(name: str) -> str:
    """Return the YAML of one overlay's RayCluster."""
    fields = OVERLAYS[name]
    kubernetes = {"image": IMAGE, "service_account": "orchestrator", **fields["kubernetes"]}
    job = {**STAND_INS, **fields, "name": "orchestrator", "kubernetes": kubernetes}
    cluster = render(parse_spec(job, files="there"), cluster_only=True)
    return (
        f"# Written by `make docs` from orchestrator/kube/overlays.py.\n{dump_documents(cluster)}"
    )


def main() -> None:
    """Write the RayCluster of every overlay."""
    for name in OVERLAYS:
        file = Path(sys.argv[1]) / name / "raycluster.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(overlay(name), encoding="utf-8")


if __name__ == "__main__":
    main()
