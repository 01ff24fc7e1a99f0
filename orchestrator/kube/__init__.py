"""Kubernetes: manifests from a job, and the checks a cluster would make on them."""
