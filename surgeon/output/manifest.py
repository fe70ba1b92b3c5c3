"""surgeon.json and SHA256SUMS: what was made, from what, how; equal between equal runs.

No times, hosts, devices, paths or command lines: those belong to ``--json`` and reports.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgeon import __version__
from surgeon.output.layout import Layout
from surgeon.plan import OutputModel, Plan

SCHEMA = 1
MANIFEST = "surgeon.json"
CHECKSUMS = "SHA256SUMS"
_PERMISSIONS = ("allow_nonfinite", "allow_pickle")


def manifest(
    plan: Plan,
    model: OutputModel,
    layout: Layout,
    file_digests: Mapping[str, str],
    input_digests: Mapping[str, str],
    summaries: Mapping[str, Any],
) -> bytes:
    """Return the manifest of one output model.

    Args:
        file_digests: sha256 of every file of the output except the manifest and SHA256SUMS.
        input_digests: sha256 by path of every input weight file.
        summaries: what operations measured, by tensor.
    """
    inputs = {}
    for key, checkpoint in plan.inputs.items():
        inputs[key] = {
            "files": {
                h.file.name: {"sha256": input_digests.get(str(h.file)), "bytes": h.stamp.size}
                for h in checkpoint.headers
            },
            **plan.recipe.get("models", {}).get(key, {}),
        }
    outputs = [o for shard in layout.shards for o in shard.tensors]
    by_type: dict[str, int] = {}
    for output in outputs:
        by_type[output.dtype] = by_type.get(output.dtype, 0) + output.nbytes
    versions = sorted({(t.operation.name, t.operation.version) for i in plan.items for t in i.tasks})
    body = {
        "schema": SCHEMA,
        "program": {"name": "surgeon", "version": __version__},
        "verb": plan.verb,
        "plan": plan.plan_id(),
        "recipe": model.recipe or plan.recipe,
        "operations": dict(versions),
        "seed": plan.seed,
        "inputs": inputs,
        "output": {
            "tensors": len(outputs),
            "parameters": sum(o.elements for o in outputs),
            "bytes": sum(o.nbytes for o in outputs),
            "dtype_bytes": dict(sorted(by_type.items())),
        },
        "permissions": [p.replace("_", "-") for p in _PERMISSIONS if plan.recipe.get(p)],
        "notes": _without_paths(plan, plan.notes),
        "warnings": _without_paths(plan, plan.warnings),
        "measured": {name: summaries[name] for name in sorted(summaries)},
        "files": dict(sorted(file_digests.items())),
    }
    return (json.dumps(body, indent=2, sort_keys=False, default=str) + "\n").encode()


_PATH = re.compile(r"(?<![\w.~])(?:~|\.{1,2})?/[^\s/]|\b[A-Za-z]:\\")


def _without_paths(plan: Plan, sentences: Iterable[str]) -> list[str]:
    """Name models by their keys; a sentence that still speaks of a path stays on the terminal."""
    names: dict[str, str] = {}
    for key, checkpoint in plan.inputs.items():
        names[checkpoint.label] = key
        if checkpoint.folder is not None:
            names[str(checkpoint.folder)] = key
    kept = []
    for sentence in sentences:
        for label in sorted(names, key=len, reverse=True):
            sentence = sentence.replace(label, names[label])
        if not _PATH.search(sentence):
            kept.append(sentence)
    return kept


def seal(body: bytes) -> bytes:
    """Add a manifest's digest of itself: beside a bare file there is no SHA256SUMS to vouch for it."""
    content = json.loads(body)
    content["sealed"] = sha256(body)
    return (json.dumps(content, indent=2) + "\n").encode()


def seal_holds(sealed: bytes) -> bool:
    """Say whether a sealed manifest is byte for byte what was written."""
    try:
        content = json.loads(sealed)
        content.pop("sealed")
    except (ValueError, KeyError, AttributeError):
        return False
    return seal((json.dumps(content, indent=2) + "\n").encode()) == sealed


def checksums(file_digests: Mapping[str, str]) -> bytes:
    """Return SHA256SUMS for ``sha256sum -c``."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(file_digests.items())).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
