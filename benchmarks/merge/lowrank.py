"""What low-rank work on weight matrices costs on one core, and what that makes for a 7B model.

Each matrix is a difference as fine-tuning leaves it: noise in all directions on a decaying spectrum,
float32. Measured are the steps of ``--delta-rank`` (Gram matrix, directions by LAPACK or by the
certified iteration, projection), of LoRE-Merging of two models (Gram matrix, soft threshold,
product), and NumPy's full SVD for comparison.

    OMP_NUM_THREADS=1 python benchmarks/merge/lowrank.py [--rank 0.1] [--no-svd] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from surgeon.kernels import lowrank
from surgeon.kernels.blas import one_thread
from surgeon.merge.delta_view import PANEL_ELEMENTS

SHAPES = {"3584 x 3584": (3584, 3584), "18944 x 3584": (18944, 3584)}
QWEN_7B = {(3584, 3584): 2 * 28, (18944, 3584): 3 * 28, (512, 3584): 2 * 28, (152064, 3584): 2}
"""Matrices of a Qwen2.5-7B: q and o, gate/up/down (wide ones cost what tall ones do), k and v, embedding and head."""


def difference(rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((rows, columns), dtype=np.float32)
    strength = np.arange(1, columns + 1, dtype=np.float32) ** -0.3
    turn = np.linalg.qr(rng.standard_normal((columns, columns), dtype=np.float32))[0]
    return (noise * strength) @ turn * np.float32(1e-3)


def timed(work):
    started = time.process_time()  # of this thread alone: others may be busy on the machine
    result = work()
    return time.process_time() - started, result


def gram_of(matrix: np.ndarray) -> np.ndarray:
    total = lowrank.GramSum(matrix.shape[1])
    step = PANEL_ELEMENTS // matrix.shape[1]
    for first in range(0, len(matrix), step):
        total.add(matrix[first : first + step].astype(np.float64))
    return total.matrix()


def projected(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    narrow = np.ascontiguousarray(vectors.T.astype(np.float32))
    return np.concatenate(
        [(part @ narrow.T) @ narrow for part in np.array_split(matrix, max(1, len(matrix) // 64))]
    )


def measure(rows: int, columns: int, share: float, svd: bool) -> dict[str, float | str]:
    matrix = difference(rows, columns)
    rank = int(share * columns)
    found: dict[str, float | str] = {}
    found["gram"], gram = timed(lambda: gram_of(matrix))
    found["lapack"], exact = timed(lambda: lowrank.leading(gram, rank, method="lapack"))
    found["iteration"], fast = timed(lambda: lowrank.leading(gram, rank, method="subspace"))
    found["path"], found["rounds"] = fast.path, fast.rounds
    left = exact.total - float(exact.values.sum())
    found["missed, proven"] = fast.missed / left
    found["missed, true"] = float(exact.values.sum() - np.square(matrix @ fast.vectors).sum()) / left
    found["energy kept"] = exact.energy_kept
    found["project"], cut = timed(lambda: projected(matrix, fast.vectors))
    middle = float(np.sqrt(np.median(exact.values)))
    found["soft threshold"], (factor, _) = timed(lambda: lowrank.shrinkage(gram, middle))
    assert factor is not None
    narrow = factor.astype(np.float32)
    found["product"], _ = timed(
        lambda: [p @ narrow for p in np.array_split(matrix, max(1, len(matrix) // 256))]
    )
    if svd:
        found["full svd"], (u, s, vt) = timed(lambda: np.linalg.svd(matrix, full_matrices=False))
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found["error / optimum"] = float(np.linalg.norm(matrix - cut) / np.linalg.norm(matrix - best))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=float, default=0.1, help="share of the directions kept")
    parser.add_argument("--no-svd", action="store_true", help="leave out the full SVD")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the matrices, to try the script")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: dict[str, dict[str, float | str]] = {}
    with one_thread():
        for name, (m, n) in SHAPES.items():
            size = int(m * options.scale), int(n * options.scale)
            rows[name] = measure(*size, options.rank, not options.no_svd)
    square, tall = rows.values()

    def model(*steps: str) -> float:
        """Return hours for all matrices: what depends on rows scales with them, the rest with the side cubed."""
        seconds = 0.0
        for (m, n), count in QWEN_7B.items():
            side = min(m, n)
            for step in steps:
                if step in {"gram", "project", "product"}:
                    other = max(m, n) / 18944 * (side / 3584) ** 2
                    seconds += count * other * float(tall[step])
                else:
                    seconds += count * (side / 3584) ** 3 * float(square[step])
        return seconds / 3600

    hours = {
        "delta-rank, iteration": model("gram", "iteration", "project"),
        "delta-rank, LAPACK": model("gram", "lapack", "project"),
        "lore, two models": model("gram", "soft threshold", "product"),
    }
    if options.json:
        print(json.dumps({"matrices": rows, "hours": hours}, indent=2))
        return
    print(f"rank {options.rank:g}, one core; seconds\n")
    for key in square:
        cells = [f"{r[key]:.3g}" if isinstance(r[key], float) else str(r[key]) for r in rows.values()]
        print(f"{key:18}" + "".join(f"{c:>16}" for c in cells))
    print("\n7B model on one core, arithmetic only (hours)")
    for name, value in hours.items():
        print(f"{name:24}{value:8.2f}")


if __name__ == "__main__":
    main()
