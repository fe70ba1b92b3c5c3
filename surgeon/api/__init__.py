"""The Python functions behind the commands; the command line is one of their callers."""

from __future__ import annotations

from surgeon.api.looking import Difference, Inspection, diff, inspect, inspect_experts, propose_experts
from surgeon.api.making import edit, export, prune, quantize
from surgeon.api.measuring import doctor, evaluate, measure, report
from surgeon.api.merging import merge
from surgeon.api.opening import default_output, open_model, open_source
from surgeon.api.planning import MergePlan, build_request, plan_merge, plan_spec
from surgeon.api.verifying import Verification, verify

__all__ = [
    "Difference",
    "Inspection",
    "MergePlan",
    "Verification",
    "build_request",
    "default_output",
    "diff",
    "doctor",
    "edit",
    "evaluate",
    "export",
    "inspect",
    "inspect_experts",
    "measure",
    "merge",
    "open_model",
    "open_source",
    "plan_merge",
    "plan_spec",
    "propose_experts",
    "prune",
    "quantize",
    "report",
    "verify",
]
