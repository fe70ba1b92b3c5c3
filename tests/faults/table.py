"""What can go wrong, and the tests that hold each promise: writes docs/faults.md.

    python tests/faults/table.py

A test carries an identifier in its name (`test_A5_...`, several at once: `test_A1_A13_...`); the corpus of hostile
folders carries them in the names of its cases.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"

GROUPS = {
    "A": "Writing is interrupted or fails",
    "B": "Malformed weight files",
    "C": "Indices and folders",
    "D": "Values and types of numbers",
    "E": "Architecture and configuration",
    "F": "Recipes and command lines",
    "G": "Code execution and trust",
    "H": "Resources and environment",
    "I": "Several at once",
    "J": "Pipelines, calibration, evaluation",
}

FAULTS = {
    "A1": "the process is killed while weights are written: the destination stays as it was",
    "A2": "disk full, quota, size limit, I/O error: said before the start where it can be known; finished work is kept",
    "A3": "power fails after success was reported: everything was synced before anything was exposed",
    "A4": "Ctrl-C, SIGTERM, closed pipes: work in progress ends in order, the command to go on is shown",
    "A5": "an operation fails half-way: nothing is published with an exception in flight",
    "A6": "a run is resumed with another recipe, seed, input or version: refused, with what differs",
    "A7": "the journal is cut or damaged: what is readable counts, the rest is computed again",
    "A8": "the destination holds an older model or other files: replaced as a whole on request, foreign files never",
    "A9": "the output is, contains or lies inside an input, also through links: refused",
    "A10": "the destination is a mount point, an empty folder, on another file system, or a file",
    "A11": "permission bits of published files follow the umask",
    "A12": "equal plans give equal bytes, whatever the process, threads, hash seed or folder",
    "A13": "replacing a model is interrupted between two renames: the old or the new one is found, and a way to finish",
    "A14": "read-only or vanished destinations, long and odd names: refused early, or they work",
    "B1": "truncated, extended or empty weight files, and Git LFS pointers",
    "B2": "header lengths beyond the file or any limit: refused before memory is taken",
    "B3": "headers made to cost time and memory: bounded",
    "B4": "names that occur twice, even with equal content",
    "B5": "overlaps, holes, overflowing or negative sizes",
    "B6": "data types that are unknown, or that readers cannot load",
    "B7": "unknown fields, deep nesting, bad text, names like paths",
    "B8": "a file shrinks, grows or changes while it is read",
    "B9": "a flipped bit in a sound structure: found where hashes are known",
    "B10": "pipes, devices, folders and circles of links in the place of a weight file: refused without blocking",
    "C1": "an index that points outside its folder",
    "C2": "shards that are links: the hub's cache is followed, everything else is not",
    "C3": "shards or tensors that the index lists and that are missing",
    "C4": "tensors that the index does not list, or two shards with one name",
    "C5": "stray weight files beside the model: one order of precedence, said, with a way to choose",
    "C6": "what readers need of our own index: metadata, order, names",
    "C7": "config.json that is missing, empty, malformed or huge",
    "C8": "only pickle weights in the folder",
    "C9": "adapters, GGUF files and quantized folders in the place of a model",
    "D1": "NaN or infinity in an input",
    "D2": "an operation overflows or divides by zero",
    "D3": "float8 with scales beside it: codes are never taken for values",
    "D4": "packed integers: never taken for weights",
    "D5": "mixed types between models or within one; integer buffers",
    "D6": "doubles, scalars, empty and huge tensors",
    "D7": "tied tensors: stored once, twice alike, twice different",
    "D8": "slices: files hold what was kept and nothing else",
    "D9": "identical models, zero deltas, ties, densities at the ends: defined and repeatable",
    "D10": "group sizes and values that quantized formats or their readers cannot take",
    "E1": "a model type that is unknown here",
    "E2": "tensors that the architecture does not know: never dropped silently",
    "E3": "missing tensors: other loaders fill them with random numbers",
    "E4": "config.json disagrees with the tensors, in either direction",
    "E5": "every key of a pruned model's configuration follows its sizes",
    "E6": "layers of different sizes that no stock class holds",
    "E7": "vocabularies that differ, even with equal sizes",
    "E8": "tokenizers, templates and generation settings travel with the model",
    "E9": "experts stored one by one or stacked: both are understood, each keeps its own",
    "E10": "layer ranges outside the model, reversed or empty",
    "E11": "models of different families or sizes: every difference is listed",
    "F1": "unknown or misspelt keys",
    "F2": "a key that is given twice",
    "F3": "surprises of YAML 1.1: numbers, dates and booleans that were text",
    "F4": "documents made to explode: bounded in nodes, depth and bytes",
    "F5": "tags, tabs, encodings; anchors and merge keys keep working",
    "F6": "wrong types, values out of range, NaN: all mistakes of a file at once",
    "F7": "models, steps and metrics that are not there: found before any work",
    "F8": "variables in model paths alone, included files below the recipe alone",
    "F9": "values that look like options, patterns or addresses",
    "F10": "a recipe written for a newer release",
    "F11": "tokens never appear in output, manifests or errors",
    "G1": "pickle files: nothing in them is ever run",
    "G2": "code that a model brings along: carried, not run",
    "G3": "chat templates are text; they are rendered in a sandbox alone",
    "G4": "recipes from elsewhere name no code, commands or places",
    "G5": "methods are looked up by name among our own",
    "G6": "names with markup in pages and cards: escaped",
    "G7": "terminal sequences in names: shown, not obeyed",
    "G8": "hub models: commits are recorded, failures told apart",
    "H1": "less memory than the work needs: said before the start, or split",
    "H2": "the kernel kills the process: as A1",
    "H3": "no GPU, or one whose memory is used up: decided before the start, refused with a way out",
    "H4": "thread counts change no bit of a merge",
    "H5": "few open files, many shards",
    "H6": "no network, or a cache with holes: the command that fetches is shown",
    "H7": "packages that are missing or too old are named with the version that is needed",
    "H8": "terminals, locales, clocks and pipes change no result",
    "H9": "very long runs: progress in logs is a line a minute",
    "I1": "two runs to one destination",
    "I2": "runs that share caches",
    "I3": "a reader opens the destination while it is replaced",
    "I4": "work that finishes in another order gives the same bytes",
    "J1": "a step fails: finished ones stay, the report says which",
    "J2": "a gate fails: exit 4, value and threshold are shown, the result is kept or withheld",
    "J3": "calibration text that is empty, short, padded or less than asked for",
    "J4": "experts or channels that the text never reaches",
    "J5": "Hessians that cannot be inverted: damping follows a fixed schedule and is recorded",
    "J6": "targets out of reach: refused before the work, with the range",
    "J7": "latency tables of another machine or library",
    "J8": "metrics without a value, and limited runs, pass no gate",
    "J9": "random methods, killed and resumed, equal an undisturbed run",
    "J10": "models are evaluated before they are published",
}
"""Identifier -> what goes wrong and what holds then."""


@functools.cache
def identifiers() -> dict[str, list[str]]:
    """Return identifier -> tests that carry it."""
    sys.path.insert(0, str(Path(__file__).parent))  # the corpus is a module beside this one
    from test_hostile import CASES

    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        text = file.read_text("utf-8")
        if not re.search(r"def test_\w*?[A-J]\d+_", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for part in re.findall(r"(?<=_)[A-J]\d+(?=_)", node.name):
                    found.setdefault(part, []).append(f"{file.relative_to(TESTS)}::{node.name}")
    for name in CASES:
        found.setdefault(name.split()[0], []).append(f"faults/test_hostile.py, folder “{name}”")
    return found


def page() -> str:
    """Return the page."""
    lines = [
        "# What can go wrong, and what holds then",
        "",
        "Three promises: the destination is absent, unchanged, or complete and verified; exit code 0 means that the result",
        "was read back from disk and matches the plan; inputs are never modified and nothing in them is executed. Each",
        "fault below has tests that provoke it. This page is made by `python tests/faults/table.py`; a test fails when it is",
        "stale, or when a fault has no test.",
        "",
    ]
    found = identifiers()
    for letter, title in GROUPS.items():
        lines += [f"## {letter}. {title}", ""]
        for name, text in FAULTS.items():
            if name[0] == letter:
                lines += [f"**{name}** {text}", "", *(f"- `{test}`" for test in found.get(name, ())), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    without = [name for name in FAULTS if name not in identifiers()]
    print(
        f"{PAGE.name}: {len(FAULTS)} faults" + (f"; without a test: {', '.join(without)}" if without else "")
    )
