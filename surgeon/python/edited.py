"""The document of an edit: what was found and changed, and what was written. ``surgeon edit --json`` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def rehearsed(prepared: Any, destination: Path) -> dict[str, Any]:
    """Return the document of a dry run."""
    return {
        "status": "dry-run", "output": {"path": str(destination)}, "edit": prepared.report, "notes": prepared.notes,
        "warnings": prepared.warnings,
    }  # fmt: skip


def written(done: Any) -> dict[str, Any]:
    """Return the document of a finished edit; of a control vector there is only a file."""
    output: dict[str, Any] = {"path": str(done.path)}
    document: dict[str, Any] = {"status": "ok", "output": output, "edit": done.report, "metrics": {}, "gates": [],
                                "notes": done.notes, "warnings": done.warnings}  # fmt: skip
    outcome = done.outcome
    if outcome is not None:
        bodies = outcome.manifests.values()
        output |= {
            "unchanged": outcome.unchanged,
            "sha256": {name: digest for body in bodies for name, digest in body["files"].items() if name.endswith(".safetensors")},
            "parameters": sum(body["output"]["parameters"] for body in bodies),
            "bytes": sum(body["output"]["bytes"] for body in bodies),
        }  # fmt: skip
        document["seconds"] = round(outcome.seconds, 3)
    quality = (done.report or {}).get("quality")
    if quality:
        pair = [quality["perplexity_before"], quality["perplexity_after"]]
        document["metrics"] = {"kl": quality["kl"], "perplexity": pair}
    return document
