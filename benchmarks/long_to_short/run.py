"""Merge the trained long and short reasoners, verify, measure: one command, one table.

    python benchmarks/long_to_short/run.py --output demo-output

Runs the command line as a user would: a TIES merge of ``tests/models/long`` onto
``tests/models/short``, ``surgeon verify --load --generate``, and a sweep over density from one
read of the inputs. Then every model answers the same held-out questions; the table gives
accuracy with a 95 % Wilson interval and the mean length of an answer in tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "models"


def surgeon(*arguments: object) -> None:
    """Run one surgeon command and show it."""
    words = [str(a) for a in arguments]
    print(f"\n$ surgeon {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "surgeon", *words], check=True)


def pareto(rows: list[dict]) -> set[str]:
    """Return the models no other model beats in both accuracy and length."""
    front = set()
    for row in rows:
        beaten = any(
            other["accuracy"] >= row["accuracy"]
            and other["mean_tokens"] <= row["mean_tokens"]
            and (other["accuracy"], -other["mean_tokens"]) != (row["accuracy"], -row["mean_tokens"])
            for other in rows
        )
        if not beaten:
            front.add(row["name"])
    return front


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--sweep", default="density=0.05,0.1,0.125,0.15,0.2,0.3")
    parser.add_argument(
        "--seed", type=int, default=1, help="which held-out questions; training was looked at with 0"
    )
    options = parser.parse_args()
    out = options.output
    out.mkdir(parents=True, exist_ok=True)
    long, short = MODELS / "long", MODELS / "short"

    surgeon("merge", long, short, "--method", "ties", "-o", out / "merged", "--overwrite")
    surgeon("verify", out / "merged", "--load", "--generate")
    surgeon(
        "merge", long, short, "--method", "ties", "--sweep", options.sweep, "-o", out / "sweep", "--overwrite"
    )

    sys.path.insert(0, str(MODELS))
    import evaluate
    from transformers.utils import logging

    logging.disable_progress_bar()

    points = sorted((out / "sweep").glob("density=*"), key=lambda p: float(p.name.partition("=")[2]))
    names = {
        "long": long,
        "short": short,
        "base (their ancestor)": MODELS / "base",
        "merged (density 0.2)": out / "merged",
    }
    names |= {f"sweep {p.name}": p for p in points}
    print(f"\nanswering {options.questions} held-out questions with {len(names)} models ...", flush=True)
    rows = []
    for name, folder in names.items():
        report = evaluate.evaluate(folder, questions=options.questions, seed=options.seed, batch_size=200)
        rows.append({"name": name, "accuracy": report.accuracy, "low": report.low, "high": report.high,
                     "mean_tokens": report.mean_tokens})  # fmt: skip
    front = pareto(rows)
    base = rows[0]
    print(f"\n{'model':<24}{'accuracy (95 % interval)':>26}{'mean tokens':>13}{'against long':>14}  Pareto")
    for row in rows:
        interval = f"{row['accuracy']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
        change = row["mean_tokens"] / base["mean_tokens"] - 1
        mark = "*" if row["name"] in front else ""
        print(f"{row['name']:<24}{interval:>26}{row['mean_tokens']:>13.1f}{change:>+13.0%}  {mark}")
    (out / "result.json").write_text(
        json.dumps({"questions": options.questions, "rows": rows}, indent=2) + "\n"
    )
    print(
        f"\n* = on the Pareto front (no model is both more accurate and shorter). Data: {out / 'result.json'}"
    )


if __name__ == "__main__":
    main()
