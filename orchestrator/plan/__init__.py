"""The plan: one frozen value that holds every derived number with its reason."""

from orchestrator.plan.cluster import Cluster, describe_cluster, this_machine
from orchestrator.plan.plan import Plan, make_plan

__all__ = ["Cluster", "Plan", "describe_cluster", "make_plan", "this_machine"]
