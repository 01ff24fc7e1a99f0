"""The job file: frozen models, loader, rules, schema. Imports nothing heavy."""

from orchestrator.spec.job import JobSpec
from orchestrator.spec.load import apply_overrides, dump_spec, load_spec, parse_spec, read_yaml

__all__ = ["JobSpec", "apply_overrides", "dump_spec", "load_spec", "parse_spec", "read_yaml"]
