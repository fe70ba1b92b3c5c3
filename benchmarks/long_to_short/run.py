"""Merge the trained long and short reasoners, verify, measure: one command, one table, one page.

    python benchmarks/long_to_short/run.py --output demo-output

Runs the command line as a user would: a TIES merge of ``tests/models/long`` onto
``tests/models/short``, ``surgeon verify --load --generate``, the same merge with AIM on calibration
text, and a sweep over density from one read of the inputs. A recipe merges, prunes and quantizes, and publishes
what passes its gates. Then ``surgeon eval`` puts the same held-out questions to every model, and ``surgeon report``
makes the table and the page. `methods.py` does the merges for every method.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from methods import MODELS, ROOT, write_calibration, write_questions


def surgeon(*arguments: object) -> None:
    """Run one surgeon command and show it."""
    words = [str(a) for a in arguments]
    print(f"\n$ surgeon {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "surgeon", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--sweep", default="density=0.05,0.1,0.15,0.3")
    parser.add_argument(
        "--seed", type=int, default=1, help="which held-out questions; training was looked at with 0"
    )
    options = parser.parse_args()
    out = options.output
    out.mkdir(parents=True, exist_ok=True)
    long, short = MODELS / "long", MODELS / "short"
    questions, calibration = out / "questions.jsonl", out / "calibration.jsonl"
    write_questions(questions, options.questions, options.seed)
    write_calibration(calibration, 100, options.seed)

    surgeon("merge", long, short, "--method", "ties", "-o", out / "merged", "--overwrite")
    surgeon("verify", out / "merged", "--load", "--generate")
    surgeon(
        "merge",
        long,
        short,
        "--method",
        "aim-ties",
        "--calibration",
        calibration,
        "-o",
        out / "merged-aim",
        "--overwrite",
    )
    surgeon(
        "merge", long, short, "--method", "ties", "--sweep", options.sweep, "-o", out / "sweep", "--overwrite"
    )
    recipe = ROOT / "recipes" / "pipelines" / "merge-prune-quantize.yaml"
    surgeon(
        "run", recipe, "-o", out / "small", "--set", f"models.long={long}", "--set", f"models.short={short}"
    )
    surgeon("verify", out / "small", "--load", "--generate")
    points = sorted((out / "sweep").glob("density=*"), key=lambda p: float(p.name.partition("=")[2]))
    results = []
    for folder in (long, short, MODELS / "base", out / "merged", out / "merged-aim", *points, out / "small"):
        result = out / f"{folder.name}.json"
        baseline = ["--baseline", out / "long.json"] if results else []
        quiet = ["--quiet"] if results else []
        surgeon("eval", folder, "--questions", questions, "--max-new-tokens", 448, *baseline, "-o", result, "--overwrite",
                *quiet)  # fmt: skip
        results.append(result)
    surgeon("report", *results, "-o", out / "report.html", "--title", "Long to short on small trained models")
    surgeon("report", *results, "--format", "markdown")
    print(f"\nThe page with the plot: {out / 'report.html'}; the run: {out / 'small.work' / 'report.html'}")


if __name__ == "__main__":
    main()
