"""How much memory does it take to calibrate a model and rank all of its heads and channels?

    python benchmarks/pruning/memory.py [--folder DIR] [--threads N] [--small] [--keep]

Makes a Llama of 24 layers with random bfloat16 weights (3.9 GB; written layer by layer), then runs two
processes of their own: one calibrates it and builds the whole pruning database (KV groups, query heads,
FFN channels), the other loads it in float32 as everybody does. What counts is each one's peak resident
memory above what it had after its imports. Goal: at most a quarter. ``--small`` tries the script out.

Writes RESULTS-memory.md beside this file (not with --small or --layers).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(__file__).resolve().parent / "RESULTS-memory.md"
GOAL = 0.25

LARGE = {
    "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 24, "num_attention_heads": 20,
    "num_key_value_heads": 10, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {**LARGE, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4,
         "num_hidden_layers": 6}  # fmt: skip


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux")


def make(folder: Path, shape: dict) -> None:
    """Write a model of random weights, one layer a file."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    by_file: dict[str, list[str]] = {}
    for name in shapes:
        by_file.setdefault(name.split(".")[2] if ".layers." in name else "outer", []).append(name)
    index = {}
    draw = torch.Generator().manual_seed(0)
    for number, (_, names) in enumerate(by_file.items()):
        file = f"model-{number + 1:05d}-of-{len(by_file):05d}.safetensors"
        tensors = {}
        for name in names:
            value = torch.randn(shapes[name], generator=draw, dtype=torch.float32)
            scale = shapes[name][-1] ** -0.5
            tensors[name] = (value * scale if value.ndim > 1 else 1 + 0.1 * value).bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum((folder / file).stat().st_size for file in set(index.values()))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.save_pretrained(folder)


def prune(folder: Path, tokens: int, threads: int | None, limit: int) -> dict:
    """Build the database; return what it took."""
    import numpy as np
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.prune.database import build
    from surgeon.structure.find import structure_of

    torch.ones(256, 256) @ torch.ones(256, 256)  # the libraries' own buffers belong to the baseline
    baseline = resident("VmRSS")
    checkpoint = open_path(folder)
    structure = structure_of(checkpoint)
    drawn = np.random.default_rng(0)
    samples = [drawn.integers(3, 32000, 512) for _ in range(tokens // 512)]
    settings = Settings(dtype="bfloat16", threads=threads, memory_limit=limit, batch_tokens=2048)
    start = time.perf_counter()
    steps: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        database = build(
            checkpoint, structure, samples, settings, folder=Path(work),
            progress=lambda what, done, total: steps.__setitem__(f"{what} {done}/{total}", time.perf_counter() - start),
        )  # fmt: skip
        disk = sum(path.stat().st_size for path in Path(work).iterdir())
    return {
        "baseline": baseline,
        "peak": resident("VmHWM"),
        "seconds": time.perf_counter() - start,
        "rankings": len(database.rankings),
        "disk": disk,
        "float64": sum(ranking.about["precision"] == "float64" for ranking in database.rankings.values()),
    }


def load(folder: Path) -> dict:
    """Load the model in float32; return what it took."""
    import torch
    import transformers.models.llama.modeling_llama

    torch.ones(256, 256) @ torch.ones(256, 256)
    transformers.utils.logging.disable_progress_bar()
    baseline = resident("VmRSS")
    start = time.perf_counter()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = sum(value.numel() for value in model.parameters())
    return {
        "baseline": baseline,
        "peak": resident("VmHWM"),
        "seconds": time.perf_counter() - start,
        "parameters": parameters,
    }


def child(*arguments: str) -> dict:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(size: int, own: dict, other: dict, tokens: int, threads: int | None) -> str:
    taken, loading = own["peak"] - own["baseline"], other["peak"] - other["baseline"]
    plain = 4 * other["parameters"]
    mega = 1 / 2**20
    return f"""# Memory of calibration and ranking

`python benchmarks/pruning/memory.py`, {platform.machine()}, {threads or "all"} thread(s), a Llama of
{other["parameters"] / 1e9:.2f} billion parameters, {size / 1e9:.2f} GB in bfloat16, {tokens} tokens of calibration.

| | peak resident above imports, MiB | seconds |
|---|---|---|
| calibrate and rank heads, KV groups and channels of all layers | **{taken * mega:.0f}** | {own["seconds"]:.0f} |
| load in float32 (`from_pretrained`) | {loading * mega:.0f} | {other["seconds"]:.0f} |
| 4 bytes a parameter, for comparison | {plain * mega:.0f} | |

Ratio to loading: **{taken / loading:.3f}** (goal {GOAL}); to 4 bytes a parameter: {taken / plain:.3f}.
Files of the database: {own["disk"] / 1e9:.2f} GB; {own["rankings"]} rankings, {own["float64"]} of them in float64.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument(
        "--layers", type=int, default=None, help="fewer layers: our peak hardly depends on them"
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--keep", action="store_true", help="do not remove the model")
    parser.add_argument("--child", choices=("prune", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        assert chosen.folder is not None
        found = (
            load(chosen.folder)
            if chosen.child == "load"
            else prune(chosen.folder, chosen.tokens, chosen.threads, chosen.limit)
        )
        sys.stdout.write(json.dumps(found) + "\n")
        return
    shape = dict(SMALL if chosen.small else LARGE)
    if chosen.layers:
        shape["num_hidden_layers"] = chosen.layers
    base = chosen.folder or Path(tempfile.mkdtemp(prefix="surgeon-memory-"))
    folder = base / "model"
    try:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, shape)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        extra = [] if chosen.threads is None else ["--threads", str(chosen.threads)]
        # The pass may use an eighth of what the model takes in float32; the rest is for Hessians.
        arguments = [
            "--folder",
            str(folder),
            "--tokens",
            str(chosen.tokens),
            *extra,
            "--limit",
            str(max(size // 4, 256 << 20)),
        ]
        own = child("--child", "prune", *arguments)
        other = child("--child", "load", "--folder", str(folder))
        text = report(size, own, other, chosen.tokens, chosen.threads)
        sys.stdout.write(text)
        if not chosen.small and not chosen.layers:
            OUT.write_text(text)
    finally:
        if not chosen.keep:
            shutil.rmtree(folder if chosen.folder else base, ignore_errors=True)


if __name__ == "__main__":
    main()
