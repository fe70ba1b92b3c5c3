"""Does pruning a mixture of experts stay within a memory limit that the model exceeds?

    python benchmarks/experts/memory.py [--folder DIR] [--threads N] [--small] [--keep]

Makes a Qwen3-MoE of random bfloat16 weights (3.3 GB, written layer by layer, removed afterwards), more than twice the limit
of 1.5 GB, and runs in processes of their own:

- calibrate: the statistics of all criteria that score whole experts, in one pass;
- prune: half the experts of every layer, from these statistics: written, verified, compared with the masked source;
- weights only: AIMER, which reads every expert and runs nothing;
- channels: HEAPr's scores (forward and backward).

What counts is each one's peak resident memory above what it had after its imports; for comparison the same is measured of
loading the model in bfloat16 with transformers. ``--small`` tries the script out on 0.5 GB.

Writes RESULTS-memory.md beside this file (not with --small).
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
TASKS = ("calibrate", "prune", "weights only", "channels", "load")
SEQUENCE = 512

LARGE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    **LARGE,
    "vocab_size": 4000,
    "hidden_size": 384,
    "moe_intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LIMIT = 1_500_000_000
SMALL_LIMIT = 200_000_000


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux")


def make(folder: Path, shape: dict) -> None:
    """Write a model of random weights in the layout of the hub, one layer a file."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.Qwen3MoeConfig(**shape, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
                                         bos_token_id=None, eos_token_id=0, pad_token_id=0)  # fmt: skip
    hidden, width, head = shape["hidden_size"], shape["moe_intermediate_size"], shape["head_dim"]
    attention = {"q_proj": (shape["num_attention_heads"] * head, hidden), "k_proj": (shape["num_key_value_heads"] * head, hidden),
                 "v_proj": (shape["num_key_value_heads"] * head, hidden), "o_proj": (hidden, shape["num_attention_heads"] * head)}  # fmt: skip
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (shape["vocab_size"], hidden), "model.norm.weight": (hidden,), "lm_head.weight": (shape["vocab_size"], hidden)}
    ]  # fmt: skip
    for layer in range(shape["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        names: dict[str, tuple[int, ...]] = {
            f"{start}self_attn.{name}.weight": size for name, size in attention.items()
        }
        names |= {f"{start}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        names |= {
            f"{start}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        names[f"{start}mlp.gate.weight"] = (shape["num_experts"], hidden)
        for expert in range(shape["num_experts"]):
            inside = f"{start}mlp.experts.{expert}."
            names |= {f"{inside}gate_proj.weight": (width, hidden), f"{inside}up_proj.weight": (width, hidden), f"{inside}down_proj.weight": (hidden, width)}  # fmt: skip
        files.append(names)
    draw = torch.Generator().manual_seed(0)
    index, total = {}, 0
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name, size in names.items():
            value = torch.randn(size, generator=draw, dtype=torch.float32)
            tensors[name] = (value * size[-1] ** -0.5 if value.ndim > 1 else 1 + 0.1 * value).bfloat16()
            total += tensors[name].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.save_pretrained(folder)


def task(name: str, folder: Path, tokens: int, threads: int | None, limit: int) -> dict:
    """Run one task in this process; return what it took."""
    import numpy as np
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    import surgeon
    from surgeon.calibrate.data import Sample
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.experts import criteria
    from surgeon.experts.statistics import collect_statistics
    from surgeon.prune.experts import heapr, run
    from surgeon.structure.experts.find import experts_of

    assert run and surgeon.prune  # imported before the baseline is taken
    torch.ones(256, 256) @ torch.ones(256, 256)  # the libraries' own buffers belong to the baseline
    transformers.utils.logging.disable_progress_bar()
    baseline = resident("VmRSS")
    begun = time.perf_counter()
    drawn = np.random.default_rng(0)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    samples = [Sample(drawn.integers(3, vocabulary, SEQUENCE), 0) for _ in range(tokens // SEQUENCE)]
    work = folder.parent / "work"
    settings = Settings(dtype="bfloat16", threads=threads, memory_limit=limit, batch_tokens=2048)
    about = {}
    if name == "load":
        model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        about["parameters"] = sum(value.numel() for value in model.parameters())
    elif name == "calibrate":
        checkpoint = open_path(folder)
        found = collect_statistics(checkpoint, samples, settings, experts_of(checkpoint), about={"name": "random tokens"})  # fmt: skip
        found.save(folder.parent / "routing.safetensors")
    elif name == "weights only":
        checkpoint = open_path(folder)
        experts = experts_of(checkpoint)
        about["scored"] = sum(
            len(criteria.get("aimer").score(checkpoint, experts, layer)) for layer in experts.running
        )
    elif name == "channels":
        checkpoint = open_path(folder)
        heapr.channel_scores(checkpoint, samples, settings, experts_of(checkpoint))
    else:
        made = surgeon.prune(
            folder, folder.parent / "pruned", method="reap", keep_experts="0.5", scores=str(folder.parent / "routing.safetensors"),
            calibration=(str(folder.parent / "text.jsonl"),), memory_limit=limit, threads=threads, work=str(work), calibration_dtype="bfloat16",
            overwrite=True, offline=True,
        )  # fmt: skip
        about["bytes"] = made["members"][0]["bytes"]
    return {"baseline": baseline, "peak": resident("VmHWM"), "seconds": time.perf_counter() - begun, **about}


def child(name: str, folder: Path, tokens: int, threads: int | None, limit: int) -> dict:
    """Run one task in a process of its own."""
    extra = [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, "--folder", str(folder), "--tokens", str(tokens), "--limit", str(limit), *extra],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(
    size: int, found: dict[str, dict], tokens: int, threads: int | None, limit: int, shape: dict
) -> str:
    words = {
        "calibrate": f"calibrate: statistics of all criteria, one pass over {tokens:,} tokens",
        "prune": "prune: half the experts of every layer, from these statistics; written, verified, compared with the masked source",
        "weights only": "weights only: AIMER of every expert",
        "channels": f"channels: HEAPr's scores, forward and backward over {tokens:,} tokens",
        "load": "for comparison: `from_pretrained` in bfloat16",
    }  # fmt: skip
    rows = "\n".join(
        f"| {words[name]} | {(one['peak'] - one['baseline']) / 1e9:.2f} | {one['seconds']:.0f} |"
        for name, one in found.items()
    )
    above = [name for name in TASKS[:-1] if found[name]["peak"] - found[name]["baseline"] > limit]
    verdict = "All of ours stay within the limit." if not above else f"Above the limit: {', '.join(above)}."
    return f"""# Memory of pruning experts

`python benchmarks/experts/memory.py`, {platform.machine()}, {threads or "all"} thread(s). A Qwen3-MoE of
{found["load"]["parameters"] / 1e9:.2f} billion random parameters ({shape["num_hidden_layers"]} layers of {shape["num_experts"]} experts), {size / 1e9:.2f} GB in bfloat16;
memory limit {limit / 1e9:.2f} GB, {size / limit:.1f} times less. Resident memory, above what imports take; a process each.

| task | peak, GB | seconds |
|---|---|---|
{rows}

{verdict}
"""


def write_text(folder: Path) -> None:
    """Write a tokenizer of bytes and text, so that ``surgeon prune`` can report on quality."""
    import random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    draw = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(str(draw.randrange(10**6)) for _ in range(300))}) for _ in range(64)
    ]
    (folder.parent / "text.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the model is made; default: a temporary folder"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--keep", action="store_true", help="do not remove the model")
    parser.add_argument("--child", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=None, help="bytes")
    chosen = parser.parse_args()
    if chosen.child:
        sys.stdout.write(
            json.dumps(task(chosen.child, chosen.folder, chosen.tokens, chosen.threads, chosen.limit)) + "\n"
        )
        return
    shape = dict(SMALL if chosen.small else LARGE)
    limit = chosen.limit or (SMALL_LIMIT if chosen.small else LIMIT)
    base = chosen.folder or Path(tempfile.mkdtemp(prefix="surgeon-memory-"))
    folder = base / "model"
    try:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, shape)
            write_text(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = {name: child(name, folder, chosen.tokens, chosen.threads, limit) for name in TASKS}
        text = report(size, found, chosen.tokens, chosen.threads, limit, shape)
        sys.stdout.write(text)
        if not chosen.small:
            OUT.write_text(text)
    finally:
        if not chosen.keep:
            for left in (folder, base / "pruned", base / "work"):
                shutil.rmtree(left, ignore_errors=True)
            if not chosen.folder:
                shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
