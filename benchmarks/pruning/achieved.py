"""Asked for a speedup, got which? Latency tables and feedback, on models of random weights.

    python benchmarks/pruning/achieved.py [--shape NAME] [--workload prefill|decode] [--threads 1] [--json FILE]

For every shape and workload: the latency table is measured once; for every target and kind of plan, a
plan that meets the target by the table is built, saved, loaded from disk and timed in pairs with the
dense model; the table is corrected by what was measured and a new plan chosen, until the interval
meets +-3 % of the target. Weights are random: shapes alone decide about time.

Writes ACHIEVED.md beside this file when it ran every shape, workload, kind and target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import per_layer
from surgeon.errors import SurgeonError
from surgeon.measure.compare import Measured, speedup, verdict
from surgeon.measure.conditions import Conditions
from surgeon.measure.correction import aim, fit_correction
from surgeon.measure.differencing import Levels, measure_table
from surgeon.measure.models import random_model
from surgeon.measure.table import LatencyTable
from surgeon.measure.workload import Workload
from surgeon.structure.config import pruned_config
from surgeon.structure.cut import Cut, LayerCut, LayerShape
from surgeon.structure.find import structure_of
from surgeon.structure.parts import Structure

COMMON = {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "hidden_act": "silu", "dtype": "float32"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-12x256": {
        **COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "qwen2-6x512": {
        **COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
WORKLOADS = {"prefill": Workload("prefill", 1, 256), "decode": Workload("decode", 1, 256, 64)}
TARGETS = (1.3, 1.5, 2.0, 3.0)
STEP = 32
ROUNDS = 4
PAGE = Path(__file__).resolve().parent / "ACHIEVED.md"
HEADING = """# Speedup asked for, speedup measured

`python benchmarks/pruning/achieved.py`: {machine}, {threads} thread(s), float32, random weights. "first try" is the model chosen by the
latency table alone and "error" its distance from what the table predicted; "achieved" is the model after at most four rounds of feedback,
saved, loaded and timed in pairs with the dense one. "met": the 95 % interval meets ±3 % of what was asked.

"""
NEAR = 0.003
"""Plans this near to the target by the table are taken for equally good; one of them is drawn."""


class Bench:
    """One shape under one workload."""

    def __init__(
        self, config: dict[str, Any], workload: Workload, conditions: Conditions, work: Path
    ) -> None:
        self.config, self.workload, self.conditions, self.work = config, workload, conditions, work
        self.dense = work / "dense"
        self.save(config, self.dense)
        checkpoint = open_path(self.dense, "dense")
        self.structure: Structure = structure_of(checkpoint)
        checkpoint.close()
        self.full = self.structure.shape(0)
        began = time.monotonic()
        levels = Levels.of(self.structure, multiple=STEP)
        self.table = measure_table(config, self.structure, workload, levels, conditions)
        self.table_seconds = time.monotonic() - began

    def save(self, config: dict[str, Any], folder: Path) -> None:
        """Write a model of random weights as a user would find it on disk."""
        model: Any = random_model(config, torch.float32, self.conditions)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        model.save_pretrained(folder)
        if per_layer.is_per_layer(config):
            finished, companions = per_layer.finish(config)
            (folder / "config.json").write_text(json.dumps(finished))
            for name, content in companions:
                (folder / name).write_bytes(content)

    def uniform(self) -> Iterator[list[LayerShape]]:
        """All plans with equal layers: key/value groups, FFN width, number of layers."""
        each = self.full.heads // self.full.groups
        groups = range(1, self.full.groups + 1)
        widths = range(STEP, self.full.ffn + 1, STEP)
        for g, w, layers in itertools.product(groups, widths, range(2, self.structure.layers + 1)):
            yield [LayerShape(g * each, g, self.full.head_dim, w)] * layers

    def mixed(self, table: LatencyTable, target: float, rng: random.Random) -> Iterator[list[LayerShape]]:
        """Plans whose layers differ: random modules shrink until the table says that the target is met."""
        each = self.full.heads // self.full.groups
        for _ in range(150):
            plan = [self.full] * self.structure.layers
            while table.speedup(plan) < target:
                at = rng.randrange(len(plan))
                old = plan[at]
                if rng.random() < 0.5:
                    groups = rng.randrange(old.groups + 1)
                    plan[at] = LayerShape(groups * each, groups, self.full.head_dim if groups else 0, old.ffn)
                else:
                    plan[at] = LayerShape(
                        old.heads, old.groups, old.head_dim, STEP * rng.randrange(old.ffn // STEP + 1)
                    )
            yield plan

    def choose(self, kind: str, table: LatencyTable, target: float, rng: random.Random) -> list[LayerShape]:
        """Return a plan that meets a target by the table."""
        smallest = LayerShape(self.full.heads // self.full.groups, 1, self.full.head_dim, STEP)
        table.require(target, smallest)
        plans = list(self.uniform() if kind == "uniform" else self.mixed(table, target, rng))
        misses = [abs(table.speedup(plan) / target - 1) for plan in plans]
        near = [plan for plan, miss in zip(plans, misses, strict=True) if miss <= max(NEAR, min(misses))]
        return rng.choice(near)

    def cut(self, plan: Sequence[LayerShape]) -> Cut:
        """Return a cut of the source with these shapes; which units stay does not matter to time."""
        layers = [
            LayerCut(tuple(range(shape.heads)), tuple(range(shape.ffn))) for shape in plan
        ]  # whole groups come first
        return Cut((*layers, *([None] * (self.structure.layers - len(plan)))))

    def timed(self, plan: Sequence[LayerShape]) -> Measured:
        """Build, save, load and time a plan."""
        folder = self.work / "pruned"
        self.save(pruned_config(self.config, self.structure, self.cut(plan)), folder)
        return speedup(self.dense, folder, self.workload, self.conditions)

    def row(self, kind: str, target: float, seed: int) -> dict[str, Any]:
        """Meet one target by feedback."""
        rng = random.Random(seed)
        table, history, tried = self.table, [], []
        for _ in range(ROUNDS):
            plan = self.choose(kind, table, aim(table, history, target), rng)
            found = self.timed(plan)
            tried.append(
                {"predicted": table.speedup(plan), "by_the_measured_table": self.table.speedup(plan), "ratio": found.ratio,
                 "uncertainty": self.table.uncertainty(plan), "low": found.low, "high": found.high, "pairs": found.pairs,
                 "verdict": verdict(found, target), "plan": _words(plan)}
            )  # fmt: skip
            if tried[-1]["verdict"] in ("met", "not measurable"):
                break
            history.append((plan, found.ratio))
            table = self.table.corrected(**fit_correction(self.table, history))
        return {"kind": kind, "target": target, "tried": tried}


def _words(plan: Sequence[LayerShape]) -> str:
    if len(set(plan)) == 1:
        return f"{len(plan)} layers of {plan[0].heads}/{plan[0].groups} heads, ffn {plan[0].ffn}"
    return ", ".join(f"{s.heads}/{s.groups}+{s.ffn}" for s in plan)


def main() -> None:
    """Print one Markdown row for each target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--kind", choices=("uniform", "per-layer"), action="append")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    conditions = Conditions(threads=given.threads, dtype="float32", time_limit=given.time_limit)
    rows = []
    lines = [
        "| shape | workload | plan | asked | first try | error | rounds | achieved | 95 % | verdict |",
        "|---|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    print("\n".join(lines), flush=True)

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    for shape, workload in itertools.product(given.shape or SHAPES, given.workload or WORKLOADS):
        with tempfile.TemporaryDirectory() as place:
            bench = Bench(SHAPES[shape], WORKLOADS[workload], conditions, Path(place))
            shares = ", ".join(f"{name} {share:.0%}" for name, share in bench.table.shares().items())
            print(
                f"{shape}, {workload}: table in {bench.table_seconds:.0f} s; {shares}; {' '.join(bench.table.notes)}",
                file=sys.stderr,
            )
            for kind, target in itertools.product(given.kind or ("uniform", "per-layer"), given.targets):
                try:
                    row = bench.row(kind, target, seed=int(100 * target))
                except SurgeonError as error:
                    show(f"| {shape} | {workload} | {kind} | {target:g} | {error.message} | | | | | |")
                    continue
                rows.append(
                    {"shape": shape, "workload": workload, "table_seconds": bench.table_seconds, **row}
                )
                first, last = row["tried"][0], row["tried"][-1]
                show(
                    f"| {shape} | {workload} | {kind} | {target:g} | {first['ratio']:.3f} | {first['ratio'] / first['predicted'] - 1:+.1%} "
                    f"| {len(row['tried'])} | {last['ratio']:.3f} | {last['low']:.3f} to {last['high']:.3f} | {last['verdict']} |"
                )
    if not (given.shape or given.workload or given.kind) and tuple(given.targets) == TARGETS:
        PAGE.write_text(
            HEADING.format(machine=platform.machine(), threads=given.threads) + "\n".join(lines) + "\n"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
