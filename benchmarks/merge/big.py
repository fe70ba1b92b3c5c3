"""Merge two models far larger than the memory allowed, and report the process's high-water mark.

    python benchmarks/merge/big.py FOLDER [--memory-limit 2GB] [--method ties]

Makes a base and a fine-tune of 14.5 GB each in four shards (llama, bfloat16), merges them and removes everything
again. Needs 45 GB of disk; refuses to start with less than 60 GB free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from make_data import SIZES, make  # noqa: E402

NEEDED = 60_000_000_000


def high_water(pid: int) -> dict[str, int]:
    """Return VmHWM and RssAnon of a process in bytes, {} once it has ended."""
    try:
        with open(f"/proc/{pid}/status") as stream:
            found = dict(line.split(":", 1) for line in stream)
    except OSError:
        return {}
    return {key: int(found[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon") if key in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--size", choices=sorted(SIZES), default="big")
    parser.add_argument("--keep", action="store_true", help="leave the data for another run")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    present = (folder / arguments.size).exists()
    if arguments.size == "big" and not present and shutil.disk_usage(folder).free < NEEDED:
        sys.exit(f"less than {NEEDED / 1e9:.0f} GB free in {folder}")
    try:
        models = make(folder, arguments.size, 2)
        report = merge(folder, models, arguments.method, arguments.memory_limit)
        print(json.dumps(report, indent=1))
        (folder / "big.json").write_text(json.dumps(report, indent=1) + "\n")
    finally:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(folder / arguments.size, ignore_errors=True)


def merge(folder: Path, models: list[Path], method: str, memory_limit: str) -> dict:
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [sys.executable, "-m", "surgeon", "merge", str(models[1]), "--base", str(models[0]), "--method", method,
               "--memory-limit", memory_limit, "-o", str(out)]  # fmt: skip
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environment)
    peak: dict[str, int] = {}
    while child.poll() is None:
        peak = {k: max(v, peak.get(k, 0)) for k, v in high_water(child.pid).items()} or peak
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if child.returncode:
        sys.exit(f"the merge ended with {child.returncode}")
    sizes = [sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (*models, out)]
    return {
        "method": method,
        "memory_limit": memory_limit,
        "input_gb": [round(s / 1e9, 2) for s in sizes[:2]],
        "output_gb": round(sizes[2] / 1e9, 2),
        "seconds": round(seconds, 1),
        "vm_hwm_mb": round(peak.get("VmHWM", 0) / 1e6),
        "peak_anonymous_mb": round(peak.get("RssAnon", 0) / 1e6),
        "processors": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
