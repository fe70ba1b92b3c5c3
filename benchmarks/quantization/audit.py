"""Is the size that is predicted the size of the files, and are the bits that are said those that are stored?

    python benchmarks/quantization/audit.py MODEL [--output OUT] [word ...]

MODEL is a small bfloat16 model with a tokenizer (`kl_vs_size.py` leaves one in OUT/source). Every form and scheme is asked for
twice: ``--dry-run`` for the prediction, then for the model (a target the other way round: its plan is predicted). Compared are

- the bytes predicted with those of the weight files on disk: equal to the byte;
- bits per weight of linear matrices as ``surgeon quantize`` and ``surgeon inspect`` say them with a count of its own: headers of
  safetensors read by hand here, the gguf library for its files. Everything stored of a matrix counts: within 1 %.

Rounding to nearest throughout, so that no text is needed. Words choose rows. Writes RESULTS-audit.md beside this file (not with
words); the exit status is 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from kl_vs_size import header, sizes

import surgeon

HERE = Path(__file__).resolve().parent
WITHIN = 0.01
BLOCK = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")

CASES: dict[str, dict] = {
    **{
        f"compressed-tensors W{bits}A16 g64": {"scheme": f"W{bits}A16", "group_size": 64}
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "compressed-tensors W4A16 by row": {"scheme": "W4A16", "group_size": -1},
    "compressed-tensors FP8": {"scheme": "FP8"},
    "compressed-tensors NVFP4": {"scheme": "NVFP4"},
    "compressed-tensors MXFP4": {"scheme": "MXFP4"},
    "compressed-tensors at 3.5 bits": {"target_bits": 3.5, "sensitivity": "weight", "group_size": 64},
    "compressed-tensors at 2,900,000 bytes": {
        "target_size": 2_900_000,
        "sensitivity": "weight",
        "group_size": 64,
    },
    **{
        f"auto-round W{bits}A16 g64": {"format": "auto-round", "scheme": f"W{bits}A16", "group_size": 64}
        for bits in (2, 3, 4, 8)
    },
    "bitsandbytes NF4": {"format": "bitsandbytes", "scheme": "NF4"},
    "bitsandbytes NF4, scales quantized": {"format": "bitsandbytes", "scheme": "NF4", "double_quant": True},
    "bitsandbytes FP4": {"format": "bitsandbytes", "scheme": "FP4"},
    "bitsandbytes INT8": {"format": "bitsandbytes", "scheme": "INT8"},
    **{f"gguf {name}": {"format": "gguf", "scheme": name} for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0")},
}


def counted(made: Path, source: Path) -> tuple[int, float]:
    """Return bytes of all weight files and bits per weight of the linear matrices, by our own count."""
    if made.is_dir():
        found = sizes(made, source)
        return found["file_bytes"], found["bits"]
    from gguf import GGUFReader

    tensors = [tensor for tensor in GGUFReader(made).tensors if BLOCK.fullmatch(tensor.name)]
    return made.stat().st_size, 8 * sum(int(t.n_bytes) for t in tensors) / sum(
        int(t.n_elements) for t in tensors
    )


def inspected(made: Path) -> float | None:
    """Return bits per weight as ``surgeon inspect`` says them; None for what it does not read."""
    if not made.is_dir():
        return None
    account = surgeon.inspect(made).summary.quantization
    return None if account is None else account.bits


def measured(name: str, source: Path, output: Path) -> dict:
    """Make one model, compare, and remove it."""
    options = {"method": "rtn", "threads": torch.get_num_threads(), **CASES[name]}
    made = output / ("made.gguf" if options.get("format") == "gguf" else "made")
    try:
        targeted = any(name.startswith("target") for name in options)
        wanted = {} if targeted else surgeon.quantize(source, made, dry_run=True, **options)["output"]
        said = surgeon.quantize(source, made, **options)["output"]
        if targeted:  # what a target chooses is known afterwards: predicted is the size of that choice, matrix by matrix
            chosen = json.loads((made / "plan.json").read_text())["matrices"]
            schemes = tuple(f"{matrix}={scheme or 'none'}" for matrix, scheme in chosen.items())
            wanted = surgeon.quantize(source, output / "again", dry_run=True, method="rtn", scheme=schemes)[
                "output"
            ]
        on_disk, bits = counted(made, source)
        shown = inspected(made)
    finally:
        if made.is_dir():
            shutil.rmtree(made)
        for file in output.glob("made*.gguf*"):
            file.unlink()
    apart = max(
        abs(one / bits - 1) for one in (wanted["bits"], said["bits"], shown if shown is not None else bits)
    )
    return {
        "predicted": wanted["bytes"], "said": said["bytes"], "disk": on_disk, "bits": bits, "said bits": said["bits"], "shown": shown, "apart": apart,
        "good": wanted["bytes"] == said["bytes"] == on_disk <= options.get("target_size", on_disk) and apart <= WITHIN,
    }  # fmt: skip


def page(found: dict[str, dict], source: Path) -> str:
    """Return the page of results."""
    shapes = [
        entry
        for file in source.glob("*.safetensors")
        for name, entry in header(file).items()
        if name != "__metadata__"
    ]
    parameters = sum(torch.Size(entry["shape"]).numel() for entry in shapes)
    lines = [
        "# Sizes and bits: predicted, stored, said", "",
        f"`python benchmarks/quantization/audit.py MODEL`, {parameters:,} parameters in bfloat16. "
        f"{sum(one['good'] for one in found.values())} of {len(found)} as they should be: predicted bytes equal to the byte, bits within {WITHIN:.0%}.",
        "", "| what | bytes predicted | bytes on disk | bits counted | bits said | bits inspected | |", "|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for name, one in found.items():
        shown = "" if one["shown"] is None else f"{one['shown']:.4f}"
        lines.append(
            f"| {name} | {one['predicted']:,} | {one['disk']:,} | {one['bits']:.4f} | {one['said bits']:.4f} | {shown} | {'' if one['good'] else '**differs**'} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(description="Predicted sizes and bits against what is stored.")
    made.add_argument("model", type=Path)
    made.add_argument("words", nargs="*", help="rows whose name holds all of them")
    made.add_argument(
        "--output", type=Path, help="folder to work in, where finished rows are kept [a temporary one]"
    )
    made.add_argument("--threads", type=int, default=1)
    return made


def main() -> None:
    given = parser().parse_args()
    torch.set_num_threads(given.threads)
    chosen = [name for name in CASES if all(word in name for word in given.words)]
    kept = given.output / "audit.json" if given.output else None
    found = json.loads(kept.read_text()) if kept and kept.exists() else {}
    with tempfile.TemporaryDirectory(dir=given.output) as folder:
        for name in chosen:
            if name in found:
                continue
            found[name] = one = measured(name, given.model, Path(folder))
            print(f"{name}: {'good' if one['good'] else 'DIFFERS'} {one}", flush=True)
            if kept:
                kept.write_text(json.dumps(found))
    if not given.words:
        (HERE / "RESULTS-audit.md").write_text(page(found, given.model))
    sys.exit(not all(one["good"] for one in found.values()))


if __name__ == "__main__":
    main()
