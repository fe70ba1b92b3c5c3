"""What lies in the folder of a result: its manifest, the plan of a quantization, what pruning kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError

PLAN, PRUNING, MANIFEST = "plan.json", "pruning.json", "surgeon.json"
LARGEST = 256 << 20
"""A plan of thousands of experts has tens of megabytes; what is larger was not written by this program."""


def read(folders: Iterable[str], name: str) -> Mapping[str, Any] | None:
    """Return the first file of this name in one of the folders, None when there is none that can be read."""
    from surgeon.checkpoint.strict_json import read_bytes

    for folder in folders:
        try:
            path = Path(folder) / name
            if not path.is_file() or path.stat().st_size > LARGEST:
                continue
            content = json.loads(read_bytes(path))
        except (OSError, ValueError, RecursionError, SurgeonError):
            continue
        if isinstance(content, dict):
            return content
    return None
