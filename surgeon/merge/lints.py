"""Parameters that do something else than they seem to: said before work starts.

A setting that would return an input unchanged is an error on the command line and a warning
for a mergekit YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.errors import UsageError
from surgeon.merge.align import Findings
from surgeon.merge.method import Method
from surgeon.merge.spec import MergeSpec
from surgeon.merge.task_vectors import TaskVectors


def lint(
    spec: MergeSpec,
    method: Method,
    points: Mapping[str, Mapping[str, float]],
    bound: Sequence[tuple[str, Any]],
    findings: Findings,
) -> list[str]:
    """Return warnings; adds errors to ``findings`` where the command line must refuse.

    Args:
        bound: (tensor name, bound operation) of merged tensors.
    """
    warnings: list[str] = []
    vectors = [op for _, op in bound if isinstance(op, TaskVectors)]
    native = spec.precision == "float32"
    cancelled = [op for op in vectors if len(op.others) == 1 and op.normalize]
    if cancelled and any(op.weights[0] not in (0.0, 1.0) for op in cancelled):
        warnings.append(
            "weight has no effect: with one model and normalize on it cancels; set lambda instead"
        )
    unchanged = None if spec.adjust.active else _unchanged(method, bound)
    if unchanged and not points:
        text, fix = unchanged
        if native:
            findings.errors.append(UsageError("E219", text, help=fix))
        else:
            warnings.append(text)
    if bound and all(getattr(op, "is_plain_average", False) for _, op in bound):
        warnings.append(
            "the low-rank parts cancel: the result is the plain average; unequal --weight keeps one model's part"
        )
    drops = method.name in {"ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "dare_linear"}
    if not native and drops and vectors and all(d >= 1 for op in vectors for d in op.densities):
        warnings.append(f"density is 1 everywhere: {method.name} drops nothing (mergekit's default)")
    if not native and method.name == "linear":
        sums = {
            round(sum(op.weights), 6)
            for _, op in bound
            if hasattr(op, "weights") and getattr(op, "normalize", False)
        }
        if sums - {1.0}:
            shown = ", ".join(f"{s:g}" for s in sorted(sums)[:3])
            warnings.append(
                f"the weights sum to {shown} and are divided by that; normalize: false keeps them"
            )
    if spec.base_model is not None and method.base == "ignored" and method.name != "passthrough":
        warnings.append(f"{method.name} has no base: {spec.base_model} is merged as one more model")
    if _gradients(spec):
        warnings.append("gradients give the embedding, the final norm and lm_head their first value")
        if any(s.layer_range and s.layer_range[1] - s.layer_range[0] == 1 for m in spec.modules for p in m.slices
               for s in p.sources):  # fmt: skip
            warnings.append("a gradient over a slice of one layer takes its last value")
    return warnings


def _gradients(spec: MergeSpec) -> bool:
    def is_gradient(value: Any) -> bool:
        if isinstance(value, list):
            return any(not isinstance(v, dict) for v in value) or any(is_gradient(v) for v in value)
        return isinstance(value, dict) and is_gradient(value.get("value"))

    maps = [spec.parameters]
    for module in spec.modules:
        maps.append(module.parameters)
        for piece in module.slices:
            maps.append(piece.parameters)
            maps.extend(s.parameters for s in piece.sources)
    return any(is_gradient(value) for parameters in maps for value in parameters.values())


def _unchanged(method: Method, bound: Sequence[tuple[str, Any]]) -> tuple[str, str] | None:
    """Recognise parameters that reproduce one input; return the sentence and the fix."""
    operations = [op for _, op in bound]
    if not operations:
        return None
    if all(isinstance(op, TaskVectors) for op in operations):
        if all(op.lam == 0 or not any(op.weights) for op in operations):
            return "lambda or every weight is 0: the result is the base", "choose a factor above 0"
        if all(_whole(op) for op in operations):
            return (
                "the whole task vector is added back: the result is the other model",
                "choose density or lambda below 1, or name a third model with --base",
            )
        return None
    if method.name in {"slerp", "nearswap"}:
        ts = {_t(op) for op in operations}
        t = ts.pop() if len(ts) == 1 else None
        if t == 0 or (t == 1 and method.name == "slerp"):
            fix = "choose t between 0 and 1" if method.name == "slerp" else "choose t above 0"
            return f"t {t:g} returns one of the models", fix
    return None


def _t(op: Any) -> float | None:
    """Return the interpolation parameter of an operation, its own or that of the rule it combines by."""
    own = getattr(op, "t", None)
    return own if own is not None else getattr(getattr(op, "solver", None), "t", None)


def _whole(op: TaskVectors) -> bool:
    if len(op.others) != 1 or (op.densities[0] < 1 and op.sparsifier != "none"):
        return False
    weight = 1.0 if op.normalize else op.weights[0]
    return weight * op.lam == 1
