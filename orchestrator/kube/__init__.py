"""Kubernetes: render a job as manifests for KubeRay, and drain the pods they start."""
