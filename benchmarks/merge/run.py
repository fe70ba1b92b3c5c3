"""Time merges as whole processes: surgeon against mergekit on the same YAML, and against the disk.

    python benchmarks/merge/run.py FOLDER            1.3 GB per model, all methods (needs 8 GB of disk)
    python benchmarks/merge/run.py FOLDER --quick    0.2 GB per model, three methods, no peer: a smoke run

Every figure is wall time of a process from start to exit, imports and compiled code's loading
included. surgeon hashes its inputs anew in every run (its digest cache is emptied), writes, syncs,
reads back and verifies; mergekit does none of these. See README.md for what is measured how.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from make_data import make  # noqa: E402

from surgeon.checkpoint.checkpoint import open_path  # noqa: E402
from surgeon.kernels import cast  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One method: its YAML and what "equal" means for it."""

    models: int  # fine-tunes used
    base: bool
    each: str  # parameters of every fine-tune
    shared: str
    equality: str
    goal: float  # times faster than the peer


EXACT = "exact"
CLOSE = "a few ulp (different summation order)"
TIES = "exact but for entries that tie with the threshold"
DRAWN = "statistical (different random numbers)"

CASES = {
    "linear": Case(2, False, "weight: 0.5", "normalize: true", EXACT, 7),
    "task_arithmetic": Case(2, True, "weight: 0.5", "lambda: 0.7", EXACT, 7),
    "slerp": Case(1, True, "", "t: 0.4", CLOSE, 7),
    "ties": Case(2, True, "{weight: 0.5, density: 0.5}", "normalize: true", TIES, 25),
    "dare_ties": Case(2, True, "{weight: 0.5, density: 0.5}", "normalize: true", DRAWN, 25),
    "della": Case(2, True, "{weight: 0.5, density: 0.5, epsilon: 0.15}", "normalize: true", DRAWN, 15),
    "breadcrumbs": Case(2, True, "{weight: 0.5, density: 0.5, gamma: 0.01}", "lambda: 1.0", TIES, 15),
    "sce": Case(2, True, "", "select_topk: 0.5", TIES, 15),
    "model_stock": Case(2, True, "", "filter_wise: false", CLOSE, 15),
}


@dataclass
class Process:
    """One run of a command."""

    seconds: float
    peak_mb: float  # resident, mapped file pages included (ru_maxrss)
    anonymous_mb: float  # resident without file pages, sampled every 20 ms
    user: float
    system: float
    output: str = ""


@dataclass
class Row:
    """Everything measured about one method."""

    method: str
    work: str
    ours: list[Process] = field(default_factory=list)
    peer: list[Process] = field(default_factory=list)
    limit: list[dict[str, float]] = field(default_factory=list)
    equality: dict = field(default_factory=dict)


def recipe(name: str, case: Case, models: list[Path]) -> str:
    """Return the mergekit YAML both programs get."""
    lines = [f"merge_method: {name}"]
    if case.base:
        lines.append(f"base_model: {models[0]}")
    lines.append("models:")
    if name == "slerp":
        lines.append(f"  - model: {models[0]}")
    for path in models[1 : 1 + case.models]:
        lines.append(f"  - model: {path}")
        if case.each:
            value = case.each if case.each.startswith("{") else "{" + case.each + "}"
            lines.append(f"    parameters: {value}")
    lines += [f"parameters: {{{case.shared}}}", "dtype: bfloat16", ""]
    return "\n".join(lines)


def start(command: list[str], environment: dict[str, str], log: Path) -> Process:
    """Run a command to its end and return its wall time and peak memory.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    with open(log, "wb") as stream:
        began = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        anonymous = 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{text[-3000:]}")
    return Process(
        seconds,
        usage.ru_maxrss * 1024 / 1e6,
        anonymous * 1024 / 1e6,
        usage.ru_utime,
        usage.ru_stime,
        text[-2000:],
    )


def _anonymous(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as stream:
            return next((int(line.split()[1]) for line in stream if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def ordered_bits(bits: np.ndarray) -> np.ndarray:
    """Map bfloat16 bits to integers that count representable numbers."""
    wide = bits.astype(np.int32)
    return np.where(wide & 0x8000, -(wide & 0x7FFF), wide)


def compare(ours: Path, theirs: Path, base: Path) -> dict:
    """Compare two bfloat16 results: share of differing entries, ulp, size of both changes from the base."""
    left, right, origin = open_path(ours), open_path(theirs), open_path(base)
    missing = sorted(set(left.tensors) ^ set(right.tensors))
    differing = total = far = worst = 0
    moved = [0.0, 0.0]
    step = 1 << 22
    for name in sorted(set(left.tensors) & set(right.tensors)):
        elements = left.tensors[name].elements
        for begin in range(0, elements, step):
            end = min(begin + step, elements)
            a, b, o = (c.read(name, begin, end) for c in (left, right, origin))
            distance = np.abs(ordered_bits(a) - ordered_bits(b))
            differing += int(np.count_nonzero(distance))
            far += int(np.count_nonzero(distance > 1))
            worst = max(worst, int(distance.max(initial=0)))
            total += end - begin
            wide = cast.widen(o, "BF16")
            for i, x in enumerate((a, b)):
                moved[i] += float(np.abs(cast.widen(x, "BF16") - wide).sum(dtype=np.float64))
    return {
        "tensors_missing_on_one_side": missing,
        "differing_share": differing / max(1, total),
        "more_than_1_ulp_share": far / max(1, total),
        "max_ulp": worst,
        "l1_change_ratio": moved[0] / moved[1] if moved[1] else None,
    }


def limit_of(folder: Path, case: Case, models: list[Path]) -> dict[str, float]:
    used = models[0 if case.base else 1 : 1 + case.models]
    files = [str(f) for path in used for f in sorted(path.glob("*.safetensors"))]
    command = [sys.executable, str(HERE / "limit.py"), str(folder / "limit.bin"), *files]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="0.2 GB per model, few methods, no peer")
    parser.add_argument("--methods", nargs="+", choices=sorted(CASES))
    parser.add_argument("--repeat", type=int, default=3, help="runs of ours and of the limit (median)")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument(
        "--cold-code", action="store_true", help="empty numba's cache before every run of ours"
    )
    parser.add_argument("--keep-digests", action="store_true", help="let input digests be remembered")
    parser.add_argument("--mergekit", default=str(Path(sys.executable).with_name("mergekit-yaml")))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    size = "quick" if arguments.quick else "full"
    methods = arguments.methods or (["linear", "ties", "slerp"] if arguments.quick else list(CASES))
    peer = not (arguments.no_peer or arguments.quick)
    models = make(folder, size)
    rows = []
    for name in methods:
        row = measure(folder, name, models, arguments, peer)
        rows.append(row)
        print(table([row]), flush=True)
    report = {"size": size, "processors": len(os.sched_getaffinity(0)), "rows": [asdict(r) for r in rows]}
    (folder / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "result.md").write_text(table(rows))
    print("\n" + table(rows) + f"\n{folder / 'result.json'}")


def measure(folder: Path, name: str, models: list[Path], arguments, peer: bool) -> Row:
    case = CASES[name]
    config = folder / f"{name}.yml"
    config.write_text(recipe(name, case, models))
    ours, theirs = folder / "ours", folder / "theirs"
    cache = folder / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(HERE.parents[1])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["NUMBA_CACHE_DIR"] = str(folder / "numba")
    command = [sys.executable, "-m", "surgeon", "merge", str(config), "-o", str(ours)]
    row = Row(name, "bfloat16, as mergekit")
    if not arguments.cold_code:  # compile once; with --cold-code every run pays for it
        start(command, environment, folder / "log.txt")
        shutil.rmtree(ours)
    for _ in range(arguments.repeat):
        if not arguments.keep_digests:
            shutil.rmtree(cache, ignore_errors=True)
        if arguments.cold_code:
            shutil.rmtree(folder / "numba", ignore_errors=True)
        shutil.rmtree(ours, ignore_errors=True)
        os.sync()
        row.ours.append(start(command, environment, folder / "log.txt"))
        os.sync()
        row.limit.append(limit_of(folder, case, models))
    if peer:
        # The random seed only matters where both draw; no tokenizer is there to be copied.
        other = [arguments.mergekit, str(config), str(theirs), "--lazy-unpickle", "--no-copy-tokenizer",
                 "--random-seed", "0"]  # fmt: skip
        while len(row.peer) < arguments.repeat:
            shutil.rmtree(theirs, ignore_errors=True)
            os.sync()
            row.peer.append(start(other, dict(os.environ), folder / "log.txt"))
            if row.peer[0].seconds > 60:  # once is enough where noise cannot matter
                break
        row.equality = {"class": case.equality, **compare(ours, theirs, models[0])}
        shutil.rmtree(theirs)
    shutil.rmtree(ours)
    return row


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| method | ours s | limit s | x limit | mergekit s | times faster | goal | ours MB (anonymous) "
        "| mergekit MB (anonymous) | differing | > 1 ulp | max ulp | L1 change, ours / theirs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours = statistics.median(p.seconds for p in row.ours)
        limit = statistics.median(t["total"] for t in row.limit)
        cells = [row.method, f"{ours:.2f}", f"{limit:.2f}", f"{ours / limit:.2f}"]
        memory = f"{max(p.peak_mb for p in row.ours):.0f} ({max(p.anonymous_mb for p in row.ours):.0f})"
        if row.peer:
            theirs = statistics.median(p.seconds for p in row.peer)
            cells += [f"{theirs:.1f}" + ("" if len(row.peer) > 1 else " (once)"), f"{theirs / ours:.1f}"]
            held = f"{max(p.peak_mb for p in row.peer):.0f} ({max(p.anonymous_mb for p in row.peer):.0f})"
            e = row.equality
            ratio = e["l1_change_ratio"]
            missing = e["tensors_missing_on_one_side"]
            equal = [
                f"{e['differing_share']:.2e}" + (f" and {len(missing)} tensors missing" if missing else ""),
                f"{e['more_than_1_ulp_share']:.2e}",
                str(e["max_ulp"]),
                "" if ratio is None else f"{ratio:.4f}",
            ]
        else:
            cells += ["not run", ""]
            held, equal = "", ["", "", "", ""]
        lines.append("| " + " | ".join([*cells, f"{CASES[row.method].goal:g}", memory, held, *equal]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
