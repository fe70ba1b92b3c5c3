"""DLER and ReCUT, structurally: what their merges do to numbers, published claim beside measurement.

    python benchmarks/long_to_short/structure.py

One command, about three minutes on one core; prints the tables and writes them to STRUCTURE.md
beside this file. No model is downloaded: simulated weights, and the trained models of tests/models.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dler_structure as dler
import recut_structure as recut

import surgeon

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "tests" / "models"

CLAIMED = {
    1e-5: ("11.7", "0", "11.7", "100", ".89", ".12"),
    3e-5: ("32", "> 0", "25", "98", ".88", ".14"),
    1e-4: ("68", "> 0", "25 (37 with ties)", "89", ".79", ".25"),
    1e-3: ("96", "> 0", "25", "73", ".70", ".40"),
}
"""A simulation that circulates with the method: changed %, threshold, kept %, energy %, scale at .7, at .4."""

ONE_ENTRY: dict[str, dict[str, Any]] = {
    "weight .5, normalize": {"weight": 0.5},
    "weight .9, normalize": {"weight": 0.9},
    "weight .25, no normalize": {"normalize": False},
    "lambda .25": {"lam": 0.25},
}
"""Changes to the released file with one entry, whose weight is .25 and which normalizes."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def simulated(place: Path, entries: int) -> str:
    """Return the table of simulated weights: claim, surgeon's report, whole sort."""
    rows = []
    for spread in dler.SPREADS:
        base, tuned = dler.simulated_pair(spread, entries)
        sources = {
            "surgeon": dler.measured(base, tuned, place),
            "sorted": dler.by_sorting(base, tuned),
            "sorted, all ties": dler.by_sorting(base, tuned, ties="all"),
        }
        rows.append([f"{spread:g}", "claimed", *CLAIMED[spread]])
        for source, f in sources.items():
            rows.append(["", source, percent(f.changed), f"{f.threshold:.2e}" if f.threshold else "0", percent(f.kept),
                         percent(f.energy), f"{f.effective[0.7]:.3f}", f"{f.effective[0.4]:.3f}"])  # fmt: skip
    return table(
        ["s", "source", "changed %", "threshold", "kept %", "energy kept %", "scale at .7", "at .4"], rows
    )


def stochastic(place: Path, entries: int, seeds: int) -> str:
    rows = []
    for spread in dler.SPREADS:
        base, tuned = dler.simulated_pair(spread, entries)
        for scale in (0.7, 0.4):
            nearest = dler.measured(base, tuned, place, (scale,)).effective[scale]
            single, mean = dler.stochastic_scales(base, tuned, place, scale, seeds)
            rows.append([f"{spread:g}", scale, f"{nearest:.3f}", f"{single:.4f}", f"{mean:.4f}"])
    return table(["s", "scale asked", "nearest", "stochastic, one seed", f"mean of {seeds} seeds"], rows)


def scopes(place: Path) -> str:
    rows = []
    for tuned, base in (("short", "long"), ("long", "short"), ("short", "base"), ("long", "base")):
        for scope in ("tensor", "layer", "global"):
            f, _ = dler.merge_scope(MODELS / tuned, MODELS / base, place, scope)
            check = dler.scope_by_sorting(MODELS / tuned, MODELS / base, scope)
            kinds = [percent(f.by_kind[k]) for k in ("embedding", "attention", "mlp", "biases", "norms")]
            rows.append([f"{tuned} onto {base}", scope, percent(f.changed), f"{percent(f.kept, 2)} / {percent(check[0], 2)}",
                         f"{percent(f.energy)} / {percent(check[1])}", f"{f.effective:.3f} / {check[2]:.3f}",
                         *kinds])  # fmt: skip
    head = ["pair", "scope", "changed %", "kept %", "energy kept %", "effective scale",
            "embedding", "attention", "mlp", "biases", "norms"]  # fmt: skip
    return table(head, rows)


def two_entries(entries: int, seeds: int) -> str:
    rows: list[list[object]] = [["claimed", ".5625", ".375", ".0625", "1 (about)"]]
    for opposed in (False, True):
        found = [recut.survival(entries, seed, opposed=opposed) for seed in range(seeds)]
        mean = [
            float(np.mean([getattr(s, part) for s in found])) for part in ("none", "once", "both", "mean")
        ]
        rows.append(
            ["signs opposed, 1 and -2" if opposed else "signs equal, 1 and 2", *[f"{v:.4f}" for v in mean]]
        )
        rows.append(["closed form", ".5625", ".3750", ".0625", "1.25" if opposed else ".875"])
    return table(["updates", "neither survives", "one", "both", "mean / (d_A + d_L)"], rows)


def one_entry(place: Path, seeds: int) -> str:
    long, short = MODELS / "long", MODELS / "short"
    rows = []
    for dtype in ("bfloat16", "float32"):
        first = recut.released(long, short, place / "one", dtype=dtype)
        for label, options in ONE_ENTRY.items():
            other = recut.released(long, short, place / "two", dtype=dtype, **options)
            unequal = sum(int((first[n] != other[n]).sum()) for n in first)
            share = unequal / sum(v.numel() for v in first.values())
            change = recut.distance(first, other) / recut.distance(first, recut.tensors(short))
            rows.append([label, dtype, percent(share, 2), f"{change:.1e}" if change else "0"])
    same = table(["against weight .25, normalize", "dtype", "entries that differ %", "length / update"], rows)
    rows = []
    for lam in (1.0, 0.25):
        f = recut.reading_a(long, short, place, seeds, lam=lam)
        rows.append([lam, f"{f.single_to_model:.3f}", f"{f.single_to_base:.3f}", f"{f.mean_to_model:.3f}",
                     f"{f.mean_to_base:.3f}", f"{f.along:.4f}"])  # fmt: skip
    head = [
        "lambda",
        "one seed to A",
        "one seed to L",
        f"mean of {seeds} to A",
        "mean to L",
        "mean, way from L to A",
    ]
    return same + "\n\n" + table(head, rows)


def erased(place: Path) -> str:
    rows = [
        [label, percent(1 - s.changed, 2), f"{s.length:.3f}", f"{s.along:.3f}"]
        for label, s in recut.erasure(MODELS / "base", place).items()
    ]
    return table(["way", "unchanged entries %", "length of y - b", "part of d that arrived"], rows)


def end_points(place: Path) -> str:
    rows = []
    for base in (None, MODELS / "base"):
        for t, end in ((0, "long"), (1, "short")):
            surgeon.merge([str(MODELS / "long"), str(MODELS / "short")], method="interpolate", t=t, threads=1,
                          base=str(base) if base else None, output=place / "end", overwrite=True)  # fmt: skip
            same = all(
                (v == recut.tensors(MODELS / end)[n]).all() for n, v in recut.tensors(place / "end").items()
            )
            rows.append(
                ["with a base" if base else "two models", t, f"{end}, bit for bit" if same else "differs"]
            )
    merged = {
        dtype: recut.tensors(surgeon.merge(
            [str(MODELS / "short")], base=str(MODELS / "long"), method="task-arithmetic", dtype=dtype, threads=1,
            output=place / "valve", overwrite=True, param={"lambda": 2.0}).path)
        for dtype in ("float32", "bfloat16")
    }  # fmt: skip
    long, short = recut.tensors(MODELS / "long"), recut.tensors(MODELS / "short")
    for dtype, state in merged.items():
        gap = 0.0
        for name, value in state.items():
            exact = long[name].double() + 2 * (short[name].double() - long[name].double())
            step = exact.abs().clamp_min(2.0**-100).log2().floor().exp2() * (
                2.0**-23 if dtype == "float32" else 2.0**-7
            )
            gap = max(gap, float(((value.double() - exact).abs() / step).max()))
        rows.append([f"CoT-Valve, alpha 2, {dtype}", 2, f"b + 2 d to within {gap:.2f} steps of {dtype}"])
    return table(["merge", "t", "result"], rows)


def answers(place: Path, questions: int) -> str:
    """Return accuracy and answer length over t: the trained models answer held-out questions."""
    sys.path.insert(0, str(MODELS))
    import evaluate
    from transformers.utils import logging

    logging.disable_progress_bar()
    long, short, base = (str(MODELS / name) for name in ("long", "short", "base"))
    sweeps = {
        "long to short": ([long, short], {"method": "interpolate", "sweep": ("t=-0.25:1.5:0.25",)}),
        "base + lambda (d_long + d_short) / 2": (
            [long, short],
            {
                "method": "task-arithmetic",
                "base": base,
                "weight": (0.5, 0.5),
                "sweep": ("lambda=0.5:1.5:0.5",),
            },
        ),
        "DLER, short onto long, scale": ([short, long], {"method": "dler", "sweep": ("scale=0.4:1:0.3",)}),
    }
    rows = []
    for number, (label, (models, options)) in enumerate(sweeps.items()):
        out = place / f"sweep-{number}"
        done = surgeon.merge(models, output=out, threads=1, **options)
        assert not isinstance(done, dict)
        for key, folder in done.models.items():
            report = evaluate.evaluate(folder, questions=questions, seed=1)
            rows.append([label, key.partition("=")[2], f"{report.accuracy:.3f} ({report.low:.3f}-{report.high:.3f})",
                         f"{report.mean_tokens:.1f}", percent(report.capped, 0)])  # fmt: skip
        shutil.rmtree(out)
    return table(["merge", "value", "accuracy (95 % Wilson)", "mean tokens", "cut off %"], rows)


def released_trim(entries: int) -> str:
    rows = []
    for label, (base, tuned) in {
        "float32, N(0, 1)": (np.zeros(entries), np.random.default_rng(0).normal(0, 1, entries)),
        "bfloat16, s = 1e-3": dler.simulated_pair(1e-3, entries),
        "bfloat16, s = 1e-4": dler.simulated_pair(1e-4, entries),
    }.items():
        size = np.abs(tuned.astype(np.float64) - base)
        for removed in (0.8, 0.25, 0.2):
            theirs = dler.released_trim_count(size, removed)
            formula = entries - int(entries * removed) + 1
            ours = dler.ties_count(base, tuned, 1 - removed)
            rows.append([label, removed, f"{formula:,}", f"{theirs:,}", f"{ours:,}", f"{theirs - ours:+,}"])
    head = ["difference", "k", "N - floor(N k) + 1", "released rule keeps", "surgeon keeps", "more"]
    return table(head, rows)


TEXT = """\
# DLER and ReCUT, structurally

Made by `python benchmarks/long_to_short/structure.py`; do not edit. "Claimed" is what was published or circulates with
the method, "surgeon" what this program's own merges report, "sorted" an independent whole-tensor sort in NumPy.

## 1. DLER on simulated weights

Weights N(0, .02^2) in bfloat16; a float32 change of standard deviation s is added and the sum cast to bfloat16; the merge
keeps the largest 25 % of the changes. {entries:,} entries. "scale" is sum |y - b| / sum |M d|: what is left of the
factor that was asked for after y was rounded to bfloat16.

{simulated}

The claims hold except for s = 1e-4. There 23 % of the tensor ties with the threshold 2^-13, which is one bfloat16 step of the
weights between .0156 and .0313. Keeping exactly 25 %, as the rule says, keeps 72 % of the energy and comes out at a scale of
.77 (.27 for .4); the claimed 89 %, .79 and .25 are those of keeping every tie, which keeps 37 %. For s = 1e-3 the claimed
73 % is the same effect, half a point. Surgeon keeps the exact count, and spreads it evenly over the tied entries.

Consequences for use: below s of about 3e-5 (a few steps of reinforcement learning) keep trims nothing, and a scale of
.7 acts like .9 and one of .4 like .1. Write float32, or round stochastically:

{stochastic}

Stochastic rounding keeps the scale that was asked for, at every s, already for one seed.

## 2. DLER on the trained models, 25 % x 0.7

`tests/models`: a Qwen2 of 1.2 million parameters; long and short were trained from base. Cells with a slash: surgeon / sorted.
The last five columns are the share kept in each kind of tensor.

{scopes}

Kept is 0.03 points below 25 % per tensor because norms hardly move: their weights lie near 1, where one bfloat16 step is
.0078, so that fewer entries changed than keep asks for. Over the whole model the ranking is by absolute size: onto base the
embedding takes two thirds of its entries and attention a sixth; between long and short (both away from base) it is
the mlp that gains. Per tensor every kind keeps its quarter, at 7 to 8 points less energy.

## 3. ReCUT's released merge

Two entries at density .25 over a common base, {survival_entries:,} positions, mean of 4 seeds.

{two_entries}

The shares are as claimed. The mean is not d_A + d_L: where both survive they are averaged, which takes an eighth off
updates of equal sign; where they are opposed the larger one alone is applied. Weights .25 and .25 do not scale anything.

One entry, over the other specialist as the base (long = A onto short = L), as the released file has it:

{one_entry}

weight cancels under normalize, as claimed, up to rounding: powers of two leave every bit (.25 and .5 are equal), .9 moves
some entries by a last place, here and in mergekit. normalize off and lambda are what scales. In the mean over seeds the
merge is A, not an interpolation at .25, as claimed; but one merged model is sqrt(3) = 1.73 times as far from A as L is, and
twice as far from L as A is: the noise of a fourfold rescale is larger than the difference between the two specialists.
lambda .25 interpolates.

## 4. Updates below half a step

b from N(0, .02^2) in bfloat16, two rank-8 adapters whose updates have a standard deviation of 1e-6.

{erased}

More than 98 % of the entries do not change when an adapter is folded into a bfloat16 model, and 3 % of the update arrives.
Folding in while merging keeps all of it as long as the result is float32. **Written as bfloat16 it is lost all the same**: that
this way keeps the expectation needs float32 output, or stochastic rounding, which dler has. A stochastically rounded model
holds the whole update, and ten times its length in rounding noise.

## 5. End points and extrapolation

{end_points}

{questions} held-out questions to the models of a sweep, greedy, at most 448 tokens:

{answers}

Plain interpolation is monotone in length from end to end. Beyond the short end there is nothing to gain with these models:
length stays and accuracy falls, until at t = 1.5 the model breaks. Two siblings with shares 1 - t and t make the same model as
interpolating between them, whatever their base: b + (1 - t)(A - b) + t(L - b) = (1 - t) A + t L. The base matters when the
shares do not sum to 1.

## 6. Trimming in the released long-to-short code

Its rule |d| >= (the floor(N k)-th smallest |d|) keeps the threshold itself and every tie. {trim_entries:,} entries.

{released_trim}

Entries that did not change are not counted. Without ties it keeps one entry more, or two where floor(N k) and floor(N (1 - k))
both round down. bfloat16 differences tie by the thousand: at s = 1e-4 and k = .8 it keeps 37 % where 20 % were meant.
`trim_ties: all` is that behaviour. Its other rules make no difference here: a zero sum counts as positive, but one model's
signs elect themselves. It computes in bfloat16, as `dtype: bfloat16` in a mergekit file does.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE / "STRUCTURE.md")
    parser.add_argument("--entries", type=int, default=1 << 22, help="size of simulated tensors")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    memory = Path("/dev/shm")
    with contextlib.ExitStack() as stack:
        place = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None))
        )
        small = max(1024, options.entries // 4)
        parts = {
            "simulated": simulated(place, options.entries),
            "stochastic": stochastic(place, small, 8),
            "scopes": scopes(place),
            "two_entries": two_entries(small, 4),
            "one_entry": one_entry(place, 64),
            "erased": erased(place),
            "end_points": end_points(place),
            "answers": answers(place, options.questions),
            "released_trim": released_trim(small),
        }
    text = TEXT.format(
        **parts,
        entries=options.entries,
        survival_entries=small,
        trim_entries=small,
        questions=options.questions,
    )
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
