"""How long does it take to put the columns of an output matrix in order?

    python benchmarks/pruning/cost_order.py [--columns 4096] [--rows 1024 4096] [--threads N] [--prefix 256]

`surgeon.prune.obs.removal_order` against in-place rank-1 updates of W and the inverse Hessian, one column
a step, both float32 and in the same process, in turns. A step of the plain way costs the same from the first
column to the last, so it is timed over the first steps and multiplied; ours is timed over all columns, with
everything it does: inversion, undamped errors, comparison with the closed form. That both find the same order
is checked on those steps, and on every column of a smaller matrix.

Writes RESULTS-order.md beside this file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "prune"))
import naive_obs

from surgeon.prune.closed_form import error_of, solve
from surgeon.prune.obs import removal_order

OUT = Path(__file__).resolve().parent / "RESULTS-order.md"
DAMP = 1e-2
ROUNDS = 3
WHOLE = 1024


def problem(columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W, H), float32: inputs of half rank plus noise, channels of very different sizes."""
    draw = torch.Generator().manual_seed(columns + rows)
    tokens = 2 * columns
    mixing = torch.randn(columns // 2, columns, generator=draw) / (columns // 2) ** 0.5
    x = torch.randn(tokens, columns // 2, generator=draw) @ mixing
    x += 0.3 * torch.randn(tokens, columns, generator=draw)
    x *= torch.exp(0.7 * torch.randn(columns, generator=draw))
    return torch.randn(rows, columns, generator=draw), x.T @ x / tokens


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def _clock(marks: list[float]):
    return lambda *_: marks.append(now())


def compare(columns: int, rows: int, prefix: int) -> dict[str, object]:
    """Time both in turns; return seconds for all columns, and where the orders part."""
    weight, hessian = problem(columns, rows)
    ours, plain = [], []
    found = order = None
    for _ in range(ROUNDS):
        marks: list[float] = []
        order, _ = naive_obs.remove(weight, hessian, DAMP, prefix, _clock(marks))
        # The inversion before the first step is left out of the plain way's time, which favours it.
        plain.append((marks[-1] - marks[0]) / (prefix - 1) * columns)
        start = now()
        found = removal_order(weight, hessian, damp=DAMP)
        ours.append(now() - start)
    assert found is not None and order is not None
    return {
        "columns": columns,
        "rows": rows,
        "plain": statistics.median(plain),
        "ours": statistics.median(ours),
        "ratio": statistics.median(p / o for p, o in zip(plain, ours, strict=True)),
        "spread": (min(p / o for p, o in zip(plain, ours, strict=True)),
                   max(p / o for p, o in zip(plain, ours, strict=True))),
        "parted": parted(order, found.order),
        "prefix": prefix,
        "checks": found.checks,
        "precision": found.precision,
    }  # fmt: skip


def parted(first: list[int], second: np.ndarray) -> int | None:
    """Return the first step at which two orders differ, None where they do not."""
    return next(
        (step for step, (a, b) in enumerate(zip(first, second.tolist(), strict=False)) if a != b), None
    )


def whole() -> dict[str, object]:
    """Compare all steps of a smaller matrix with the plain way in float64."""
    weight, hessian = problem(WHOLE, 512)
    order, _ = naive_obs.remove(weight.double(), hessian.double(), DAMP, WHOLE)
    found = removal_order(weight, hessian, damp=DAMP, precision="float32")
    worst = 0.0
    for removed in range(64, WHOLE, 64):
        errors = []
        for one in (np.array(order), found.order):
            kept = np.sort(one[removed:])
            errors.append(error_of(weight, hessian, solve(weight, hessian, kept, DAMP), kept))
        worst = max(worst, abs(errors[1] / errors[0] - 1))
    return {"parted": parted(order, found.order), "worst": worst}


def said(step: object, steps: int) -> str:
    return f"all {steps} equal" if step is None else f"equal up to step {step} of {steps}"


def now() -> float:
    """Return seconds: of this thread's own CPU time with one thread, which other programs do not enter, else the wall clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def report(results: list[dict], small: dict, threads: int) -> str:
    lines = [
        "# Order of removal: lazy block updates against rank-1 updates",
        "",
        f"`python benchmarks/pruning/cost_order.py`, {processor()}, {threads} thread(s) ({'its CPU time' if threads == 1 else 'wall clock'}), torch {torch.__version__}, "
        f"float32, damping {DAMP:g}, {ROUNDS} rounds in turns, medians.",
        "",
        "| columns | rows | rank-1 updates, s | surgeon, s | ratio (least - most) | order of the first steps |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        low, high = one["spread"]
        lines.append(
            f"| {one['columns']} | {one['rows']} | {one['plain']:.1f} | {one['ours']:.2f} | "
            f"**{one['ratio']:.1f}** ({low:.1f} - {high:.1f}) | {said(one['parted'], one['prefix'])} |"
        )
    lines += [
        "",
        f"Rank-1 updates are timed over their first {results[0]['prefix']} steps and multiplied: every step costs the "
        "same. Their inversion is left out; ours, the undamped error of every level and the comparison with the closed "
        "form are counted.",
        "",
        "Tracked error against the closed form (float64 solve), after so many removals:",
        "",
        "| columns x rows | removed | tracked | closed form |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {one['columns']} x {one['rows']} | {removed} | {tracked:.6f} | {exact:.6f} |"
        for one in results
        for removed, tracked, exact in one["checks"]
    ]
    lines += [
        "",
        f"All steps of a {WHOLE} x 512 matrix, ours in float32 against rank-1 updates in float64: "
        f"{said(small['parted'], WHOLE)}; errors of the kept sets, each solved again, differ by {small['worst']:.1e} at most.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results = [compare(chosen.columns, rows, chosen.prefix) for rows in chosen.rows]
    text = report(results, whole(), chosen.threads)
    chosen.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
