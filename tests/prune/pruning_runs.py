"""What tests of `surgeon prune` share: tiny models with a tokenizer, text, and a machine whose times are made up."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "structure"), str(TESTS / "cli"), str(TESTS / "models")]

import commands  # noqa: E402
import task  # noqa: E402
from structure_models import folder_of  # noqa: E402

from surgeon.deploy.per_layer import block_shapes, stock_config  # noqa: E402
from surgeon.measure.compare import Measured  # noqa: E402
from surgeon.measure.environment import Environment  # noqa: E402
from surgeon.measure.table import LatencyTable, identity  # noqa: E402
from surgeon.structure.cut import LayerShape  # noqa: E402

command = commands.run
LONG = TESTS / "models" / "long"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
HERE = Environment("cpu", "Made up", 1, "float32", "2.13", "5.23", "sdpa", "CPU time of the thread")


def small(folder: Path) -> Path:
    """Return a copy of the trained model of 1.2 M parameters: 4 layers, 4 heads on 2 groups, FFN 432."""
    shutil.copytree(LONG, folder)
    return folder


def tiny(family: str, folder: Path, **extra: Any) -> Path:
    """Return a random model of 3 layers, 6 heads on 3 groups, with the tokenizer of the trained one."""
    shutil.copytree(folder_of(family, **{"vocab_size": 281, **extra}), folder)
    for name in TOKENIZER:
        shutil.copy(LONG / name, folder)
    return folder


def text(path: Path, records: int = 30) -> Path:
    """Return a file of exchanges as the trained model has them: sums, worked out at length."""
    drawn = random.Random(4)
    with open(path, "w") as stream:
        for question in itertools.islice(task.questions("train", 0), records):
            answer = {"prompt": question.text, "response": task.solve(question, 1.0, drawn)}
            stream.write(json.dumps(answer) + "\n")
    return path


@dataclass
class Machine:
    """Seconds as sums over layers; what the table says and what is measured may differ.

    Attributes:
        attention, ffn: seconds of one query head, of one FFN channel.
        overhead: seconds of an attention or FFN of any size.
        rest: seconds outside the layers.
        truth: factors on (attention, ffn, rest) when a model is timed.
        spread: half-width of the interval of a measured ratio, relative.
        tables, timed: tables measured; folders timed with their ratios.
    """

    attention: float = 0.004
    ffn: float = 0.0001
    overhead: float = 0.001
    rest: float = 0.02
    truth: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spread: float = 0.005
    tables: int = 0
    timed: list[tuple[str, float]] = field(default_factory=list)

    def _attention(self, heads: int, factor: float = 1.0) -> float:
        return factor * (self.overhead + self.attention * heads) if heads else 0.0

    def _ffn(self, width: int, factor: float = 1.0) -> float:
        return factor * (self.overhead + self.ffn * width) if width else 0.0

    def measure_table(self, config: Mapping[str, Any], structure: Any, workload: Any, levels: Any, conditions: Any, **_: Any) -> LatencyTable:  # fmt: skip
        self.tables += 1
        full = structure.shape(0)
        heads = {(full.heads, full.groups), *levels.attention}
        widths = {full.ffn, *levels.ffn}
        return LatencyTable(
            HERE, workload, identity(config), structure.layers, full, self.rest,
            {key: self._attention(key[0]) for key in heads}, {width: self._ffn(width) for width in widths},
            dict.fromkeys(heads, 0.0), dict.fromkeys(widths, 0.0),
        )  # fmt: skip

    def seconds(self, folder: Path) -> float:
        """Return the true seconds of a model folder."""
        a, f, r = self.truth
        return r * self.rest + sum(
            self._attention(shape.heads, a) + self._ffn(shape.ffn, f) for shape in shapes_in(folder)
        )

    def speedup(self, dense: Path, pruned: Path, workload: Any, conditions: Any, **_: Any) -> Measured:
        times = self.seconds(dense), self.seconds(pruned)
        ratio = times[0] / times[1]
        self.timed.append((str(pruned), ratio))
        low, high = ratio * (1 - self.spread), ratio * (1 + self.spread)
        measurable = self.spread <= conditions.precision
        return Measured(ratio, low, high, 9, *times, measurable, conditions.precision, workload, HERE, {})


def shapes_in(folder: Path) -> tuple[LayerShape, ...]:
    """Return the sizes of a written model's layers, from its config.json alone."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gpt2":
        heads = config["n_head"]
        one = LayerShape(
            heads, heads, config["n_embd"] // heads, config.get("n_inner") or 4 * config["n_embd"]
        )
        return (one,) * config["n_layer"]
    found = block_shapes(config if "block_configs" in config else {**stock_config(config)})
    if "num_local_experts" in config:  # its experts are not cut
        return tuple(LayerShape(s.heads, s.groups, s.head_dim, 0) for s in found)
    return found


def install(monkeypatch: Any, machine: Machine) -> Machine:
    """Let pruning take times from a made-up machine."""
    from surgeon.prune import members, session

    monkeypatch.setattr(session, "measure_table", machine.measure_table)
    monkeypatch.setattr(members, "speedup", machine.speedup)
    monkeypatch.setattr(session.Session, "_here", HERE)
    return machine


def table_of(machine: Machine, folder: Path, workload: Any) -> LatencyTable:
    """Return the table of a made-up machine for a model folder."""
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.measure.differencing import Levels
    from surgeon.structure.find import structure_of

    checkpoint = open_path(folder, "model")
    structure = structure_of(checkpoint)
    table = machine.measure_table(checkpoint.config or {}, structure, workload, Levels.of(structure), None)
    machine.tables = 0
    checkpoint.close()
    return table


def parameters_in(folder: Path) -> int:
    """Return how many numbers the weight files hold."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in list(opened.keys()))
    return total


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a folder with its size and time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
