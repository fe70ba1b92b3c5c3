"""Divergence at equal bytes on a small trained decoder: allocations, methods, AutoRound's AutoScheme and llm-compressor.

    python benchmarks/pruning/decoders/train.py MODEL
    python benchmarks/quantization/environments.py PEERS
    python benchmarks/quantization/kl_vs_size.py MODEL --output OUT [--peers PEERS] [--only WORD ...] [--page-only]

The model is first written in bfloat16. Every row is one command of its program on it and the same calibration text (128 samples of 256 tokens of the
text it was trained on), written to a folder that stock transformers loads. From there it is treated alike: its divergence
KL(source || it) in nats a token on held-out files, over whole blocks, and the bits of its linear matrices, counted from the
header of its files (packed codes, scales, zero points, shapes). Intervals are 95 %, bootstrap over blocks; differences are
paired. Finished rows are kept in OUT/results.json, so that an interrupted run goes on. The folders stay in OUT.

Writes RESULTS-kl.md beside this file when everything has been measured (not with --only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from environments import python_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GROUP, SAMPLES, LENGTH = 64, 128, 256
BLOCKS = 120
WIDTHS = (2, 3, 4, 8)
TARGETS = (2.5, 3.0, 3.5, 4.5)
KINDS = ("weight", "rel-output", "fisher", "kl")
DRAWS = 2000


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        name: of its folder and in results.json.
        program: "surgeon", "autoround" or "llmcompressor".
        options: of its command.
        like: name of the row whose file size it has to keep; its plan too where the options say {plan}.
    """

    name: str
    program: str
    options: tuple[str, ...]
    like: str | None = None
    label: dict[str, str] = field(default_factory=dict)


def rows() -> list[Row]:
    """Return all models, each after those it refers to."""
    found = []
    for bits in WIDTHS:
        for method in ("rtn", "gptq"):
            found.append(Row(f"uniform{bits}-{method}", "surgeon", ("--scheme", f"W{bits}A16", "--method", method),
                             label={"kind": "one width", "method": method}))  # fmt: skip
        found.append(Row(f"uniform{bits}-gptq-clip", "surgeon", ("--scheme", f"W{bits}A16", "--method", "gptq", "--clip"),
                         label={"kind": "one width", "method": "gptq --clip"}))  # fmt: skip
        for observer in ("minmax", "mse"):
            found.append(Row(f"llmcompressor{bits}-{observer}", "llmcompressor", ("--bits", str(bits), "--observer", f"memoryless_{observer}"),
                             label={"kind": "one width", "method": f"llm-compressor gptq, {observer}"}))  # fmt: skip
    for target in TARGETS:
        for kind in KINDS:
            for method in ("gptq", "rtn") if kind in ("rel-output", "fisher") else ("gptq",):
                found.append(Row(f"mixed{target}-{kind}-{method}", "surgeon",
                                 ("--target-bits", str(target), "--sensitivity", kind, "--method", method),
                                 label={"kind": kind, "method": method}))  # fmt: skip
    for target in TARGETS:
        for iters in (0, 200):
            found.append(Row(f"autoscheme{target}-{iters}", "autoround", ("--bits", str(target), "--iters", str(iters)),
                             label={"kind": "AutoScheme", "method": "AutoRound, rounding" if iters == 0 else "AutoRound, 200 steps"}))  # fmt: skip
        theirs = f"autoscheme{target}-200"
        for kind in KINDS:
            found.append(Row(f"equal{target}-{kind}", "surgeon",
                             ("--format", "auto-round", "--target-size", "{size}", "--sensitivity", kind, "--method", "gptq"),
                             theirs, {"kind": kind, "method": "gptq"}))  # fmt: skip
        found.append(Row(f"plan{target}-gptq", "surgeon", ("--format", "auto-round", "{plan}", "--method", "gptq"),
                         theirs, {"kind": "AutoScheme", "method": "gptq"}))  # fmt: skip
    return found


# -- what is measured of a folder ----------------------------------------------------------------------------------


def header(file: Path) -> dict:
    """Return the header of a safetensors file; read here by hand, so that sizes are counted by nobody else's code."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length))


def sizes(folder: Path, source: Path) -> dict:
    """Return bytes of all weight files, of the linear matrices, and their bits a parameter."""
    shapes = {name: entry["shape"] for file in sorted(source.glob("*.safetensors"))
              for name, entry in header(file).items() if name != "__metadata__"}  # fmt: skip
    matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items()
                if len(shape) == 2 and "embed" not in name and "lm_head" not in name}  # fmt: skip
    stored = total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += file.stat().st_size
        for name, entry in header(file).items():
            # what is stored of a matrix is named after its module, in one step (.weight_scale) or two (.weight.absmax)
            owners = {name.rpartition(".")[0], name.partition(".weight")[0]}
            if name != "__metadata__" and owners & matrices.keys():
                stored += entry["data_offsets"][1] - entry["data_offsets"][0]
    parameters = sum(int(np.prod(shape)) for shape in matrices.values())
    return {
        "file_bytes": total,
        "linear_bytes": stored,
        "parameters": parameters,
        "bits": 8 * stored / parameters,
    }


def logits_of(folder: Path) -> Callable:
    """Return a function from token ids [batch, length] to log-probabilities, float64; the folder read by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(ids: np.ndarray):
        with torch.inference_mode():
            return torch.log_softmax(
                model(torch.from_numpy(ids.astype(np.int64))).logits[:, :-1].double(), dim=-1
            )

    return run


def divergences(source: Path, folder: Path, held_out: np.ndarray) -> np.ndarray:
    """Return KL(source || folder) of every block, mean over its positions, nats."""
    one, other = logits_of(source), logits_of(folder)
    found = []
    for start in range(0, len(held_out), 8):
        p, q = one(held_out[start : start + 8]), other(held_out[start : start + 8])
        found.append((p.exp() * (p - q)).sum(-1).mean(-1).numpy())
    return np.concatenate(found)


def cross_check(source: Path, folder: Path, held_out: np.ndarray) -> float:
    """Return the mean divergence as the program itself measures it: layer by layer, from the codes as it reads them."""
    from surgeon.calibrate.quality import compare
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.formats.dequantized import runnable

    first, second = open_path(source), runnable(open_path(folder))
    return compare(first, second, list(held_out), Settings(), decoder=True)["kl"]


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean."""
    draw = np.random.default_rng(seed)
    means = values[draw.integers(0, len(values), (DRAWS, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# -- how a folder comes about --------------------------------------------------------------------------------------


def halved(model: Path, output: Path) -> Path:
    """Write the model in bfloat16, as models are published, and return its folder: scales take the model's precision."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = output / "source"
    if not (folder / "config.json").exists():
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def calibration(model: Path, output: Path) -> Path:
    """Write the calibration text as JSONL: two blocks of the training text a sample, of which each program reads the first."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokens = np.load(model / "tokens.npz")["train"][: 2 * SAMPLES].reshape(SAMPLES, -1)
    file = output / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in tokens))
    return file


def plan_of(folder: Path) -> list[str]:
    """Return options that give every matrix the width AutoRound gave it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    options = ["--scheme", f"W{config['bits']}A16"]
    for name, extra in (config.get("extra_config") or {}).items():
        bits = extra.get("bits", config["bits"])
        if bits != config["bits"] and "lm_head" not in name:
            options += ["--scheme", f"{name}.weight=W{bits}A16" if bits < 16 else f"{name}.weight=none"]
    return options


def folder_of(found: Path) -> Path:
    """Return the folder with config.json at or below a path: AutoRound adds one of its own."""
    return next(found.rglob("config.json")).parent


def command(
    row: Row, model: Path, text: Path, out: Path, peers: Path | None, threads: int, results: dict, top: Path
) -> list[str]:
    """Return the command of one row."""
    if row.program == "surgeon":
        options = []
        for option in row.options:
            if option == "{size}":
                options.append(str(results[row.like]["file_bytes"]))
            elif option == "{plan}":
                options += plan_of(Path(results[row.like]["folder"]))
            else:
                options.append(option)
        if "--target-bits" in options or "--target-size" in options:
            kind, method = (
                options[options.index("--sensitivity") + 1],
                options[options.index("--method") + 1],
            )
            form = "auto-round" if "auto-round" in options else "compressed-tensors"
            options += [
                "--sensitivities",
                str(top / f"losses-{kind}-{method}-{form}.json"),
                "--bits",
                ",".join(map(str, WIDTHS)),
            ]
        return [sys.executable, "-m", "surgeon", "quantize", str(model), "-o", str(out), "--group-size", str(GROUP), "--calibration", str(text),
                "--samples", str(SAMPLES), "--sequence-length", str(LENGTH), "--threads", str(threads), "--json", *options]  # fmt: skip
    python = (
        sys.executable if peers is None or row.program == "autoround" else str(python_of(peers, row.program))
    )
    return [python, str(HERE / f"peer_{row.program}.py"), str(model), str(text), str(out), *row.options, "--group", str(GROUP),
            "--samples", str(SAMPLES), "--length", str(LENGTH), "--threads", str(threads)]  # fmt: skip


def made(line: list[str], log: Path, threads: int) -> tuple[float, dict]:
    """Run a command; return its seconds and what it printed last as JSON."""
    own = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if Path(line[0]) != Path(sys.executable):
        del own["PYTHONPATH"]
    begun = time.perf_counter()
    done = subprocess.run(line, env=own, capture_output=True, text=True, check=False)
    log.write_text(" ".join(line) + "\n" + done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}, see {log}: {done.stderr.strip().splitlines()[-1:]}")
    start = done.stdout.find("{") if line[2] == "surgeon" else done.stdout.rfind('{"folder"')
    try:
        said = json.loads(done.stdout[start:])
    except ValueError:
        said = {}
    return time.perf_counter() - begun, said


# -- the page ------------------------------------------------------------------------------------------------------


def cell(one: dict) -> str:
    """Return a divergence with its interval, in thousandths."""
    low, high = interval(np.array(one["blocks"]))
    return f"{1e3 * one['kl']:.2f} [{1e3 * low:.2f}, {1e3 * high:.2f}]"


def paired(one: dict, other: dict) -> str:
    """Return the ratio of two divergences and whether the difference over the same blocks is surely not zero."""
    low, high = interval(np.array(one["blocks"]) - np.array(other["blocks"]))
    word = "lower" if high < 0 else "higher" if low > 0 else "not distinguishable"
    return f"{one['kl'] / other['kl']:.2f}, {word}"


def page(results: dict, conditions: dict) -> str:
    """Return the page of results."""
    lines = [
        "# Divergence at equal bytes", "",
        f"`python benchmarks/quantization/kl_vs_size.py MODEL --output OUT --peers PEERS`, {conditions['model']}; {conditions['machine']}.",
        f"KL(source || quantized) in thousandths of a nat a token, on {conditions['blocks']} held-out blocks of {conditions['context']} tokens; brackets: 95 %, bootstrap over blocks. "
        f"Calibration: {SAMPLES} samples of {LENGTH} tokens, the same for every program. Groups of {GROUP}, symmetric. Bits are those of the linear matrices, all "
        "their stored tensors counted; embedding and norms stay bfloat16.",
        f"Read by transformers {conditions['transformers']}. One of ours read both ways: {conditions['cross']}.", "",
        "## One width for all", "",
        "| bits asked | program | bits | KL | against surgeon's GPTQ |", "|---|---|--:|--:|---|",
    ]  # fmt: skip
    for bits in WIDTHS:
        base = results.get(f"uniform{bits}-gptq")
        for row in rows():
            one = results.get(row.name)
            if row.label["kind"] != "one width" or not one or str(bits) not in re.findall(r"\d", row.name):
                continue
            beside = paired(one, base) if base and one is not base else ""
            lines.append(f"| {bits} | {row.label['method'] if 'llm' in row.label['method'] else 'surgeon ' + row.label['method']} | {one['bits']:.3f} | {cell(one)} | {beside} |")  # fmt: skip
    mixed = []
    for target in TARGETS:
        for kind in KINDS:
            one, other = results.get(f"mixed{target}-{kind}-gptq"), results.get(f"mixed{target}-{kind}-rtn")
            if one:
                mixed.append(f"| {target} | {kind} | {one['bits']:.3f} | {cell(one)} | {cell(other) if other else ''} |")  # fmt: skip
    if mixed:
        lines += [
            "", "## A width for every matrix", "", "| average asked | losses | bits | KL, GPTQ | KL, rounding |",
            "|---|---|--:|--:|--:|", *mixed,
        ]  # fmt: skip
    beside_peer = []
    for target in TARGETS:
        base = results.get(f"autoscheme{target}-200")
        for row in rows():
            one = results.get(row.name)
            named = row.name.startswith(("autoscheme", "equal", "plan")) and f"{target}-" in row.name
            if one and base and named:
                beside = paired(one, base) if one is not base else ""
                beside_peer.append(f"| {target} | {row.label['kind']} | {row.label['method']} | {one['file_bytes']:,} | {cell(one)} | {beside} |")  # fmt: skip
    if beside_peer:
        lines += [
            "", "## Against AutoScheme, at the size of its file", "",
            "AutoScheme's plan comes from its own loss and solver; its tuning has 200 steps a layer, the default. Ours were asked for at most the bytes of the file it wrote, in the same format. "
            "\"AutoScheme, gptq\" is its plan with our codes: what differs from the line above it is the codes, what differs from the others is the plan.",
            "", "| average asked | plan | codes | file, bytes | KL | against AutoScheme's own |", "|---|---|---|--:|--:|---|", *beside_peer,
        ]  # fmt: skip
    done = sum(row.name in results for row in rows())
    if done < len(rows()):
        lines += ["", f"{done} of {len(rows())} rows have been measured so far."]
    failed = [f"- {name}: {one['error']}" for name, one in results.items() if "error" in one]
    if failed:
        lines += ["", "## Not measured", "", *failed]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(description="Divergence at equal bytes.")
    made.add_argument("model", type=Path, help="what train.py made")
    made.add_argument("--output", type=Path, required=True, help="folder for models and results")
    made.add_argument(
        "--peers", type=Path, help="folder that environments.py made; without it llm-compressor is left out"
    )
    made.add_argument("--only", nargs="+", default=[], help="rows whose name holds one of these words")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--again", action="store_true", help="repeat rows that failed")
    made.add_argument("--page-only", action="store_true", help="write the page from what is measured")
    return made


def main() -> None:
    given = parser().parse_args()
    import torch
    import transformers

    torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    kept = given.output / "results.json"
    results: dict = json.loads(kept.read_text()) if kept.exists() else {}
    held_out = np.load(given.model / "tokens.npz")["held_out"]
    held_out = held_out[np.linspace(0, len(held_out) - 1, BLOCKS).astype(int)]
    text = calibration(given.model, given.output)
    source = halved(given.model, given.output)
    for row in rows():
        if given.page_only or (given.only and not any(word in row.name for word in given.only)):
            continue
        if row.name in results and not (given.again and "error" in results[row.name]):
            continue
        if row.program == "llmcompressor" and given.peers is None:
            continue
        if row.like and "folder" not in results.get(row.like, {}):
            continue
        out = given.output / row.name
        try:
            line = command(row, source, text, out, given.peers, given.threads, results, given.output)
            seconds, said = made(line, given.output / f"{row.name}.log", given.threads)
            folder = folder_of(out)
            blocks = divergences(source, folder, held_out)
            results[row.name] = {"folder": str(folder), "kl": float(blocks.mean()), "blocks": blocks.tolist(), "seconds": seconds, **sizes(folder, source)}  # fmt: skip
            if row.program == "surgeon":
                results[row.name]["said"] = said
            print(
                f"{row.name}: {results[row.name]['bits']:.3f} bits, KL {1e3 * blocks.mean():.3f}e-3, {seconds:.0f} s",
                flush=True,
            )
        except Exception as error:
            results[row.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"{row.name}: {results[row.name]['error']}", flush=True)
        kept.write_text(json.dumps(results, indent=1))
    if given.only and not given.page_only:
        return
    good = {name: one for name, one in results.items() if "kl" in one}
    name = next((name for name in ("mixed3.0-fisher-gptq", "uniform3-gptq") if name in good), None)
    both = "none" if name is None else f"{name}, {1e3 * good[name]['kl']:.4f} by transformers, {1e3 * cross_check(source, Path(good[name]['folder']), held_out):.4f} layer by layer"  # fmt: skip
    recipe = json.loads((given.model / "training.json").read_text())
    conditions = {
        "machine": f"{platform.machine()}, {given.threads} thread(s), torch {torch.__version__}", "blocks": BLOCKS, "context": held_out.shape[1],
        "transformers": transformers.__version__, "cross": both,
        "model": f"{recipe['parameters']:,} parameters trained on {recipe['tokens']['seen']:,} tokens of Python sources (held-out loss {recipe['loss_held_out']:.3f} nats)",
    }  # fmt: skip
    failed = {name: one for name, one in results.items() if "error" in one}
    missing = [row.name for row in rows() if row.name not in results]
    if missing:
        print(f"not measured yet, and not on the page: {', '.join(missing)}")
    (HERE / "RESULTS-kl.md").write_text(page(good | failed, conditions))


if __name__ == "__main__":
    main()
