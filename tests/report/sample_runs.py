"""Documents of runs and commands as they are written, with the folders they name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = 3
CALIBRATION = {
    "name": "surgeon shipped text 1", "sha256": "9c28915076cb" + "0" * 52, "samples": 40, "requested": 44, "tokens": 10240, "truncated": 7,
    "dropped": 3, "dropped_because": {"answer": 3}, "sequence_length": 256, "domains": {"code": 20, "prose": 20},
    "statistics": {"samples": 30, "tokens": 7680}, "held_out": {"samples": 10, "tokens": 2560},
}  # fmt: skip


def plan() -> dict[str, Any]:
    """The plan of a quantization: layer 0 in 8 bits, the others in 4; down_proj loses most."""
    records, groups = [], []
    for layer in range(LAYERS):
        for number, kind in enumerate(KINDS):
            name = f"model.layers.{layer}.{kind}.weight"
            scheme, bits = ("int8g32", 8) if layer == 0 else ("int4g32", 4)
            records.append({"label": name, "scheme": scheme, "bits": bits, "elements": 1000, "bytes": 125 * bits, "method": "rtn",
                            "weight_error": 0.01 if bits == 4 else 0.0001})  # fmt: skip
            losses = {"int2g32": 50.0 * 4**number, "int4g32": 4.0**number + layer, "int8g32": 0.01}
            groups.append(
                {
                    "name": name,
                    "modules": [name],
                    "format": scheme,
                    "loss": losses[scheme],
                    "losses": losses,
                    "sizes": {},
                }
            )
    return {"schema": 1, "matrices": {**{r["label"]: r["scheme"] for r in records}, "lm_head.weight": "kept"}, "sensitivity": "weight",
            "allocation": {"groups": groups, "bits": 5.0}, "records": records}  # fmt: skip


def pruning() -> dict[str, Any]:
    """What a pruning kept: 6 of 8 channels, 2 heads, nothing of the middle layer."""
    layer = {"heads": [0, 2], "channels": [0, 1, 2, 5, 6, 7]}
    return {"layers": [layer, None, {"heads": None, "channels": [1, 2]}], "hidden": None}


def manifest(verb: str, plan_id: str) -> dict[str, Any]:
    return {"schema": 1, "program": {"name": "surgeon", "version": "0.1.0"}, "verb": verb, "plan": plan_id, "seed": 0,
            "recipe": {"verb": verb, "request": {"method": "gptq", "target_bits": 5.0, "threads": None}},
            "inputs": {"pruned": {"files": {"model.safetensors": {"sha256": "ab" * 32, "bytes": 1}}}}}  # fmt: skip


def evaluation(name: str = "out", accuracy: float = 0.9, size: int = 600) -> dict[str, Any]:
    share = {"value": accuracy, "low": accuracy - 0.04, "high": accuracy + 0.04, "n": 200}
    model = {"name": name, "path": f"/nowhere/{name}", "parameters": 800, "bytes": size}
    baseline = {
        "name": "long",
        "parameters": 1000,
        "bytes": 2000,
        "metrics": {"accuracy": {"value": 0.95, "n": 200}},
        "paired": {},
    }
    return {"schema": 1, "command": "eval", "status": "ok", "exit_code": 0, "model": model, "settings": {"seed": 0}, "data": {},
            "metrics": {"accuracy": share}, "baseline": baseline, "gates": [], "warnings": [], "notes": []}  # fmt: skip


def prune(folder: Path, **changes: Any) -> dict[str, Any]:
    member = {"name": "sparsity=0.2", "path": str(folder), "parameters": 800, "bytes": 1600, "shape": "2 of 3 layers, ffn 2 to 6",
              "speedup": None, "quality": {"top1": 0.97, "tokens": 100}, "remarks": ["loaded strictly"]}  # fmt: skip
    document = {
        "schema": 1, "command": "prune", "status": "ok", "exit_code": 0, "error": None, "method": "ziplm",
        "output": {"path": str(folder), "parameters": 800, "bytes": 1600},
        "model": {"name": "merged", "parameters": 1000, "bytes": 2000, "shape": "3 layers, hidden 16, heads 4 / kv 2, ffn 8"},
        "members": [member], "metrics": {"perplexity": [8.0, 8.5], "kl": 0.01, "top1": 0.97, "speedup": {"predicted": 1.4, "measured": 1.3, "spread": 0.05}},
        "gates": [], "warnings": [], "plan": {"id": "d" * 64}, "calibration": copy.deepcopy(CALIBRATION), "seconds": 20.5,
    }  # fmt: skip
    return document | changes


def quantize(folder: Path, **changes: Any) -> dict[str, Any]:
    document = {
        "schema": 1, "command": "quantize", "status": "ok", "exit_code": 0, "error": None, "method": "rtn",
        "output": {"path": str(folder), "parameters": 800, "bytes": 600, "bits": 5.0}, "model": {"name": "pruned", "parameters": 800, "bytes": 1600},
        "schemes": [{"scheme": "int4g32", "matrices": 8, "parameters": 640, "bytes": 320, "bits": 4.0}],
        "metrics": {"kl": 0.04, "top1": 0.9}, "gates": [], "warnings": [], "plan": {"id": "b" * 64}, "calibration": None, "seconds": 9.0,
    }  # fmt: skip
    return document | changes


def run(folder: Path) -> dict[str, Any]:
    """A run of four steps: the pruned model is gone, the quantized one was published with what it carries."""
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan()))
    (out / "pruning.json").write_text(json.dumps(pruning()))
    (out / "surgeon.json").write_text(json.dumps(manifest("quantize", "b" * 64)))
    merge = {"schema": 1, "command": "merge", "status": "ok", "output": {"path": "/nowhere/merged", "bytes": 2000, "parameters": 1000},
             "plan": {"id": "a" * 64, "method": "task_arithmetic"}, "metrics": {}, "notes": ["ties needs a base; using short"]}  # fmt: skip
    made = (("merged", "merge", None, merge), ("pruned", "prune", None, prune(folder / "gone")),
            ("quantized", "quantize", str(out), quantize(folder / "gone")), ("scores", "eval", None, evaluation()))  # fmt: skip
    steps = [
        {"id": i, "verb": v, "status": "done", "seconds": 1.5, "path": p, "document": d}
        for i, v, p, d in made
    ]
    gates = [{"gate": "accuracy >= baseline - 0.1", "metric": "accuracy", "step": "scores", "value": 0.9, "baseline": 0.95, "threshold": 0.85,
              "passed": True, "reason": None},
             {"gate": "bytes <= 0.4 * baseline", "metric": "bytes", "step": "quantized", "value": 600, "baseline": 2000, "threshold": 800.0,
              "passed": True, "reason": None}]  # fmt: skip
    return {
        "schema": 1, "command": "run", "status": "ok", "exit_code": 0, "recipe": {"name": "small", "file": "small.yaml", "sha256": "c" * 64},
        "output": {"path": str(out), "models": {"": str(out)}}, "steps": steps, "results": {}, "gates": gates, "points": [],
        "published": True, "seconds": 30.0, "warnings": ["pruned: 3 records were left out"], "error": None,
    }  # fmt: skip


def sweep(folder: Path) -> dict[str, Any]:
    """A run of three points that differ in accuracy, speed and size; the last fails its gates."""
    document = run(folder)
    points = []
    for number, (accuracy, speedup, size) in enumerate(
        ((0.95, 1.1, 900), (0.93, 1.5, 700), (0.80, 1.4, 800))
    ):
        steps = copy.deepcopy(document["steps"])
        steps[1]["document"]["metrics"]["speedup"]["measured"] = speedup
        steps[2]["document"]["output"]["bytes"] = size
        steps[2]["path"] = None
        steps[3]["document"] = evaluation("out", accuracy, size)
        passed = accuracy >= 0.85
        gates = [document["gates"][0] | {"value": accuracy, "passed": passed}]
        points.append({"name": f"weight=0.{number}", "values": {"steps.merged.weight": number / 10}, "steps": steps, "results": {},
                       "gates": gates, "passed": passed, "published": passed, "path": None})  # fmt: skip
    return document | {"steps": [], "gates": [], "points": points}


def experts(folder: Path) -> dict[str, Any]:
    """A pruning of experts: 2 of 4 kept in both layers, one of layer 1 without tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"0": {"kept": [0, 1], "dropped": [2, 3], "protected": [1], "tokens": [5, 6, 7, 8]},
              "1": {"kept": [0, 3], "dropped": [1, 2], "protected": [], "tokens": [5, 0, 7, 8]}}  # fmt: skip
    content = {
        "experts": {"kept": {"0": [0, 1], "1": [0, 3]}, "channels": {}},
        "of": 4,
        "method": "reap",
        "layers": layers,
    }
    (folder / "pruning.json").write_text(json.dumps(content))
    return prune(folder, method="reap")


def diff() -> dict[str, Any]:
    groups = [{"name": f"model.layers.{i}", "relative": 0.01 * (i + 1)} for i in range(3)]
    groups.append({"name": "outside layers", "relative": 0.5})
    return {"schema": 1, "command": "diff", "status": "ok", "exit_code": 0, "models": ["/m/one", "/m/two"], "notes": [],
            "values": {"by": "layer", "total": {}, "groups": groups}}  # fmt: skip
