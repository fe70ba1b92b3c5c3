"""What this machine offers, and what can be done with a model on it: what ``surgeon doctor`` prints with ``--json``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from surgeon.python.results import Document
from surgeon.python.views import size

NEEDED = (
    ("numpy", "1.26", "all arithmetic"),
    ("typer", "0.15", "the command line"),
    ("pydantic", "2.7", "checking requests"),
    ("pyyaml", "6.0", "recipes"),
    ("huggingface_hub", "0.30", "hub models"),
)
OPTIONAL = (
    ("numba", "0.60", "faster merges", "numba"),
    ("torch", "2.4", "verify --load, calibration, eval", "model-surgeon[run]"),
    ("transformers", "5.23", "verify --load, calibration, eval", "model-surgeon[run]"),
    ("safetensors", "0.5", "verify --load", "model-surgeon[run]"),
    ("accelerate", "1.0", "large models, several GPUs", "model-surgeon[run]"),
    ("pyarrow", "15", "parquet files as data", "model-surgeon[data]"),
    ("datasets", "3.0", "dataset ids as data", "model-surgeon[data]"),
    ("matplotlib", "3.8", "reports as PNG", "model-surgeon[report]"),
    ("lm-eval", "0.4.9", "eval --tasks", "model-surgeon[eval]"),
)
"""Package, least version, what it is for, what to install: as in pyproject.toml (a test compares them)."""


def doctor() -> Document:
    """Report on this machine."""
    return Document("doctor", {"environment": environment(), "packages": packages(), "numba": compiled()})


def environment() -> dict[str, Any]:
    """Return what the machine offers."""
    from surgeon import __version__
    from surgeon.system import memory_budget, physical_cores

    cache = hub_cache()
    return {
        "surgeon": __version__, "python": platform.python_version(), "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": physical_cores(), "logical_cores": os.cpu_count(), "memory_bytes": _memory("MemTotal"),
        "memory_free_bytes": _memory("MemAvailable"), "memory_limit_bytes": memory_budget(), "cgroup_limit_bytes": cgroup_limit(),
        "folder": os.getcwd(), "disk_free_bytes": shutil.disk_usage(".").free, "hub_cache": str(cache),
        "hub_cache_exists": cache.is_dir(), "offline": os.environ.get("HF_HUB_OFFLINE", "") in {"1", "ON", "YES", "TRUE", "true"},
    }  # fmt: skip


def hub_cache() -> Path:
    """Return where the hub library keeps its models."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / below
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "huggingface" / "hub"


def cgroup_limit() -> int | None:
    """Return the container's memory limit, None when there is none."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _memory(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def packages() -> list[dict[str, Any]]:
    """Return found and needed versions; imports none of the packages."""
    rows = []
    for name, least, purpose, *install in [*NEEDED, *OPTIONAL]:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        rows.append(
            {
                "name": name, "found": found, "needed": least, "purpose": purpose, "optional": bool(install),
                "ok": found is not None and release(found) >= release(least), "install": install[0] if install else name,
            }
        )  # fmt: skip
    return rows


def release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def compiled() -> dict[str, Any]:
    """Say whether numba works here: it compiles one function, and can keep it on disk."""
    if importlib.util.find_spec("numba") is None:
        return {"usable": False, "reason": "not installed"}
    try:
        import numba

        done = numba.njit("int64(int64)")(lambda value: value + 1)(1)
    except Exception as error:
        return {"usable": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    source = Path(importlib.util.find_spec("surgeon").origin or ".").parent / "kernels" / "__pycache__"  # type: ignore[union-attr]
    folders = [Path(chosen)] if chosen else [source, Path("~/.cache/numba").expanduser()]
    place = next((f for f in folders if writable(f)), None)
    return {"usable": done == 2, "reason": None, "cache": str(place) if place else None}


def writable(folder: Path) -> bool:
    """Try to create a file there, or in the nearest folder that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def possibilities(found: Any, environment: dict[str, Any]) -> dict[str, Any]:
    """Say what can be done with a model on this machine, from the summary of its headers."""
    from surgeon.verify import readers

    e = environment
    limit = e["memory_limit_bytes"]
    largest = 1 << 20
    # A merge holds a few blocks per worker, not the model: see the engine's own estimate in --dry-run.
    merging = 64 * largest * e["cores"] + (256 << 20)
    reading = readers.OVERHEAD + found.bytes
    using = readers.OVERHEAD + max(found.bytes, 4 * found.parameters)
    missing = readers.available()
    rows = []

    def add(name: str, possible: bool, detail: str) -> None:
        rows.append({"what": name, "possible": possible, "detail": detail})

    if found.quantized:
        add("merge", False, f"it is quantized ({found.quantized}); merging needs plain weights")
    else:
        enough = merging <= limit
        add(
            "merge",
            enough,
            f"about {size(merging)} of memory ({size(limit)} available), whatever the model's size",
        )
        room = found.bytes <= e["disk_free_bytes"]
        add(
            "write it",
            room,
            f"{size(found.bytes)} on disk, {size(e['disk_free_bytes'])} free in {e['folder']}",
        )
    known = (
        ""
        if found.known_architecture
        else "; no record of this family: only numbering and likeness of layers are checked"
    )
    add("verify", True, f"reads {size(found.file_bytes)}{known}")
    if found.kind == "file":
        add("verify --load", False, "a bare file; readers load folders with config.json")
    elif missing:
        add("verify --load", False, f"{' and '.join(missing)} not installed: {readers.INSTALL}")
    else:
        add("verify --load", reading <= limit, f"about {size(reading)} of memory ({size(limit)} available)")
        add("verify --generate", using <= limit, f"about {size(using)} of memory, in float32")
    return {"label": found.label, "family": found.family, "known_family": found.known_architecture, "bytes": found.bytes,
            "quantized": found.quantized, "abilities": rows, "missing_beside": found.missing}  # fmt: skip
