"""Write every cell of `cells`, load it with its stock reader, and write docs/compatibility.md.

    python benchmarks/quantization/compatibility.py            all cells, the page
    python benchmarks/quantization/compatibility.py llama nf4  cells whose name holds all of these words; no page

One process loads everything of a family: its plain models first, forms in the order of the table, auto-round last. GGUF is in
`gguf_cells`: llama.cpp has a process for every file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cells as table
import gguf_cells
import numpy as np
from cells import FAMILIES, RECIPES, Cell
from gguf_cells import GgufCell, GgufResult

from surgeon.errors import InputError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "compatibility.md"

PACKAGES = ("torch", "transformers", "compressed-tensors", "auto-round", "bitsandbytes", "gguf", "xllamacpp")
EXACT = 1e-3
"""Relative difference of float32 logits, matrices decoded, within which a model is what it stands for."""


@dataclass
class Result:
    """What came of one cell.

    Attributes:
        refused: why the form does not write it; None when it does.
        unwritten: why it could not be written in spite of that.
        error: of the reader.
        decoded, as_run: relative differences of logits from the plain model's: both in float32 with matrices decoded, and
            both in bfloat16 as kernels run.
        faults: what loading reported as missing, left over or of another shape.
        modules: quantized modules in memory.
        generates: greedy tokens with the cache equal those without.
    """

    refused: str | None = None
    unwritten: str | None = None
    error: str | None = None
    decoded: float = float("nan")
    as_run: float = float("nan")
    faults: dict[str, int] = field(default_factory=dict)
    modules: int = 0
    generates: bool = False

    @property
    def read(self) -> bool:
        """Whether the stock reader computes what is meant."""
        return self.error is None and self.unwritten is None and not self.faults and self.decoded <= EXACT

    def fate(self) -> str:
        """Return in a few words what the reader makes of it."""
        if self.unwritten is not None:
            return "no such file can be written"
        if self.error is not None:
            return f"fails ({self.error.partition(':')[0]})"
        if self.faults:
            return "tensors missing or left over"
        return "reads it" if self.read else f"wrong in silence: {percent(self.decoded)} off"


def percent(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def run(chosen: Sequence[Cell], work: Path, say: Callable[[str], None] = lambda line: None) -> dict[Cell, Result]:  # fmt: skip
    """Write and load cells; forms refuse what they refuse, and it is written all the same where that is possible."""
    results: dict[Cell, Result] = {}
    for family in dict.fromkeys(cell.family for cell in chosen):
        folder = work / family.replace(", ", "-")
        model = table.source(family, folder / "source")
        shapes, made = table.shapes_of(model), []
        for number, cell in enumerate(one for one in chosen if one.family == family):
            found = table.refusals(cell, shapes)
            result = results[cell] = Result(found[0].message if found else None)
            try:
                table.write(cell, model, folder / str(number))
                made.append((number, cell))
            except (InputError, AssertionError) as error:
                assert found, f"{cell} is not refused, and cannot be written: {error}"
                result.unwritten = str(error)
        _load(folder, made, results)
        say(f"{family}: {len(made)} loaded")
    return results


def run_gguf(chosen: Sequence[GgufCell], work: Path, say: Callable[[str], None] = lambda line: None) -> dict[GgufCell, GgufResult]:  # fmt: skip
    """Write GGUF cells and have llama.cpp run each in a process of its own."""
    results: dict[GgufCell, GgufResult] = {}
    for number, family in enumerate(dict.fromkeys(cell.family for cell in chosen)):
        folder = work / f"gguf-{number}"
        model = gguf_cells.source(family, folder / "source")
        for cell in (one for one in chosen if one.family == family):
            results[cell] = gguf_cells.run(cell, model, folder / cell.kind)
            shutil.rmtree(folder / cell.kind)
        say(
            f"GGUF {family}: {sum(results[cell].refused is None for cell in results if cell.family == family)} run"
        )
    return results


def _load(folder: Path, made: list[tuple[int, Cell]], results: Mapping[Cell, Result]) -> None:
    made = sorted(made, key=lambda one: one[1].form == table.AR)
    jobs = [{"folder": str(folder / str(n) / kind), "plain": kind == "plain", "logits": str(folder / f"{n}-{kind}.npy")}
            for kind in ("plain", "packed") for n, _ in made]  # fmt: skip
    decoder = ROOT / "surgeon" / "verify" / "quantized_child.py"
    (folder / "job.json").write_text(json.dumps({"ids": table.IDS, "decoder": str(decoder), "jobs": jobs}))
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "stock_child.py"), str(folder / "job.json"), str(folder / "out.json")],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    out = json.loads((folder / "out.json").read_text())
    for (number, cell), plain, packed in zip(made, out[: len(made)], out[len(made) :], strict=True):
        assert not plain["faults"], (cell, plain)
        result = results[cell]
        result.error, result.faults = packed.get("error"), packed.get("faults", {})
        result.modules = sum(packed.get("quantized", {}).values())
        if result.error is None:
            want, got = (
                np.load(folder / f"{number}-{kind}.npy").astype(np.float64) for kind in ("plain", "packed")
            )
            result.decoded, result.as_run = (
                float(np.linalg.norm(g - w) / np.linalg.norm(w)) for w, g in zip(want, got, strict=True)
            )
            result.generates = packed["cached"] == packed["uncached"]


# ---- the page ------------------------------------------------------------------------------------------


def vllm(recipe: str, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    """Return for which families the rules read in vLLM's source allow a recipe."""
    if RECIPES[recipe].form == table.BNB:
        return ""
    own = [cell for cell in table.cells() if cell.recipe == recipe]
    allowed = [cell.family for cell in own if not table.refusals(cell, shapes[cell.family], "vllm")]
    rest = [cell.family for cell in own if cell.family not in allowed]
    if not allowed or not rest:
        return "none" if rest else "all"
    if all(
        (family in table.MIXTURES) != (family in allowed) for family in FAMILIES if family in allowed + rest
    ):
        return "no mixtures"
    return f"all but {'; '.join(rest)}" if len(rest) < len(allowed) else "; ".join(allowed)


INTRODUCTION = """# Which quantized models stock readers load

`python benchmarks/quantization/compatibility.py` writes this page: a tiny random bfloat16 model of each family is quantized by
rounding, written by the same forms as `surgeon quantize` uses, and loaded by `AutoModelForCausalLM.from_pretrained` in a fresh
process on {machine}, with {versions}.

A number is the relative difference of its logits, as its kernels run in 16 bits, from those of a plain model of the numbers the
file stands for. Whatever has a number was also run in float32 with its matrices decoded by the reader, and then differs by less
than {exact:g}; nothing was missing or left over, and it generates text. Where a reader decodes matrices and then multiplies as a plain
model does, the number is 0. Others round elsewhere (auto-round before it adds a bias, and in experts that it computes one by one;
bitsandbytes in its kernels), or round activations to eight bits as the form demands (float8, int8 of bitsandbytes): that is what the
reader computes, not an error of the file. In mixtures of experts small roundings make routers choose otherwise, which random models
show most.

GGUF is written by `surgeon quantize --format gguf`, or by `surgeon export --to gguf --gguf-type` (K-quants, IQ, and every type of
the families marked *), and run by llama.cpp (xllamacpp) in a process of its own, a fresh one for each file; a number is there, too,
the relative difference of its logits from those of a plain model of the numbers in the file. ggml rounds the inputs of every product
to eight bits: that is what is seen. With torch rounding inputs in the same way {exact_gguf:.0e} is left at most after the prompt with
the least, and {flipped:.0%} at most after all five: one input rounded the other way moves all that follow. From every file it generates
{new} tokens after each prompt, with its cache, the best ones also without; {same:.1%} of them are those torch takes.

"refused" means that the form says no before anything is written; why, and what the reader would have done, is below. The
last column says for which families vLLM's rules allow it, as read in its source; vLLM was not run.
"""


def gguf_lines(results: Mapping[GgufCell, GgufResult]) -> list[str]:
    """Return the table of GGUF: a row for each family that is written in any type."""
    lines = [
        "## gguf",
        "",
        f"| family | {' | '.join(gguf_cells.COLUMNS)} |",
        "|---" * (len(gguf_cells.COLUMNS) + 1) + "|",
    ]
    for family in gguf_cells.FAMILIES:
        found = [results[GgufCell(family, kind)] for kind in gguf_cells.COLUMNS]
        shown = ["refused" if r.refused else percent(r.as_run) for r in found]
        mark = " *" if not any(r.way == "quantize" for r in found) and any(r.way for r in found) else ""
        lines.append(f"| {family}{mark} | {' | '.join(shown)} |")
    return [*lines, ""]


def gguf_refusals(results: Mapping[GgufCell, GgufResult]) -> list[str]:
    """Return the rows of GGUF in the table of refusals, one for each family and set of types."""
    lines = []
    for family in gguf_cells.FAMILIES:
        refused = [kind for kind in gguf_cells.COLUMNS if results[GgufCell(family, kind)].refused]
        if refused:
            types = "every type" if len(refused) == len(gguf_cells.COLUMNS) else ", ".join(refused)
            why = str(results[GgufCell(family, refused[0])].refused).replace("|", " ")
            lines.append(f"| gguf | {family}: {types} | {why} | not written by force |")
    return lines


def page(results: Mapping[Cell, Result], of_gguf: Mapping[GgufCell, GgufResult]) -> str:
    """Return docs/compatibility.md."""
    with tempfile.TemporaryDirectory() as place:
        shapes = {family: table.shapes_of(table.source(family, Path(place) / str(n))) for n, family in enumerate(FAMILIES)}  # fmt: skip
        allowed = {recipe: vllm(recipe, shapes) for recipe in RECIPES}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    run_ones = [r for r in of_gguf.values() if not r.refused]
    same = sum(r.same for r in run_ones) / sum(r.tokens for r in run_ones)
    lines = [INTRODUCTION.format(machine=platform.machine(), versions=versions, exact=EXACT, exact_gguf=gguf_cells.EXACT,
                                 flipped=gguf_cells.FLIPPED, new=gguf_cells.NEW, same=same)]  # fmt: skip
    for form in (table.CT, table.AR, table.BNB):
        families = list(FAMILIES)
        lines += [
            f"## {form}",
            "",
            f"| scheme | {' | '.join(families)} | vLLM |",
            "|---" * (len(families) + 2) + "|",
        ]
        for recipe in (name for name, one in RECIPES.items() if one.form == form):
            found = [results.get(Cell(recipe, family)) for family in families]
            shown = ["" if r is None else "refused" if r.refused else percent(r.as_run) for r in found]
            lines.append(f"| {recipe} | {' | '.join(shown)} | {allowed[recipe]} |")
        lines.append("")
    lines += gguf_lines(of_gguf)
    lines += ["## Refusals", "", "What the form says of the first family it refuses, and what stock transformers makes of all of them written by force.", "",
              "| form | scheme | why | written by force |", "|---|---|---|---|"]  # fmt: skip
    for recipe, one in RECIPES.items():
        refused = [r for c, r in results.items() if c.recipe == recipe and r.refused]
        if refused:
            fates = " / ".join(
                sorted({r.fate() for r in refused if r.error or r.read or r.unwritten or r.faults})
            )
            wrong = sorted(r.decoded for r in refused if r.fate().startswith("wrong"))
            if wrong:
                fates += f"{' / ' if fates else ''}wrong in silence: {percent(wrong[0])} to {percent(wrong[-1])} off"
            lines.append(f"| {one.form} | {recipe} | {str(refused[0].refused).replace('|', ' ')} | {fates} |")
    return "\n".join([*lines, *gguf_refusals(of_gguf)]) + "\n"


def main(words: Sequence[str]) -> int:
    chosen = [cell for cell in table.cells() if all(word in str(cell) for word in words)]
    of_gguf = [cell for cell in gguf_cells.cells() if all(word in str(cell) for word in words)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        results = run(chosen, Path(place), lambda line: print(line, flush=True))
        found = run_gguf(of_gguf, Path(place), lambda line: print(line, flush=True))
    bad = 0
    for cell, one in found.items():
        unexpected = not one.refused and not (one.read and one.generates)
        bad += unexpected
        if words or unexpected:
            print("UNEXPECTED" if unexpected else "ok", cell, one)
    for cell, result in results.items():
        unexpected = result.read if result.refused else not (result.read and result.generates)
        bad += unexpected
        if words or unexpected:
            print("UNEXPECTED" if unexpected else "ok", cell, "| refused" if result.refused else "|", result.fate(), f"| {result.decoded:.2g} {result.as_run:.2g} generates {result.generates} modules {result.modules}")  # fmt: skip
    if not words:
        PAGE.write_text(page(results, found))
        print(f"{len(results) + len(found)} cells, {bad} unexpected; {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
