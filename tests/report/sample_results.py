"""Result documents as ``surgeon eval --json`` writes them: eight models, 200 questions each.

Accuracy and mean tokens are measured values of the demo models; the intervals of accuracy are Wilson's,
the others are set by hand to plausible widths.
"""

from __future__ import annotations

import copy
import math
from typing import Any

QUESTIONS = 200
SHA = "9f2c1d7be0a44f6b8d3e5c1a7f90b2d4e6c8a0f1b3d5e7092a4c6e8f0b1d3f57"

# name: accuracy, mean tokens, half width of its interval, median, cap rate, reflection rate
MEASURED = {
    "long": (0.980, 242.0, 9.1, 231, 0.0, 0.985),
    "short": (0.860, 54.0, 2.2, 52, 0.0, 0.0),
    "base": (0.955, 156.0, 8.3, 149, 0.005, 0.42),
    "ties 0.05": (0.890, 57.0, 2.6, 54, 0.0, 0.01),
    "ties 0.1": (0.860, 118.0, 9.9, 88, 0.045, 0.135),
    "ties 0.15": (0.905, 179.0, 11.4, 168, 0.03, 0.52),
    "ties 0.2": (0.980, 214.0, 9.6, 206, 0.0, 0.94),
    "slerp": (0.930, 140.0, 8.8, 131, 0.01, 0.31),
}
# against long: difference of accuracy with its interval, half width of the ratio's interval, gained, lost, p
PAIRED = {
    "short": (-0.175, -0.065, 0.009, 2, 26, 1.4e-6),
    "base": (-0.050, 0.0, 0.031, 2, 7, 0.18),
    "ties 0.05": (-0.140, -0.045, 0.011, 1, 19, 4.0e-5),
    "ties 0.1": (-0.175, -0.070, 0.038, 1, 25, 8.0e-7),
    "ties 0.15": (-0.120, -0.035, 0.044, 2, 17, 7.3e-4),
    "ties 0.2": (-0.020, 0.020, 0.034, 2, 2, 1.0),
    "slerp": (-0.085, -0.020, 0.035, 1, 11, 6.3e-3),
}
DOMAINS = {"arithmetic": (0.6, 0.75), "words": (0.4, 1.375)}
"""Share of the questions, and length relative to the mean."""


def wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(
    value: float, low: float | None = None, high: float | None = None, n: int = QUESTIONS
) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def metrics(name: str, questions: int = QUESTIONS, stretch: float = 1.0) -> dict[str, Any]:
    accuracy, tokens, half, median, cap, reflection = MEASURED[name]
    tokens, half = tokens * stretch, half * math.sqrt(QUESTIONS / questions)
    low, high = wilson(accuracy, questions)
    per = 1000 * accuracy / tokens
    return {
        "accuracy": measure(accuracy, low, high, questions),
        "cap_rate": measure(cap, *wilson(cap, questions), questions),
        "reflection_rate": measure(reflection, *wilson(reflection, questions), questions),
        "tokens_mean": measure(tokens, tokens - half, tokens + half, questions),
        "tokens_median": measure(median * stretch, None, None, questions),
        "intelligence_per_token": measure(per, 1000 * low / (tokens + half), 1000 * high / (tokens - half), questions),
    }  # fmt: skip


def manifest(method: str, parameters: dict[str, Any], density: float | None) -> dict[str, Any]:
    """The parts of a surgeon.json that a report reads."""
    weights = {"weight": 1.0} | ({"density": density} if density is not None else {})
    return {
        "schema": 1,
        "program": {"name": "surgeon", "version": "0.1.0"},
        "verb": "merge",
        "plan": f"{int((density or 0.5) * 1e6):08x}a664a7f1ec11a40519d6700524a9acfe5df0eef9f48fad3bb2d26a40",
        "recipe": {
            "verb": "merge", "method": method, "base_model": "short",
            "modules": [{"name": "", "slices": [{"sources": [{"model": "long", "parameters": weights}, {"model": "short"}]}]}],
            "parameters": parameters, "precision": "float32",
        },
        "seed": 0,
        "inputs": {
            "long": {"files": {
                "model-00001-of-00002.safetensors": {"sha256": "a2d0126b9b219635ab6a970899281240e64877ccb23a8c5cf65f4d87df694363"},
                "model-00002-of-00002.safetensors": {"sha256": "ee24118634491902231a37c81d2cc63abc7f0d8fa3628297210bf3e382056b14"}}},
            "short": {"files": {
                "model.safetensors": {"sha256": "fc30de8a643a7b71792b67c76772c5d48569c439d4882a052aa68a7677d80def"}}},
        },
        "warnings": [],
    }  # fmt: skip


def result(name: str, *, baseline: bool = True) -> dict[str, Any]:
    """One result document."""
    document: dict[str, Any] = {
        "schema": 1, "command": "eval", "status": "ok", "exit_code": 0, "error": None,
        "model": {"name": name, "path": f"sweep/{name}", "parameters": 1_184_320, "bytes": 2_368_640, "dtype": "BF16"},
        "settings": {"seed": 0, "samples_per_question": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
                     "max_new_tokens": 512, "limit": None, "batch_size": 200},
        "data": {"name": "held-out.jsonl", "sha256": SHA, "questions": QUESTIONS},
        "metrics": metrics(name),
        "groups": {"domain": {d: metrics(name, round(QUESTIONS * share), stretch)
                              for d, (share, stretch) in DOMAINS.items()}},
        "baseline": None, "gates": [], "warnings": [], "seconds": 41.7,
    }  # fmt: skip
    if name.startswith("ties"):
        density = float(name.split()[1])
        document["model"]["manifest"] = manifest("ties", {"lambda": 1.0, "normalize": True}, density)
    elif name == "slerp":
        document["model"]["manifest"] = manifest("slerp", {"t": 0.5}, None)
    if baseline and name in PAIRED:
        low, high, half, gained, lost, p_value = PAIRED[name]
        ratio = MEASURED[name][1] / MEASURED["long"][1]
        document["baseline"] = {
            "name": "long",
            "metrics": metrics("long"),
            "paired": {
                "accuracy_difference": measure(MEASURED[name][0] - MEASURED["long"][0], low, high),
                "tokens_ratio": measure(ratio, ratio - half, ratio + half),
                "intelligence_per_token_ratio": measure(
                    MEASURED[name][0] / MEASURED["long"][0] / ratio,
                    *(MEASURED[name][0] / MEASURED["long"][0] / (ratio + s * half) for s in (1.3, -1.3)),
                ),
                "mcnemar": {"gained": gained, "lost": lost, "p_value": p_value},
            },
        }
    return document


def results() -> list[dict[str, Any]]:
    """All eight, with gates on two of them and a warning."""
    found = [result(name) for name in MEASURED]
    by_name = {r["model"]["name"]: r for r in found}
    by_name["ties 0.2"]["gates"] = [
        {"text": "accuracy >= baseline - 0.02", "metric": "accuracy", "passed": True, "value": 0.98, "threshold": 0.96},
        {"text": "tokens_mean <= 0.9 * baseline", "metric": "tokens_mean", "passed": True, "value": 214.0, "threshold": 217.8},
    ]  # fmt: skip
    by_name["ties 0.05"]["status"] = "gate-failed"
    by_name["ties 0.05"]["gates"] = [
        {"text": "accuracy >= baseline - 0.02", "metric": "accuracy", "passed": False, "value": 0.89, "threshold": 0.96},
    ]  # fmt: skip
    by_name["ties 0.1"]["warnings"] = ["9 of 200 answers were cut off at 512 tokens"]
    return copy.deepcopy(found)
