"""Runs in a process of its own: uses a model once and says how much memory that took.

Started by `surgeon.measure.memory`. The request is one JSON object on standard input, the answer one in
the file that the request names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError


def _peaks(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from surgeon.measure.compare import open_model, stored_dtype
    from surgeon.measure.conditions import Conditions
    from surgeon.measure.environment import Environment
    from surgeon.measure.models import attention_of
    from surgeon.measure.runner import Runner
    from surgeon.measure.workload import Workload
    from surgeon.system import peak_memory

    conditions = Conditions(**request["conditions"])
    workload = Workload.from_document(request["workload"])
    folder = Path(request["folder"])
    cuda = conditions.place != "cpu"
    found: dict[str, Any] = {"libraries": peak_memory() or 0}
    with conditions.in_force():
        dtype = conditions.precision_of(stored_dtype(folder))
        model: Any = open_model(folder, dtype, conditions)
        found["load"] = peak_memory() or 0
        runner = Runner(model, workload, conditions.clock()[1], seed=conditions.seed)
        runner.prefill()
        found["prefill"] = peak_memory() or 0
        found["decode"] = None
        if runner.decoder:
            runner.decode()
            found["decode"] = peak_memory() or 0
        environment = Environment.here(conditions, dtype=dtype, attention=attention_of(model))
    found["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
    found["device"] = torch.cuda.max_memory_allocated(conditions.place) if cuda else None
    return {"peak": found, "environment": environment.document()}


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    try:
        answer = _peaks(request)
    except SurgeonError as error:
        kind = next(
            c.__name__
            for c in type(error).__mro__
            if c.__name__ in ("UsageError", "InputError", "EnvironmentFault")
        )
        answer = {"error": {"kind": kind, "code": error.code, "message": error.message, "help": error.help,
                            "where": str(error.where) if error.where else None}}  # fmt: skip
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
