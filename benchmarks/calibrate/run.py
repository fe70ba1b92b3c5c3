"""Streamed passes against the whole model in memory: peak memory and time.

    python benchmarks/calibrate/run.py             writes RESULTS.md beside this file (about 15 minutes)
    python benchmarks/calibrate/run.py --quick     small models, one repetition, prints only

Every measurement is a process of its own. Peak memory is counted above what the process held after
its imports. Models are random, made in a temporary folder and removed. The full pass is the stock
model's own forward without its head, in the same precision, with the same threads, over the same
batches; both are repeated in turn and medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

DENSE = {  # the shape of Qwen2.5-0.5B
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    "model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2048, "moe_intermediate_size": 1536,
    "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 4096, "max_position_embeddings": 4096,
    "mlp_only_layers": [],
}  # fmt: skip


# ---- inside the measured processes ---------------------------------------------------------------


class Memory:
    """Peak memory above the moment it was made: resident, and the private part (without file pages)."""

    def __init__(self) -> None:
        self._base = status("VmRSS"), status("RssAnon")
        self._private = 0
        self._done = threading.Event()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._private = max(self._private, status("RssAnon"))

    def peak(self) -> dict[str, int]:
        self._done.set()
        self._thread.join()
        return {"resident": status("VmHWM") - self._base[0], "private": self._private - self._base[1]}


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def samples(count: int, length: int, vocabulary: int) -> list:
    import numpy as np

    drawn = np.random.default_rng(0)
    return [drawn.integers(0, vocabulary, length) for _ in range(count)]


def make(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Write a random model in bfloat16."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    parsed = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return {"bytes": sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))}


def full(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load the stock model and run its forward over all batches."""
    import torch
    import transformers

    import surgeon.calibrate.walk  # the same imports, so that the baselines are alike
    from surgeon.calibrate.batches import plan_batches

    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM  # noqa: B018  (resolves the lazy import before the baseline)
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    assert surgeon.calibrate.walk
    torch.set_num_threads(options["threads"])
    texts = samples(options["samples"], options["length"], options["vocabulary"])
    memory = Memory()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, options["dtype"])
    ).eval()
    loaded = time.perf_counter()
    checksum = 0.0
    with torch.no_grad():
        for batch in plan_batches([len(t) for t in texts], options["batch_tokens"]):
            out = model.model(batch.ids(texts), use_cache=False).last_hidden_state
            checksum += float(out.double().abs().sum())
    done = time.perf_counter()
    return {
        "load": loaded - start,
        "compute": done - loaded,
        "total": done - start,
        "checksum": checksum,
        **memory.peak(),
    }


class Nothing:
    """Observes nothing: the pass alone."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module, inputs, outputs, sample) -> None:
        raise AssertionError


class MeanMagnitude:
    """Mean |x| of every module's input channels, as AIM uses it."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def wants(self, module: str) -> bool:
        return True

    def observe(self, module, inputs, outputs, sample) -> None:
        found = inputs.abs().sum(dim=0).float()
        self.sums[module] = found if module not in self.sums else self.sums[module] + found


def streamed(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run the streamed pass over the same batches."""
    import torch
    import transformers
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    from surgeon.calibrate.walk import Settings, Walk
    from surgeon.checkpoint.checkpoint import open_path

    transformers.AutoModelForCausalLM  # noqa: B018
    texts = samples(options["samples"], options["length"], options["vocabulary"])
    observer = MeanMagnitude() if options.get("observe") else Nothing()
    memory = Memory()
    start = time.perf_counter()
    settings = Settings(
        dtype=options["dtype"], batch_tokens=options["batch_tokens"], threads=options["threads"],
        memory_limit=options.get("memory_limit"), stream_experts=options.get("stream_experts"),
    )  # fmt: skip
    with Walk(open_path(Path(folder)), texts, settings) as walk:
        walk.run(observer)
        with torch.no_grad():
            checksum = sum(float(states.double().abs().sum()) for _, states in walk.hidden())
        done = time.perf_counter()
        layer = max(walk.skeleton.bytes_of_layer(n) for n in range(walk.layers))
    return {"total": done - start, "checksum": checksum, "layer": layer, **memory.peak()}


# ---- outside --------------------------------------------------------------------------------------


def child(task: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.get("threads", 2)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", task, folder, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def dense(work: str, options: dict[str, Any], repeats: int) -> list[str]:
    """Measure the dense model; return lines of the report."""
    folder = str(Path(work, "dense"))
    made = child("make", folder, options["config"])
    lines = [
        f"Model: qwen2 shape, {options['config']['num_hidden_layers']} layers, {made['bytes'] / 1e9:.2f} GB in bfloat16 on disk. "
        f"{options['samples']} x {options['length']} tokens, batches of {options['batch_tokens']}. "
        "Streamed passes run with a memory limit of an eighth of the weights.",
        "", "| precision | pass | load s | compute s | total s | peak MB | private MB |", "|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    verdicts = []
    for dtype in options["dtypes"]:
        limit = max(100 << 20, made["bytes"] * (2 if dtype == "float32" else 1) // 8)
        chosen = {**options, "dtype": dtype, "memory_limit": limit}
        whole, alone, seen = [], [], []
        for _ in range(repeats):  # in turn, so that a busy minute hits all alike
            whole.append(child("full", folder, chosen))
            alone.append(child("streamed", folder, chosen))
            seen.append(child("streamed", folder, {**chosen, "observe": True}))
        if abs(whole[0]["checksum"] / alone[0]["checksum"] - 1) > 1e-6:
            raise SystemExit(f"the passes disagree: {whole[0]['checksum']} {alone[0]['checksum']}")
        lines.append(
            f"| {dtype} | whole model | {median(whole, 'load'):.1f} | {median(whole, 'compute'):.1f} | {median(whole, 'total'):.1f} "
            f"| {mb(median(whole, 'resident'))} | {mb(median(whole, 'private'))} |"
        )
        for name, runs in (("streamed", alone), ("streamed, mean abs of all inputs", seen)):
            lines.append(
                f"| {dtype} | {name} | | | {median(runs, 'total'):.1f} | {mb(median(runs, 'resident'))} | {mb(median(runs, 'private'))} |"
            )
        memory = median(whole, "resident") / median(alone, "resident")
        slower = median(alone, "total") / median(whole, "compute")
        total = median(alone, "total") / median(whole, "total")
        verdicts.append(
            f"{dtype}: peak 1/{memory:.1f} of the whole model's (goal 1/8), "
            f"{slower:.2f} x its compute time without loading, {total:.2f} x with loading (goal 1.5)."
        )
    note = (
        "Private memory leaves out mapped files: the stock loader maps weights that need no conversion, so the pages "
        "of a bfloat16 model are resident but can be dropped and read again; in float32 they are its own."
    )
    return [*lines, "", *(f"- {text}" for text in verdicts), "", note]


def experts(work: str, options: dict[str, Any], repeats: int) -> list[str]:
    """Measure layers of large experts, whole and one expert at a time."""
    folder = str(Path(work, "experts"))
    made = child("make", folder, options["config"])
    rows = {"whole layers": {"stream_experts": False}, "expert by expert": {"stream_experts": True}}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, extra in rows.items():
            runs[name].append(child("streamed", folder, {**options, **extra, "dtype": "bfloat16"}))
    if runs["whole layers"][0]["checksum"] != runs["expert by expert"][0]["checksum"]:
        raise SystemExit("streaming experts changed the result")
    layer = runs["whole layers"][0]["layer"]
    lines = [
        f"Model: qwen3_moe shape, {options['config']['num_experts']} experts, {made['bytes'] / 1e9:.2f} GB, "
        f"one layer {mb(layer)} MB in bfloat16. {options['samples']} x {options['length']} tokens; equal results bit for bit.",
        "", "| pass | total s | peak MB | of one layer |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, found in runs.items():
        lines.append(
            f"| {name} | {median(found, 'total'):.1f} | {mb(median(found, 'resident'))} | {median(found, 'resident') / layer:.2f} |"
        )
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        task, folder, options = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
        print(json.dumps({"make": make, "full": full, "streamed": streamed}[task](folder, options)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, one repetition")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["dense", "experts"])
    parser.add_argument("--folder", help="where the models are made; about 1.5 GB are needed")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    chosen = parser.parse_args()
    repeats = 1 if chosen.quick else chosen.repeats
    small = {"num_hidden_layers": 4, "vocab_size": 4096} if chosen.quick else {}
    one = {
        "config": {**DENSE, **small}, "samples": 4 if chosen.quick else 16, "length": 512, "batch_tokens": 512,
        "threads": chosen.threads, "dtypes": chosen.dtypes.split(","), "vocabulary": {**DENSE, **small}["vocab_size"],
    }  # fmt: skip
    two = {
        "config": EXPERTS, "samples": 4 if chosen.quick else 16, "length": 512, "batch_tokens": 1024,
        "threads": chosen.threads, "vocabulary": EXPERTS["vocab_size"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="surgeon-benchmark-") as work:
        parts = []
        if chosen.only != "experts":
            parts += ["## A dense model", "", *dense(work, one, repeats), ""]
        if chosen.only != "dense":
            parts += ["## Large experts", "", *experts(work, two, repeats), ""]
    text = "\n".join([*heading(chosen.threads, repeats), *parts])
    print(text)
    if not chosen.quick and chosen.only is None:
        (HERE / "RESULTS.md").write_text(text)


def heading(threads: int, repeats: int) -> list[str]:
    import importlib.metadata

    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )  # fmt: skip
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return [
        "# Streamed passes: memory and time",
        "",
        f"`python benchmarks/calibrate/run.py`; {processor}, {threads} threads, {versions}; "
        f"medians of {repeats} processes each, run in turn. Memory is the peak above the imports.",
        "",
    ]


if __name__ == "__main__":
    main()
