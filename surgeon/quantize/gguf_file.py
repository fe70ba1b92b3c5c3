"""``--format gguf``: the blocks of all matrices put into one file that llama.cpp was seen to compute the same from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.checkpoint.dtypes import CONFIG_NAMES
from surgeon.deploy import export_gguf
from surgeon.deploy.gguf_rows import Dequantized, Rows, stored
from surgeon.quantize.sequential import Finished
from surgeon.quantize.session import Session
from surgeon.system import physical_cores


def recipe(session: Session) -> dict[str, Any]:
    """Return what the file follows from beside the model's own files, without paths."""
    return {"verb": "quantize", **session.asked}


def rows_of(finished: Finished) -> dict[str, Rows]:
    """Return the blocks of every quantized matrix, from the files of the layers."""
    found: dict[str, Rows] = {}
    for file in finished.files:
        found |= stored(open_path(file, file.name))
    return found


def dequantized(working: Checkpoint, finished: Finished) -> Dequantized:
    """Return the model that the file stands for, as plain numbers."""
    return Dequantized(working, rows_of(finished))


def unchanged(session: Session, where: Path) -> dict[str, Any] | None:
    """Return what is said when the file is there already, undamaged and made of the same."""
    dtype = CONFIG_NAMES[session.dtype]
    digest = export_gguf.finished(
        session.source, session.checkpoint, where, recipe=recipe(session), dtype=dtype
    )
    if digest is None:
        return None
    size = where.stat().st_size
    return {"output": {"path": str(where), "bytes": size, "unchanged": True, "sha256": {where.name: digest}}}


def write(
    session: Session, working: Checkpoint, finished: Finished, where: Path, *, overwrite: bool
) -> dict[str, Any]:
    """Write the file, have llama.cpp compared with the numbers it stands for, publish it; return what was found."""
    request = session.request
    return export_gguf.write_gguf(
        session.source, working, where, dtype=CONFIG_NAMES[session.dtype], name=export_gguf.model_name(session.source),
        recipe=recipe(session), quantized=rows_of(finished), verb="quantize", overwrite=overwrite,
        threads=request.threads or physical_cores(), memory_limit=request.memory_limit, progress=session.tell, stop=session.stop,
    )  # fmt: skip


def reading(check: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp answered, in the words of `surgeon.deploy.quantized_check`."""
    if "skipped" in check:
        return {"reader": "llama.cpp", "notice": f"not compared with llama.cpp: {check['skipped']}"}
    return {"reader": "llama.cpp", "versions": {}, "texts": check["texts"], "kl": check["kl"], "prompts": check["prompts"],
            "largest_difference": check["largest_difference"], "same_first_choice": check["same_first_choice"]}  # fmt: skip
