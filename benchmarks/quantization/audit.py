"""Is the size that is predicted the size of the files, and are the bits that are said those that are stored?

    python benchmarks/quantization/audit.py MODEL [--output OUT] [word ...]

MODEL is a small bfloat16 model with a tokenizer (`kl_vs_size.py` leaves one in OUT/source). Every form and scheme is asked for
twice: ``--dry-run`` for the prediction, then for the model (a target the other way round: its plan is predicted). Types that ggml
alone makes come from ``surgeon export``. Compared are

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
from surgeon.formats.gguf_blocks import TYPES

HERE = Path(__file__).resolve().parent
WITHIN = 0.01
SCHEMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
BLOCK = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")

CASES: dict[str, dict] = {
    **{
        f"compressed-tensors W{bits}A16 g64": {"scheme": f"W{bits}A16", "group_size": 64}
        for bits in range(2, 9)
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
        for bits in range(2, 9)
    },
    "auto-round at 3.5 bits": {"format": "auto-round", "target_bits": 3.5, "sensitivity": "weight", "group_size": 64},
    "bitsandbytes NF4": {"format": "bitsandbytes", "scheme": "NF4"},
    "bitsandbytes NF4, scales quantized": {"format": "bitsandbytes", "scheme": "NF4", "double_quant": True},
    "bitsandbytes FP4": {"format": "bitsandbytes", "scheme": "FP4"},
    "bitsandbytes INT8": {"format": "bitsandbytes", "scheme": "INT8"},
    **{
        f"gguf {name}": {"format": "gguf", "scheme": name}
        for name in SCHEMES
    },
    "gguf at 5.2 bits": {"format": "gguf", "target_bits": 5.2, "sensitivity": "weight"},
    "gguf at 2,900,000 bytes": {"format": "gguf", "target_size": 2_900_000, "sensitivity": "weight"},
    "gguf IQ4_NL by export": {"to": "gguf", "gguf_type": "iq4_nl"},
    # Blocks of 256 divide the inputs of down projections of many models whose other matrices have fewer.
    **{
        f"gguf Q8_0, down projections {name}, by export": {
            "to": "gguf", "gguf_type": "q8_0", "gguf_override": (f"re:.*down_proj.weight={name.lower()}",),
        }
        for name, kind in TYPES.items() if kind.library and kind.values == 256
    },
}  # fmt: skip


def counted(made: Path, source: Path) -> tuple[int, float]:
    """Return bytes of all weight files and bits per weight of the linear matrices, by our own count."""
    if made.is_dir():
        found = sizes(made, source)
        return found["file_bytes"], found["bits"]
    tensors = [tensor for tensor in reader(made) if BLOCK.fullmatch(tensor.name)]
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
    options = dict(CASES[name])
    exported = options.get("to") == "gguf"
    made = output / ("made.gguf" if exported or options.get("format") == "gguf" else "made")
    try:
        if exported:
            wanted, said = (
                surgeon.export(source, made, dry_run=dry, **options)["output"] for dry in (True, False)
            )
            wanted["bits"] = said["bits"] = by_types(source, made)
        else:
            wanted, said = quantized(options, source, made)
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


def quantized(options: dict, source: Path, made: Path) -> tuple[dict, dict]:
    """Make a model; return what was predicted and what was said.

    What a target chooses is known afterwards: predicted is the size of that choice, matrix by matrix.
    """
    options = {"method": "rtn", "threads": torch.get_num_threads(), **options}
    targeted = any(name.startswith("target") for name in options)
    wanted = {} if targeted else surgeon.quantize(source, made, dry_run=True, **options)["output"]
    document = surgeon.quantize(source, made, **options)
    if targeted and made.is_dir():
        again = made.with_name("again")
        form = {"format": options["format"]} if "format" in options else {}
        wanted = surgeon.quantize(source, again, dry_run=True, method="rtn", plan=str(made), **form)["output"]
    elif targeted:  # of a file the plan is its tensors
        held = {tensor.name: tensor.tensor_type.name for tensor in reader(made)}
        schemes = tuple(f"{matrix}={held[place].lower()}" if held[place] in SCHEMES else f"{matrix}=none"
                        for matrix, place in places(source).items())  # fmt: skip
        wanted = surgeon.quantize(source, made.with_name("again.gguf"), dry_run=True, method="rtn", format="gguf", scheme=schemes)["output"]  # fmt: skip
    return wanted, document["output"]


def reader(file: Path) -> list:
    """Return the tensors of a GGUF file as the gguf library reads them."""
    from gguf import GGUFReader

    return list(GGUFReader(file).tensors)


def places(source: Path) -> dict[str, str]:
    """Return matrix of a llama checkpoint -> tensor of its GGUF file."""
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    return {
        f"model.layers.{layer}.{own}.weight": f"blk.{layer}.{other}.weight"
        for layer in range(layers)
        for own, other in names.items()
    }


def by_types(source: Path, made: Path) -> float:
    """Return bits per weight of the linear matrices that the sizes of blocks, as the program knows them, amount to."""
    kinds = {tensor.name: TYPES[tensor.tensor_type.name] for tensor in reader(made)}
    shapes = {name: entry["shape"] for file in source.glob("*.safetensors") for name, entry in header(file).items() if name != "__metadata__"}  # fmt: skip
    size = total = 0.0
    for matrix, place in places(source).items():
        count = torch.Size(shapes[matrix]).numel()
        size += count * kinds[place].bytes / kinds[place].values
        total += count
    return 8 * size / total


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
    for name in (name for name in CASES if name in found):
        one = found[name]
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
