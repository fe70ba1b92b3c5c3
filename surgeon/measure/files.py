"""Results on disk, written in one step: a reader sees the old file or the new one.

Codes: E502 it cannot be written.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file in one step (E502 when that is impossible)."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise EnvironmentFault(
            "E502", f"cannot write {printable(str(path))}: {error.strerror}", help="choose another file"
        ) from error
