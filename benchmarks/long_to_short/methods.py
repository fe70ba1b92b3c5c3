"""Every merge method on the trained long/short pair: accuracy, tokens, change against long. One command.

    python benchmarks/long_to_short/methods.py --output /tmp/l2s

Each row is a merge made by ``surgeon.merge`` with the command line's defaults, or with the stated
settings, then evaluated by ``surgeon eval`` on the same held-out questions. Activation-informed
methods read 100 training questions with short and long answers. Intervals are 95 %; differences from
``long`` are paired over the questions, and one whose interval holds 0 is no difference. Writes RESULTS.md
beside this file, report.html and pareto.svg into the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "models"
sys.path.insert(0, str(MODELS))

import task  # noqa: E402

MERGES: dict[str, dict] = {
    "average": {"method": "linear"},
    "task-arithmetic .7": {"method": "task-arithmetic", "lambda_": 0.7},
    "task-arithmetic .6": {"method": "task-arithmetic", "lambda_": 0.6},
    "task-arithmetic .5": {"method": "task-arithmetic", "lambda_": 0.5},
    "task-arithmetic .3": {"method": "task-arithmetic", "lambda_": 0.3},
    "ties .2": {"method": "ties", "density": (0.2,)},
    "ties .2 x .9": {"method": "ties", "density": (0.2,), "lambda_": 0.9},
    "ties .2 x .8": {"method": "ties", "density": (0.2,), "lambda_": 0.8},
    "ties .15": {"method": "ties", "density": (0.15,)},
    "ties .1": {"method": "ties", "density": (0.1,)},
    "dare-linear": {"method": "dare-linear"},
    "dare-ties": {"method": "dare-ties"},
    "della": {"method": "della"},
    "breadcrumbs": {"method": "breadcrumbs"},
    "dler .25 x .7": {"method": "dler", "density": (0.25,), "lambda_": 0.7},
    "dler .25 x .7, short onto long": {"method": "dler", "density": (0.25,), "lambda_": 0.7, "reverse": True},
    "slerp": {"method": "slerp"},
    "nuslerp": {"method": "nuslerp"},
    "karcher": {"method": "karcher"},
    "multislerp": {"method": "multislerp"},
    "arcee-fusion": {"method": "arcee-fusion"},
    "model-stock (+ ancestor)": {"method": "model-stock", "base": "ancestor"},
    "sce (+ ancestor)": {"method": "sce", "base": "ancestor"},
    "interpolate .5 (ReCUT, AdaR1)": {"method": "interpolate", "t": 0.5},
    "lore (long's part kept)": {"method": "lore", "weight": (1.0, 0.0)},
    "twin (rank .1)": {"method": "twin"},
    "twin (rank .3)": {"method": "twin", "delta_rank": 0.3},
    "aim-ties .4": {"method": "aim-ties", "density": (0.2,)},
    "aim-task-arithmetic .4": {"method": "aim-task-arithmetic"},
    "acm-task-arithmetic .7": {"method": "acm-task-arithmetic"},
    "acm-ties .7": {"method": "acm-ties", "density": (0.2,)},
    "sens": {"method": "sens"},
    "fim-ties": {"method": "fim-ties", "density": (0.2,)},
}


def write_questions(path: Path, count: int, seed: int) -> None:
    """Write held-out questions for ``surgeon eval``; the domain is the number of terms."""
    chosen = itertools.islice(task.questions("test", seed), count)
    lines = [{"question": q.text, "answer": q.answer, "domain": f"{len(q.terms)} terms"} for q in chosen]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_calibration(path: Path, count: int, seed: int) -> None:
    """Write training questions with a short and a long answer each."""
    rng = random.Random(f"calibration-{seed}")
    chosen = itertools.islice(task.questions("train", seed), count)
    lines = [
        {"question": q.text, "short": task.solve(q, task.STYLES["short"], rng),
         "long": task.solve(q, task.STYLES["long"], rng)}
        for q in chosen
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def merge_all(out: Path, chosen: dict[str, dict], calibration: Path) -> dict[str, tuple[Path, float]]:
    """Merge by every method; return label -> (folder, seconds)."""
    import surgeon

    long, short, ancestor = MODELS / "long", MODELS / "short", MODELS / "base"
    made = {}
    for number, (label, options) in enumerate(chosen.items()):
        options = dict(options)
        base, pair = options.pop("base", None), [long, short]
        if options.pop("reverse", False):
            pair.reverse()
        folder = out / "models" / f"{number:02d}"
        started = time.perf_counter()
        surgeon.merge(
            pair, output=folder, overwrite=True, base=str(ancestor) if base else None,
            calibration=(str(calibration),), samples=100, **options,
        )  # fmt: skip
        made[label] = (folder, time.perf_counter() - started)
        print(f"merged {label} in {made[label][1]:.1f} s", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=400, help="held-out questions (200 or more)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="comma list of labels, for a quick look")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    options = parser.parse_args()

    import surgeon.report
    from surgeon.evaluate.run import EvalRequest, evaluate

    out = options.output.absolute()
    shutil.rmtree(out, ignore_errors=True)
    (out / "models").mkdir(parents=True)
    questions, calibration = out / "questions.jsonl", out / "calibration.jsonl"
    write_questions(questions, options.questions, options.seed)
    write_calibration(calibration, 100, options.seed)
    chosen = {k: v for k, v in MERGES.items() if options.only is None or k in options.only.split(",")}
    made = merge_all(out, chosen, calibration)
    folders = {"long": (MODELS / "long", 0.0), "short": (MODELS / "short", 0.0)} | made

    results = []
    started = time.perf_counter()
    for label, (folder, seconds) in folders.items():
        request = EvalRequest(
            model=str(folder), questions=(str(questions),), match="numeric", max_new_tokens=448, seed=options.seed,
            baseline=str(out / "long.json") if results else None, samples_out=str(out / f"replies-{len(results):02d}.jsonl"),
        )  # fmt: skip
        result = evaluate(request)
        result["model"]["name"] = label
        result["merge_seconds"] = seconds
        if not results:
            (out / "long.json").write_text(json.dumps(result))
        results.append(result)
        accuracy, tokens = result["metrics"]["accuracy"], result["metrics"]["tokens_mean"]
        print(f"{label:<32} {accuracy['value']:.3f} @ {tokens['value']:.1f}", flush=True)
    print(f"evaluated in {time.perf_counter() - started:.0f} s")
    (out / "results.json").write_text(json.dumps(results, indent=2))
    title = "Long-to-short merging of the trained pair"
    surgeon.report.write(results, out / "report.html", title=title)
    surgeon.report.write(results, out / "pareto.svg", title=title)
    text = table(results, options)
    options.write.write_text(text)
    print(text)


def table(results: list[dict], options: argparse.Namespace) -> str:
    """Return RESULTS.md."""
    lines = [
        "# Long-to-short merging: every method on the trained pair",
        "",
        f"`python benchmarks/long_to_short/methods.py --output OUT --questions {options.questions} --seed {options.seed}`:",
        "`tests/models/long` onto `tests/models/short` (1.18 M parameters each), greedy answers to "
        f"{options.questions} held-out questions, at most 448 tokens. Brackets are 95 % intervals; changes are paired over",
        "the questions against `long`, and = marks those whose interval holds no change. The intervals are not corrected for",
        f"the number of rows: of {len(results) - 1} comparisons one or two are expected to miss by chance.",
        "",
        "| merge | accuracy | against long | mean tokens | against long | at the cap | accuracy per 1,000 tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        m = result["metrics"]
        paired = (result.get("baseline") or {}).get("paired") or {}
        lines.append(
            f"| {result['model']['name']} | {interval(m['accuracy'], 3)} | {change(paired.get('accuracy_difference'), 0.0)} "
            f"| {interval(m['tokens_mean'], 0)} | {change(paired.get('tokens_ratio'), 1.0)} "
            f"| {m['cap_rate']['value']:.1%} | {interval(m['intelligence_per_token'], 1)} |"
        )
    return "\n".join(lines) + "\n"


def interval(value: dict, digits: int) -> str:
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def change(value: dict | None, nothing: float) -> str:
    if not value:
        return "-"
    same = value["low"] <= nothing <= value["high"]
    shown = value["value"] - 1 if nothing else value["value"]
    return f"{shown:+.1%}" + (" =" if same else "")


if __name__ == "__main__":
    main()
