"""How fast is GPTQ, and how good, against llm-compressor's and GPTQModel's?

    python benchmarks/quantization/environments.py PEERS
    python benchmarks/quantization/layer_speed.py PEERS [--threads N] [--rounds N] [--shapes 1024x1024 ...] [--small]

Every program works in an environment of its own, one at a time, on the same bfloat16 weights and the same float32 Hessian, in
turns: a round is one run of each. Timed are the grid, the order, the factorisation and the columns; not the
sums over tokens, not the packing. For whole layers the sums are timed too: matrices that read the same inputs
share them here, while the other two keep one for each matrix.

Errors are ||(Q - W) X||^2 / ||W X||^2 on tokens held out, for the numbers the file would stand for: codes times
scales as stored (bfloat16; GPTQModel stores float16, so it is compared with ours in float16), in float32.
Inputs are made: a mixture of fewer directions than inputs with falling energy, noise, and inputs of very different sizes.

CPU time of the process, medians; memory above what the problem takes. What a matrix costs at least: the operations of one
Cholesky factorisation and of bringing the columns up to date, at the speed of a large float32 product on this machine.

Writes RESULTS-speed.md beside this file (not with --small), and everything to WORK/speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from environments import PEERS, python_of
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHAPES = ("1024x1024", "2048x2048", "4096x4096", "11008x4096", "4096x11008")
LAYERS = {
    "hidden 1024, kv 256, ffn 2816": (1024, 256, 2816),
    "hidden 2048, kv 256, ffn 5632": (2048, 256, 5632),
}
SETTINGS = ((4, False), (3, False), (3, True), (8, False))
GROUP, DAMP, TOKENS, HELD = 128, 0.01, 8192, 2048
SMALL_LAYERS = {"hidden 256, kv 128, ffn 512": (256, 128, 512)}
PROGRAMS = ("surgeon", "surgeon-f16", "llmcompressor", "gptqmodel")
SCALES = {"llmcompressor": "surgeon", "gptqmodel": "surgeon-f16"}
"""Which of ours a peer is compared with: the one with scales as it stores them."""


def activations(inputs: int, tokens: int, draw: torch.Generator) -> torch.Tensor:
    """Return bfloat16 [tokens, inputs], correlated, of very different sizes."""
    directions = max(8, inputs // 4)
    falling = torch.linspace(0, 3, directions).neg().exp()
    mixing = torch.randn(directions, inputs, generator=draw) * falling[:, None]
    sizes = torch.exp(0.7 * torch.randn(inputs, generator=draw))
    sizes[torch.randperm(inputs, generator=draw)[: max(1, inputs // 256)]] *= 8
    result = torch.empty(tokens, inputs, dtype=torch.bfloat16)
    for start in range(0, tokens, 2048):
        rows = torch.randn(min(2048, tokens - start), directions, generator=draw) @ mixing / directions**0.5
        rows += 0.1 * torch.randn(rows.shape, generator=draw)
        result[start : start + len(rows)] = (rows * sizes).bfloat16()
    return result


def weights(outputs: int, inputs: int, draw: torch.Generator) -> torch.Tensor:
    """Return bfloat16 [outputs, inputs], rows of different sizes, tails heavier than normal."""
    plain = torch.randn(outputs, inputs, generator=draw) * 0.02
    rows = torch.exp(0.3 * torch.randn(outputs, 1, generator=draw))
    return (plain * rows * torch.exp(0.25 * torch.randn(outputs, inputs, generator=draw))).bfloat16()


def one_matrix(shape: str, folder: Path) -> dict:
    """Write the problem of one matrix and return its parts of a job."""
    outputs, inputs = (int(side) for side in shape.split("x"))
    file = folder / f"matrix-{shape}.safetensors"
    if not file.exists():
        draw = torch.Generator().manual_seed(outputs * 100003 + inputs)
        x = activations(inputs, TOKENS + HELD, draw)
        hessian = torch.zeros(inputs, inputs)
        for part in x[:TOKENS].split(2048):
            hessian.addmm_(part.float().T, part.float())
        parts = {
            "weight.w": weights(outputs, inputs, draw),
            "hessian.x": hessian / TOKENS,
            "held.x": x[TOKENS:].clone(),
        }
        save_file(parts, file)  # fmt: skip
    return {"problem": str(file), "kind": "matrix", "feeds": {"w": "x"}}


def one_layer(name: str, folder: Path) -> dict:
    """Write the problem of one decoder layer and return its parts of a job."""
    hidden, kv, ffn = (LAYERS | SMALL_LAYERS)[name]
    shapes = {"q": ("attention", hidden, hidden), "k": ("attention", kv, hidden), "v": ("attention", kv, hidden),
              "o": ("heads", hidden, hidden), "gate": ("mlp", ffn, hidden), "up": ("mlp", ffn, hidden),
              "down": ("product", hidden, ffn)}  # fmt: skip
    file = folder / f"layer-{hidden}.safetensors"
    if not file.exists():
        draw = torch.Generator().manual_seed(hidden)
        parts = {}
        for module, (source, outputs, inputs) in shapes.items():
            parts[f"weight.{module}"] = weights(outputs, inputs, draw)
            if f"inputs.{source}" not in parts:
                x = activations(inputs, TOKENS + HELD, draw)
                parts[f"inputs.{source}"], parts[f"held.{source}"] = x[:TOKENS].clone(), x[TOKENS:].clone()
        save_file(parts, file)
    return {
        "problem": str(file),
        "kind": "layer",
        "feeds": {module: source for module, (source, _, _) in shapes.items()},
    }


class Worker:
    """A program that waits for jobs in its own environment."""

    def __init__(self, program: str, peers: Path, threads: int) -> None:
        ours = program.startswith("surgeon")
        python = Path(sys.executable) if ours else python_of(peers, program)
        own = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OMP", "MKL"))
        }
        own |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if ours:
            own["PYTHONPATH"] = str(ROOT)
        self.process = subprocess.Popen(
            [python, HERE / "layer_worker.py", program], env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict:
        """Return the next line it writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def do(self, job: dict) -> dict:
        """Have a job done."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        if "error" in found:
            raise SystemExit(f"{self.process.args}: {found['error']}")
        return found

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def error_of(out: Path, job: dict) -> float:
    """Return the relative squared error of the outputs on the tokens held out, all matrices together."""
    made, problem = load_file(out), load_file(job["problem"])
    wrong = right = 0.0
    for name, source in job["feeds"].items():
        weight, held = problem[f"weight.{name}"].float(), problem[f"held.{source}"].float()
        found = made[f"codes.{name}"].float() * made[f"scales.{name}"].repeat_interleave(job["group"], 1)
        exact = held @ weight.T
        wrong += float((held @ found.sub_(weight).T).square().sum(dtype=torch.float64)) / float(
            exact.square().sum(dtype=torch.float64)
        )
        right += 1
    return wrong / right


def product_speed() -> float:
    """Return float32 operations a second of a large product on one thread's share, as these threads do it."""
    a = torch.randn(2048, 2048)
    best = 0.0
    for _ in range(4):
        begun = time.process_time()
        a @ a
        best = max(best, 2 * 2048**3 / (time.process_time() - begun))
    return best


def least(shape: str, speed: float) -> float:
    """Return the seconds that the operations of one matrix take at that speed."""
    outputs, inputs = (int(side) for side in shape.split("x"))
    return (inputs**3 / 3 + outputs * inputs**2) / speed


def measure(workers: dict[str, Worker], job: dict, rounds: int, folder: Path) -> dict:
    """Return for each program its times, its memory and its error."""
    found: dict = {program: {"seconds": [], "peak": 0} for program in workers}
    for turn in range(rounds):
        for program, worker in workers.items():
            out = folder / f"made-{program}.safetensors" if turn == 0 else None
            answer = worker.do(job | {"out": str(out) if out else None})
            found[program]["seconds"].append(answer["seconds"])
            found[program]["peak"] = max(found[program]["peak"], answer["peak"])
            if out:
                found[program]["error"] = error_of(out, job)
                out.unlink()
    return found


def row(label: str, bits: int, clip: bool, found: dict, limit: float | None) -> list[str]:
    """Return lines of the table: one for each peer."""
    lines = []
    for peer, own in SCALES.items():
        if peer not in found or own not in found:
            continue
        ours, theirs = found[own], found[peer]
        mine, other = statistics.median(ours["seconds"]), statistics.median(theirs["seconds"])
        ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        bound = "" if limit is None else f"{mine / limit:.1f}"
        lines.append(
            f"| {label} | {bits}{', range searched' if clip else ''} | {peer} | {mine:.2f} | {other:.2f} "
            f"| **{other / mine:.1f}** ({min(ratios):.1f} - {max(ratios):.1f}) | {ours['peak'] / 2**20:,.0f} | {theirs['peak'] / 2**20:,.0f} "
            f"| {ours['error']:.3e} | {theirs['error']:.3e} | {theirs['error'] / ours['error']:.3f} | {bound} |"
        )
    return lines


HEAD = (
    "| {} | bits | against | surgeon, s | it, s | ratio | surgeon, MiB | it, MiB | error, surgeon | error, it | error ratio | surgeon / least |\n"
    "|---|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|"
)


def page(results: list[dict], conditions: dict) -> str:
    """Return the page of results."""
    lines = [
        "# GPTQ: time, memory and error of a matrix and of a layer", "",
        f"`python benchmarks/quantization/layer_speed.py PEERS`, {conditions['machine']}, {conditions['threads']} thread(s), CPU time, "
        f"medians of {conditions['rounds']} rounds in turns (in brackets the least and the most ratio of a round), torch {conditions['torch']}, "
        + ", ".join(f"{name} {version}" for name, version in PEERS.items()) + ".",
        f"Groups of {GROUP}, symmetric, order of activations with static groups, damping {DAMP}; Hessians of {TOKENS} tokens; errors on {HELD} others. "
        "Where the range is searched each program does it its own way (here the least squared error, there the exponent 2.4; "
        "llm-compressor looks down to 0.8 of the range, the others to 0.2).",
        f"A float32 product of 2048 x 2048 runs at {conditions['speed'] / 1e9:.0f} Gflop/s here; \"least\" is one Cholesky factorisation and the update of the columns at that speed.",
        "", HEAD.format("out x in"),
    ]  # fmt: skip
    for kind in ("matrix", "layer"):
        if kind == "layer":
            lines += [
                "",
                f"A whole decoder layer (q, k, v, o, gate, up, down), from {TOKENS} tokens of inputs: sums over tokens included. "
                "Memory counts Hessians; the error is the mean of the seven.",
                "", HEAD.format("layer"),
            ]  # fmt: skip
        for one in results:
            if one["kind"] == kind:
                lines += row(one["label"], one["bits"], one["clip"], one["found"], one["least"])
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(description="GPTQ against llm-compressor's and GPTQModel's.")
    made.add_argument("peers", type=Path, help="folder that environments.py made")
    made.add_argument(
        "--work", type=Path, default=Path("/tmp/layer-speed"), help="folder for problems (1.5 GB)"
    )
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    made.add_argument("--layers", nargs="*", default=list(LAYERS), choices=[*LAYERS, *SMALL_LAYERS])
    made.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    made.add_argument("--small", action="store_true", help="one small matrix and layer, one round, no page")
    return made


def main() -> None:
    given = parser().parse_args()
    if given.small:
        given.shapes, given.layers, given.rounds = ["512x512"], list(SMALL_LAYERS), 1
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    conditions = {"machine": machine(), "threads": given.threads, "rounds": given.rounds, "torch": torch.__version__, "speed": product_speed()}  # fmt: skip
    workers = {program: Worker(program, given.peers, given.threads) for program in given.programs}
    results = []
    tasks = [(shape, one_matrix) for shape in given.shapes] + [(layer, one_layer) for layer in given.layers]
    warm = one_matrix("1024x512", given.work)  # loads and compiles what is loaded and compiled once
    for bits, clip in SETTINGS:
        for worker in workers.values():
            worker.do(warm | {"bits": bits, "clip": clip, "group": GROUP, "damp": DAMP, "tokens": TOKENS, "out": None})  # fmt: skip
    for label, build in tasks:
        parts = build(label, given.work)
        for bits, clip in SETTINGS:
            job = parts | {"bits": bits, "clip": clip, "group": GROUP, "damp": DAMP, "tokens": TOKENS}
            found = measure(workers, job, given.rounds, given.work)
            limit = least(label, conditions["speed"]) if parts["kind"] == "matrix" else None
            results.append({"label": label, "kind": parts["kind"], "bits": bits, "clip": clip, "found": found, "least": limit})  # fmt: skip
            print("\n".join(row(label, bits, clip, found, limit)), flush=True)
            (given.work / "speed.json").write_text(
                json.dumps({"conditions": conditions, "results": results}, indent=1)
            )
    for worker in workers.values():
        worker.close()
    if not given.small:
        (HERE / "RESULTS-speed.md").write_text(page(results, conditions))


if __name__ == "__main__":
    main()
