"""Loss at equal measured speedup on a small decoder: ``python benchmarks/pruning/decoders/compare.py PARENT --output OUT``.

PARENT is what ``train.py`` made. Every method prunes it to the same requested speedups through
``surgeon.prune`` with one latency table, one calibration text (blocks of the training text) and one thread; the
speedup in the table below is that of the saved and reloaded model, timed in turns with the parent. The loss
(nats per token) is that of held-out files the parent never saw, with a 95 % bootstrap interval over blocks of
the difference to the parent.

With ``--gradual`` the family is also made gradually with distillation, and compared with its one-shot members
and with small dense models of the same sizes, trained from scratch for the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import surgeon
from surgeon.deploy.build import load

METHODS = {
    "ziplm, per layer": {"method": "ziplm", "layout": "per-layer"},
    "ziplm, per layer, sequential": {"method": "ziplm", "layout": "per-layer", "sequential": True},
    "ziplm, uniform": {"method": "ziplm"},
    "width: flap": {"method": "width", "criterion": "flap"},
    "width: magnitude": {"method": "width", "criterion": "magnitude"},
    "width: random": {"method": "width", "criterion": "random"},
    "depth: nmse": {"method": "depth", "criterion": "nmse"},
    "depth: block influence": {"method": "depth", "criterion": "block_influence"},
    "depth: uniform": {"method": "depth", "criterion": "uniform"},
}


def calibration(parent: Path, output: Path, blocks: int = 288) -> Path:
    """Write blocks of the training text as JSONL."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(parent)
    tokens = np.load(parent / "tokens.npz")["train"][:blocks]
    file = output / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in tokens))
    return file


def losses(folder: Path, held_out: np.ndarray) -> np.ndarray:
    """Return the mean loss of every block, nats per token."""
    model = load(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for start in range(0, len(held_out), 16):
            ids = torch.from_numpy(held_out[start : start + 16].astype(np.int64))
            logits = model(ids).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            found.append(each.mean(1).double().numpy())
    return np.concatenate(found)


def difference(values: np.ndarray, parent: np.ndarray) -> tuple[float, float, float]:
    """Return the mean difference and its 95 % bootstrap interval over blocks."""
    gaps = values - parent
    draws = np.random.default_rng(0).integers(len(gaps), size=(4000, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(1), [2.5, 97.5])
    return float(gaps.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parent", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--speedups", default="1.5,2,3")
    parser.add_argument("--blocks", type=int, default=200, help="held-out blocks")
    parser.add_argument("--only", help="methods whose name contains this")
    parser.add_argument("--gradual", type=int, metavar="STEPS", help="also distil, so many steps a member")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    targets = tuple(float(part) for part in options.speedups.split(","))
    text = calibration(options.parent, output)
    held_out = np.load(options.parent / "tokens.npz")["held_out"][: options.blocks]
    parent = losses(options.parent, held_out)
    common = {
        "calibration": (str(text),), "samples": 256, "sequence_length": 256, "threads": 1, "mode": "prefill", "context": 256,
        "batch": 4, "round_to": 32, "search_budget": 3.0,
    }  # fmt: skip
    tables = output / "work" / "ziplm, uniform" / "prune"  # its run measures the table for all
    # An interrupted comparison goes on: methods whose rows are complete are not run again.
    kept = output / "rows.json"
    known = json.loads(kept.read_text()) if kept.is_file() else []
    rows = []
    order = sorted(METHODS, key=lambda name: name != "ziplm, uniform")
    for name in order:
        if options.only and options.only not in name and name != "ziplm, uniform":
            continue
        done = [row for row in known if row["method"] == name and row["target"] in targets]
        if len(done) == len(targets):
            rows += done
            continue
        rows += run(name, METHODS[name], options.parent, output, targets, common, tables, held_out, parent)
        write(output, rows, parent, options)
    if options.gradual:
        rows += gradual(options, output, targets, common, tables, held_out, parent)
        write(output, rows, parent, options)


def run(name, method, parent_folder, output, targets, common, tables, held_out, parent):
    """Prune with one method to all targets; return one row each."""
    (output / "models" / name).mkdir(parents=True, exist_ok=True)
    given = {**common, **method, "work": str(output / "work" / name)}
    found = sorted(tables.glob("table-*.json"))
    if found:
        given["latency_table"] = str(found[0])
        given["table_anyway"] = True
    if method["method"] == "depth":
        given.pop("round_to"), given.pop("search_budget")
    if method["method"] == "width":
        given.pop("search_budget")
    rows = []
    for target in targets:
        started = time.perf_counter()
        try:
            made = surgeon.prune(
                parent_folder,
                output / "models" / name / f"{target:g}",
                target_speedup=target,
                overwrite=True,
                **given,
            )
        except surgeon.SurgeonError as error:
            rows.append({"method": name, "target": target, "refused": str(error)})
            print(name, target, "refused:", error, flush=True)
            continue
        member = made["members"][0]
        values = losses(Path(member["path"]), held_out)
        gap, low, high = difference(values, parent)
        speed = member["speedup"]
        rows.append({
            "method": name, "target": target, "measured": speed["measured"], "low": speed["low"], "high": speed["high"],
            "loss": float(values.mean()), "gap": gap, "gap_low": low, "gap_high": high,
            "parameters": member["parameters"], "shape": member["shape"], "seconds": time.perf_counter() - started,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def gradual(options, output, targets, common, tables, held_out, parent):
    """Distil a family member by member, and train small dense models of the same sizes."""
    (output / "models").mkdir(parents=True, exist_ok=True)
    (found,) = tables.glob("table-*.json")
    given = {
        **common,
        "latency_table": str(found),
        "table_anyway": True,
        "work": str(output / "work" / "gradual"),
    }
    made = surgeon.prune(
        options.parent, output / "models" / "gradual", target_speedup=targets, overwrite=True, distill=True, structures=("heads", "ffn"),
        distill_steps=options.gradual, distill_batch=4, distill_length=256, learning_rate=5e-4, **given,
    )  # fmt: skip
    rows = []
    for number, (target, member) in enumerate(zip(targets, made["members"], strict=True), start=1):
        values = losses(Path(member["path"]), held_out)
        gap, low, high = difference(values, parent)
        speed = member["speedup"]
        rows.append({
            "method": f"ziplm, gradual ({number} x {options.gradual} steps)", "target": target, "measured": speed["measured"],
            "low": speed["low"], "high": speed["high"], "loss": float(values.mean()), "gap": gap, "gap_low": low,
            "gap_high": high, "parameters": member["parameters"], "shape": member["shape"],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        config = json.loads((Path(member["path"]) / "config.json").read_text())
        folder = output / "models" / "dense" / f"{target:g}"
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("train.py")), str(folder), "--ffn", str(config["intermediate_size"]),
             "--heads", str(config["num_attention_heads"]), "--kv-heads", str(config["num_key_value_heads"]),
             "--layers", str(config["num_hidden_layers"]), "--steps", str(number * options.gradual)], check=True,
        )  # fmt: skip
        values = losses(folder, held_out)
        gap, low, high = difference(values, parent)
        rows.append({
            "method": f"small dense from scratch ({number * options.gradual} steps)", "target": target, "measured": speed["measured"],
            "low": speed["low"], "high": speed["high"], "loss": float(values.mean()), "gap": gap, "gap_low": low,
            "gap_high": high, "parameters": member["parameters"], "shape": member["shape"],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def write(output: Path, rows: list[dict], parent: np.ndarray, options: argparse.Namespace) -> None:
    """Write the table, the best of each speedup first."""
    (output / "rows.json").write_text(json.dumps(rows, indent=1))
    training = json.loads((options.parent / "training.json").read_text())
    recipe = training["recipe"]
    lines = [
        "# Pruning a small decoder: loss at equal measured speedup", "",
        "`python benchmarks/pruning/decoders/train.py PARENT`, then `python benchmarks/pruning/decoders/compare.py PARENT --output OUT`.",
        f"The parent: {training['parameters']:,} parameters ({recipe['layers']} layers, hidden {recipe['hidden']}, {recipe['heads']} heads / "
        f"{recipe['kv_heads']} kv, FFN {recipe['ffn']}), trained on {training['tokens']['seen']:,} tokens of the Python standard library's sources;",
        f"loss {parent.mean():.3f} nats a token on {len(parent)} held-out blocks of 256 (unigram {training['loss_unigram']:.2f}).",
        "Speedups: prefill of 256 tokens, batch 4, one thread, CPU time, paired, saved and reloaded. Brackets: 95 % intervals.", "",
    ]  # fmt: skip
    for target in sorted({row["target"] for row in rows}):
        lines += [
            f"## {target:g}x requested",
            "",
            "| method | measured | loss | above the parent | parameters | shape |",
            "|---|--:|--:|--:|--:|---|",
        ]
        own = [row for row in rows if row["target"] == target]
        for row in sorted(own, key=lambda row: row.get("loss", math.inf)):
            if "refused" in row:
                lines.append(f"| {row['method']} | - | - | - | - | {row['refused']} |")
                continue
            lines.append(
                f"| {row['method']} | {row['measured']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {row['loss']:.3f} | "
                f"+{row['gap']:.3f} [{row['gap_low']:.3f}, {row['gap_high']:.3f}] | {row['parameters']:,} | {row['shape']} |"
            )
        lines.append("")
    (output / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
