"""Gates of a recipe: which step measures the metric each one needs, settled before anything runs.

A plain metric is that of the only eval step that has it; else of the last step that measures it; ``bytes`` and
``parameters`` are the published model's. ``STEP.METRIC`` names one step's.

Codes: E226 not a gate, or a metric nothing measures; E227 a gate over part of the data; E229 no baseline.
"""

from __future__ import annotations

from surgeon.checkpoint.header import printable
from surgeon.errors import UsageError, close_matches
from surgeon.evaluate import gates
from surgeon.evaluate.gates import ALIASES, Gate
from surgeon.evaluate.request import JUDGED, MEASURED
from surgeon.recipe.reading import Reading, known_list
from surgeon.recipe.recipe import RecipeGate, Step
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show

SIZES = ("bytes", "parameters")
QUALITY = ("perplexity", "kl", "top1", "cosine", "nmse")
TIMED = (
    "seconds",
    "prefill_seconds",
    "prefill_tokens_per_second",
    "decode_seconds",
    "decode_tokens_per_second",
)


def metrics_of(step: Step) -> tuple[str, ...]:
    """Return the metrics a step will have, as far as its options say."""
    options = step.options
    if step.verb == "eval":
        found = []
        if options.get("questions"):
            found += [
                *MEASURED,
                *(
                    ()
                    if options.get("length")
                    else (*JUDGED, *(f"pass@{k}" for k in options.get("pass_at") or ()))
                ),
            ]
        found += ["perplexity"] if options.get("perplexity") else []
        found += ["kl", "top1_agreement"] if options.get("kl") else []
        return (*found, *(f"{task}_accuracy" for task in options.get("tasks") or ()))
    if step.verb == "measure":
        if options.get("mode") == "table":
            return ()
        if options.get("mode") == "memory":
            return ("memory",)
        return ("speedup",) if options.get("baseline") else TIMED
    if step.verb == "prune":
        return (*SIZES, *QUALITY, *(("speedup",) if options.get("target_speedup") else ()))
    if step.verb == "quantize":
        return (*SIZES, *QUALITY, "bits")
    if step.verb == "edit":
        return (*SIZES, "perplexity", "kl")
    return SIZES


def has(step: Step, metric: str) -> bool:
    """Say whether a step will have a metric; domains of questions and metrics of tasks show when they ran."""
    if metric in metrics_of(step):
        return True
    if step.verb != "eval":
        return False
    if metric.startswith("task:"):
        return any(metric.startswith(f"task:{task}:") for task in step.options.get("tasks") or ())
    own = [name for name in metrics_of(step) if name in (*MEASURED, *JUDGED) or name.startswith("pass@")]
    return any(metric.endswith(f"_{name}") and len(metric) > len(name) + 1 for name in own)


def read_gates(reading: Reading, steps: list[Step], published: str | None) -> list[RecipeGate]:
    """Return the gates; mistakes are recorded."""
    given = reading.at(("gates",))
    if given is None:
        return []
    if not isinstance(given, list):
        reading.refuse(
            "E226",
            f"{show(given)} where a list of gates is expected",
            ("gates",),
            "gates: ['accuracy >= baseline - 0.02']",
        )
        return []
    found = []
    for number, text in enumerate(given):
        path: KeyPath = ("gates", number)
        if not isinstance(text, str):
            reading.refuse("E226", f"{show(text)} is not a gate", path, "'accuracy >= baseline - 0.02'")
            continue
        try:
            gate = gates.parse(text)
        except UsageError as error:
            reading.refuse(error.code, error.message, path, error.help)
            continue
        placed = _placed(reading, gate, steps, published, path)
        if placed is not None:
            found.append(placed)
    return found


def _placed(
    reading: Reading, gate: Gate, steps: list[Step], published: str | None, path: KeyPath
) -> RecipeGate | None:
    where = reading.document.where(path)
    if "ref" in gate.names:
        reading.refuse(
            "E226",
            f'the gate "{printable(gate.text)[:80]}" uses ref',
            path,
            "gates of a recipe compare with baseline",
        )
        return None
    head, dot, rest = gate.metric.partition(".")
    if dot and any(step.id == head for step in steps):
        metric = ALIASES.get(rest, rest)
        owners = [step for step in steps if step.id == head and has(step, metric)]
        known = list(metrics_of(next(step for step in steps if step.id == head)))
    elif gate.metric in SIZES and published is not None:
        if "baseline" in gate.names and not any(
            step.options.get("baseline") for step in steps if step.verb == "eval"
        ):
            return _without_baseline(reading, gate, path)
        return RecipeGate(gate, None, gate.metric, where)
    else:
        metric = gate.metric
        owners = [step for step in steps if has(step, metric)]
        known = sorted({name for step in steps for name in metrics_of(step)})
    if not owners:
        near = close_matches(
            gate.metric, [*known, *(alias for alias, name in ALIASES.items() if name in known)]
        )
        reading.refuse("E226", f'the gate "{printable(gate.text)[:80]}" needs {printable(gate.metric)[:60]}, which no step measures', path,
                       near or f"measured are {known_list(known)}")  # fmt: skip
        return None
    judges = [step for step in owners if step.verb == "eval"]
    if len(judges) > 1:
        reading.refuse(
            "E226",
            f"{metric} is measured by {' and '.join(step.id for step in judges)}",
            path,
            f"write {judges[-1].id}.{metric}",
        )
        return None
    owner = judges[0] if judges else next((s for s in reversed(owners) if s.verb == "measure"), owners[-1])
    if "baseline" in gate.names and not _compares(owner, metric):
        return _without_baseline(reading, gate, path)
    if owner.verb == "eval" and owner.options.get("limit") is not None and not owner.gate_limited:
        reading.refuse("E227", f"step {owner.id} reads the first {owner.options['limit']} records alone, and gates over part of the data are not decided",
                       path, f"leave out limit, or accept it: gate_limited: true in {owner.id}")  # fmt: skip
        return None
    return RecipeGate(gate, owner.id, metric, where)


def _compares(step: Step, metric: str) -> bool:
    """Say whether a step knows the metric of what it compares with, too."""
    if step.verb in ("prune", "quantize", "edit"):
        return metric == "perplexity"
    return bool(step.options.get("baseline")) and (
        step.verb == "eval" and metric not in ("kl", "top1_agreement")
    )


def _without_baseline(reading: Reading, gate: Gate, path: KeyPath) -> None:
    reading.refuse("E229", f'the gate "{printable(gate.text)[:80]}" compares with a baseline, and no step measures one', path,
                   "baseline: MODEL in the eval step")  # fmt: skip
