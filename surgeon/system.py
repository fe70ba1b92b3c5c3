"""What this machine offers: cores, memory, peak use. Linux first, guarded elsewhere."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Return the cores this process may use, hyperthreads counted once where that can be known."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        base = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((base / "physical_package_id").read_text(), (base / "core_id").read_text()))
        except OSError:
            return len(allowed)
    return max(1, len(cores))


def memory_budget() -> int:
    """Return min(cgroup limit, 80 % of available memory) in bytes."""
    available = 8 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    limits = [int(available * 0.8)]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits)


def open_file_budget() -> int:
    """Return how many files each of readers, writers and digests may hold open at once (fault H5)."""
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows: 512 by default
        allowed = 512
    if allowed < 0:
        allowed = 1 << 16
    return max(4, min(48, (allowed - 32) // 4))


def peak_memory() -> int | None:
    """Return this process's peak resident memory in bytes (VmHWM), None where unknown."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def parse_size(text: str) -> int:
    """Parse "12GB", "500MB", "2GiB" or a plain number of bytes; decimal units unless ...iB.

    Raises:
        ValueError: not a size.
    """
    import re

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(text)
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
