"""The document of a merge: what a plan would do, and what its run did. ``surgeon merge --json`` prints it."""

from __future__ import annotations

from typing import Any


def describe(plan: Any, check: Any) -> dict[str, Any]:
    """Return the plan's figures."""
    copied = sum(
        1 for item in plan.items if all(t.operation.copies or t.operation.name == "cast" for t in item.tasks)
    )
    outputs = [o for tensors in plan.outputs().values() for o in tensors]
    dtypes: dict[str, int] = {}
    for tensor in outputs:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
    return {
        "id": plan.plan_id(), "method": plan.recipe["method"], "inputs": list(plan.inputs), "tensors": len(plan.items),
        "merged": len(plan.items) - copied, "copied": copied, "outputs": [k for k in plan.models if k] or 1,
        "bytes": sum(o.nbytes for o in outputs), "parameters": sum(o.elements for o in outputs), "dtype_bytes": dtypes,
        "read_bytes": check.estimate.read_bytes, "passes": check.estimate.passes,
        "memory_estimate_bytes": check.estimate.memory_bytes, "memory_limit_bytes": check.memory_limit,
        "disk_bytes": check.estimate.disk_bytes, "disk_free_bytes": check.disk_free, "threads": check.threads,
        "parameters_of_method": plan.recipe["parameters"], "parameters_of_models": _by_model(plan.recipe),
        "adjust": plan.recipe.get("adjust"),
        "measured": plan.recipe.get("measured"),
    }  # fmt: skip


def _by_model(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters that models have of their own, where each model is used in one way."""
    found: dict[str, dict[str, Any]] = {}
    for module in recipe["modules"]:
        for piece in module["slices"]:
            for source in piece["sources"]:
                own = source.get("parameters") or {}
                if found.setdefault(str(source["model"]), own) != own:
                    return {}
    return {model: own for model, own in found.items() if own}


def rehearsed(planned: Any, described: dict[str, Any], destination: Any) -> dict[str, Any]:
    """Return the document of a dry run."""
    plan = planned.plan
    return {"status": "dry-run", "plan": described, "output": {"path": str(destination)}, "warnings": list(plan.warnings),
            "notes": [*planned.notes, *plan.notes]}  # fmt: skip


def written(planned: Any, described: dict[str, Any], outcome: Any) -> dict[str, Any]:
    """Return the document of a merge that was run."""
    from surgeon.kernels import fused
    from surgeon.system import peak_memory

    plan, update = planned.plan, effective_update(outcome.summaries)
    digests = {
        name: d
        for b in outcome.manifests.values()
        for name, d in b["files"].items()
        if name.endswith(".safetensors")
    }
    return {
        "status": "ok",
        "output": {
            "path": str(outcome.path), "models": {k: str(p) for k, p in outcome.models.items()}, "bytes": described["bytes"],
            "parameters": described["parameters"], "dtype_bytes": described["dtype_bytes"],
            "shards": len(digests), "sha256": digests, "unchanged": outcome.unchanged,
        },
        "plan": described,
        "metrics": {"effective_update": {k: v for k, v in update.items() if k != "text"}} if update else {},
        "gates": [],
        "compiled_kernels": fused.available(),
        "peak_memory_bytes": peak_memory(),
        "seconds": round(outcome.seconds, 3),
        "timing": {k: round(v, 3) for k, v in vars(outcome.timing).items()},
        "warnings": list(plan.warnings),
        "notes": [*planned.notes, *plan.notes],
    }  # fmt: skip


def effective_update(summaries: dict[str, Any]) -> dict[str, Any] | None:
    """Sum up what an update-selective merge really changed (dler's report)."""
    rows = [s for tensors in summaries.values() for s in tensors.values() if "kept_energy" in s]
    if not rows:
        return None
    total = {
        k: sum(float(r[k]) for r in rows)
        for k in ("elements", "changed", "kept", "energy", "kept_energy", "kept_l1", "moved_l1")
    }
    changed, kept = total["changed"] / total["elements"], total["kept"] / total["elements"]
    energy = total["kept_energy"] / total["energy"] if total["energy"] else 1.0
    scale = total["moved_l1"] / total["kept_l1"] if total["kept_l1"] else 0.0
    asked = next((float(r["scale"]) for r in rows if "scale" in r), None)
    warnings = []
    if changed == 0:
        warnings.append("the two models hold equal weights: the result is the base")
    if kept >= changed > 0:
        warnings.append(f"keep has no effect: only {changed:.1%} of the entries differ, all of them are kept")
    if asked and changed and abs(scale - asked) > 0.1 * abs(asked):
        warnings.append(f"the effective scale is {scale:.2f}, not {asked:g}: the updates are about as small as the output "
                        "type's resolution; --dtype float32 keeps them exactly")  # fmt: skip
    return {
        "changed": changed, "kept": kept, "energy_kept": energy, "effective_scale": scale, "warnings": warnings,
        "text": f"update    {changed:.1%} of entries differ   {kept:.1%} kept with {energy:.1%} of the energy   "
        f"effective scale {scale:.3f}",
    }  # fmt: skip
