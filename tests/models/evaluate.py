"""Accuracy and answer length: ``python tests/models/evaluate.py MODEL... --questions 200``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import task


@dataclass(frozen=True)
class Report:
    """What one model does on the held-out questions."""

    model: str
    questions: int
    accuracy: float
    low: float
    high: float
    mean_tokens: float
    median_tokens: float
    capped: float
    seconds: float


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % by default."""
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def load(folder: str | Path, dtype: torch.dtype = torch.float32):
    """Model and tokenizer of a folder; any key that does not fit is an error."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise ValueError(f"{folder} does not load cleanly: {problems}")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def generate(model, tokenizer, prompts: list[str], cap: int, batch_size: int) -> list[tuple[str, int, bool]]:
    """Greedy replies as (text, generated tokens, whether the cap was hit)."""
    replies = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            prompts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=False,
            max_new_tokens=cap,
        )
        for row in output[:, inputs.input_ids.shape[1] :].tolist():
            finished = tokenizer.eos_token_id in row
            length = row.index(tokenizer.eos_token_id) + 1 if finished else cap
            text = tokenizer.decode(row[:length], skip_special_tokens=True)
            replies.append((text, length, not finished))
    return replies


def evaluate(
    folder: str | Path,
    questions: int = 200,
    seed: int = 0,
    terms: tuple[int, int] = task.TERMS,
    cap: int = 448,
    batch_size: int = 100,
) -> Report:
    """Solve held-out questions greedily and summarise accuracy and length."""
    started = time.time()
    model, tokenizer = load(folder)
    chosen = list(itertools.islice(task.questions("test", seed, terms), questions))
    prompts = [task.prompt(tokenizer, question) for question in chosen]
    replies = generate(model, tokenizer, prompts, cap, batch_size)
    hits = sum(q.is_solved_by(text) for q, (text, _, _) in zip(chosen, replies, strict=True))
    lengths = [length for _, length, _ in replies]
    low, high = wilson(hits, questions)
    return Report(
        model=str(folder),
        questions=questions,
        accuracy=hits / questions,
        low=low,
        high=high,
        mean_tokens=statistics.fmean(lengths),
        median_tokens=statistics.median(lengths),
        capped=sum(capped for _, _, capped in replies) / questions,
        seconds=time.time() - started,
    )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions")
    parser.add_argument(
        "--terms", type=int, nargs=2, default=task.TERMS, metavar=("MIN", "MAX"), help="difficulty"
    )
    parser.add_argument("--cap", type=int, default=448, help="most tokens of one answer")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    reports = []
    if not arguments.json:
        print(f"{'accuracy':>8}  {'95 % interval':>15}  {'mean':>6}  {'median':>6}  {'capped':>6}  model")
    for folder in arguments.models:
        report = evaluate(folder, arguments.questions, arguments.seed, tuple(arguments.terms), arguments.cap)
        reports.append(asdict(report))
        if not arguments.json:
            interval = f"{report.low:.3f} - {report.high:.3f}"
            print(
                f"{report.accuracy:8.3f}  {interval:>15}  {report.mean_tokens:6.1f}  "
                f"{report.median_tokens:6.1f}  {report.capped:6.3f}  {report.model}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(reports, indent=2))


if __name__ == "__main__":
    main()
