"""Which criterion keeps what a mixture of experts knows: ``python benchmarks/experts/compare.py MODEL --output OUT``.

MODEL is what ``train.py`` made. One calibration pass is taken (and kept in OUT); every criterion that scores experts is
re-selected from it; NAEE searches on a part of the same text. The loss of every choice is that of the stock model whose
dropped experts' router logits are minus infinity (``masks.py``); for every criterion of scores a pruned model is also really
written by ``surgeon.prune``, read back by transformers and compared with that. Methods that merge exist only as written models.

Held out: blocks of four domains of documents that neither training nor calibration saw. Intervals are 95 %: bootstrap
over blocks within every domain, and over the 20 draws where chance is involved. Losses are kept in OUT/losses, so that an
interrupted run goes on where it was.

Writes OUT/rows.json, and RESULTS.md beside this file unless ``--page`` says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import intervals
import numpy as np
import page
import torch
import transformers
from masks import Channels, Kept, Masked, losses

import surgeon
from surgeon.calibrate import data
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.experts import criteria
from surgeon.experts.select import select
from surgeon.experts.statistics import RoutingStatistics, collect_statistics
from surgeon.experts.super_experts import super_experts
from surgeon.prune.experts import heapr, widths
from surgeon.prune.experts.subsets import naee
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.find import experts_of

SHARES = (0.75, 0.5, 0.25)
ROUTING = ("easy-ep", "reap", "reap-l2", "rean", "frequency", "gate-mass", "ean", "man", "msan")
WEIGHTS = ("aimer", "router-distance", "router-norm")
MERGING = ("stun", "hc-smoe", "m-smoe")
NAEE_TOKENS = 1 << 14
"""Of the calibration text that NAEE's search looks at, evenly spaced: it tries some 1,100 subsets a layer."""
OTHERWISE = ("easy-ep", "reap", "man")
"""Criteria measured in the other way of mixing domains, too."""
BY_DOMAIN = ("easy-ep", "rean", "reap", "frequency", "gate-mass", "ean", "man")
DEMONSTRATIONS = (5, 10, 25)
SPARSITIES = (0.2, 0.25, 0.4, 0.5)
CHANNELS = ("heapr", "heapr-all", "joint", "magnitude")
DRAWS = 20
CHANNEL_DRAWS = 10
FEW_DRAWS = 5
OVERLAP_DRAWS = 200


@dataclass
class Bench:
    """One model, its held-out text and everything measured so far.

    Attributes:
        folder, output: the model; where things are kept.
        masked: the stock model in memory.
        held_out: domain -> int32 [blocks, context].
        parent: losses of the model itself.
        rows: what goes to rows.json, by section.
    """

    folder: Path
    output: Path
    masked: Masked
    held_out: dict[str, np.ndarray]
    threads: int
    parent: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        content = hashlib.sha256((self.folder / "model.safetensors").read_bytes())
        for rows in self.held_out.values():
            content.update(rows.tobytes())
        self.key = content.hexdigest()
        self.checkpoint = open_path(self.folder)
        self.experts = experts_of(self.checkpoint)
        self.domains = tuple(self.held_out)
        (self.output / "losses").mkdir(parents=True, exist_ok=True)
        self.parent = self.losses()

    def losses(self, kept: Kept | None = None, channels: Channels | None = None) -> dict[str, np.ndarray]:
        """Return the block losses under a choice, from an earlier run where there was one."""
        cut = ExpertCut(dict(kept or {}), dict(channels or {}))
        file = (
            self.output
            / "losses"
            / f"{hashlib.sha256((self.key + cut.identity()).encode()).hexdigest()[:24]}.npz"
        )
        if not file.exists():
            with self.masked.only(kept, channels):
                found = self.masked.losses(self.held_out)
            np.savez(file, **found)
        with np.load(file) as stored:
            return {domain: stored[domain] for domain in self.domains}

    def row(
        self, found: Mapping[str, np.ndarray], chance: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> dict[str, Any]:
        """Return losses by domain, their mean increase, and the difference to the mean of random draws."""
        row: dict[str, Any] = {
            "loss": {domain: float(found[domain].mean()) for domain in self.domains},
            "increase": {
                domain: vars(intervals.difference(found, self.parent, [domain])) for domain in self.domains
            },
            "mean increase": vars(intervals.difference(found, self.parent)),
        }
        if chance:
            row["against random"] = vars(intervals.against_draws(found, chance))
        return row


def mean_of(draws: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the mean loss of every block over draws."""
    return {domain: np.mean([draw[domain] for draw in draws], axis=0) for domain in draws[0]}


# ---- whole experts -------------------------------------------------------------------------------


def statistics_of(bench: Bench, samples: Sequence[data.Sample], record: dict) -> RoutingStatistics:
    """Return the statistics of the calibration text, from one pass that is kept."""
    file = bench.output / "routing.safetensors"
    if file.exists():
        return RoutingStatistics.load(file, bench.checkpoint)
    found = collect_statistics(
        bench.checkpoint, samples, Settings(threads=bench.threads), bench.experts, about=record
    )
    found.save(file)
    return found


def kept_by(bench: Bench, statistics: RoutingStatistics, name: str, keep: int, domain: str | None = None, seed: int = 0, how: criteria.Mix = "auto") -> Kept:  # fmt: skip
    """Return what a criterion keeps: from all domains mixed, or from one."""
    criterion, kept = criteria.get(name), {}
    for layer in bench.masked.layers:
        seen = statistics.total(layer) if domain is None else statistics.domains[domain][layer]
        if criterion.needs == "routing":
            scores = (
                criteria.mixed(statistics, criterion, layer=layer, how=how)
                if domain is None
                else criterion.score(seen)
            )
        elif criterion.needs == "weights":
            scores = criterion.score(bench.checkpoint, bench.experts, bench.experts.layer(layer))
        else:
            scores = criterion.score(layer, bench.masked.experts, seed)
        kept[layer] = select(scores, seen.tokens, keep)
    return kept


def random_draws(bench: Bench, statistics: RoutingStatistics, keep: int) -> list[dict[str, np.ndarray]]:
    return [bench.losses(kept_by(bench, statistics, "random", keep, seed=seed)) for seed in range(DRAWS)]


def kept_by_naee(bench: Bench, samples: Sequence[data.Sample], keep: int, say: Callable[[str], None]) -> Kept:
    """Return what NAEE keeps, from an earlier run where there was one."""
    file = bench.output / f"naee-{bench.key[:16]}-{NAEE_TOKENS}-{keep}.json"
    if not file.exists():
        cut, record = naee(
            bench.checkpoint, [sample.ids for sample in samples], Settings(threads=bench.threads), bench.experts, keep,
            most_tokens=NAEE_TOKENS,
        )  # fmt: skip
        tokens = min(layer["tokens"] for layer in record["layers"].values())
        file.write_text(
            json.dumps({"kept": cut.document()["kept"], "tokens": tokens, "search": record["search"]})
        )
    document = json.loads(file.read_text())
    bench.rows["naee"] = {"tokens": document["tokens"]}
    say(f"naee, {keep} experts: {document['search']} search on {document['tokens']:,} tokens")
    return {int(layer): tuple(ids) for layer, ids in document["kept"].items()}


def mixed_choices(
    bench: Bench, statistics: RoutingStatistics, samples: Sequence[data.Sample], say: Callable[[str], None]
) -> None:
    """Every criterion calibrated on all domains, at every share."""
    rows = bench.rows["mixed"] = []
    merged = {name: losses_of_merged(bench, name, say) for name in MERGING}
    for share in SHARES:
        keep = round(share * bench.masked.experts)
        chance = random_draws(bench, statistics, keep)
        row = bench.row(mean_of(chance))
        row["mean increase"] = vars(intervals.mean_of_draws(chance, bench.parent))
        row["increase"] = {d: vars(intervals.mean_of_draws(chance, bench.parent, [d])) for d in bench.domains}
        row["draws"] = vars(
            intervals.over_draws([float(np.mean([one[d].mean() for d in one])) for one in chance])
        )
        found = {}
        rows.append({"criterion": "random", "share": share, **row})
        for name in (*ROUTING, *WEIGHTS):
            found[name] = bench.losses(kept_by(bench, statistics, name, keep))
            rows.append({"criterion": name, "share": share, **bench.row(found[name], chance)})
            say(f"{name} {share:.0%}: {rows[-1]['mean increase']['mean']:.3f}")
        for name in OTHERWISE:
            label, how = (
                (f"{name} (by domain)", "mean")
                if criteria.get(name).averaged
                else (f"{name} (pooled)", "pool")
            )
            found[label] = bench.losses(kept_by(bench, statistics, name, keep, how=how))
            rows.append(
                {
                    "criterion": label,
                    "share": share,
                    **bench.row(found[label], chance),
                }
            )
        found["naee"] = bench.losses(kept_by_naee(bench, samples, keep, say))
        rows.append({"criterion": "naee", "share": share, **bench.row(found["naee"], chance)})
        for name in MERGING:
            found[name] = merged[name][keep]
            rows.append({"criterion": name, "share": share, **bench.row(found[name], chance)})
        best = min(found, key=lambda name: np.mean([found[name][d].mean() for d in bench.domains]))
        for row in rows:
            if row["share"] == share and row["criterion"] in found:
                row["against best"] = vars(intervals.difference(found[row["criterion"]], found[best]))
                row["best"] = row["criterion"] == best


def domain_choices(bench: Bench, statistics: RoutingStatistics, say: Callable[[str], None]) -> None:
    """Criteria calibrated on one domain: what that domain loses, and what the others do.

    A summary row is over all four choices: each domain's loss under the choice made for it, and under the other three.
    """
    rows, detail = [], []
    for share in SHARES:
        keep = round(share * bench.masked.experts)
        chance = random_draws(bench, statistics, keep)
        own = {}
        for name in BY_DOMAIN:
            found = {
                domain: bench.losses(kept_by(bench, statistics, name, keep, domain))
                for domain in bench.domains
            }
            own[name] = {domain: found[domain][domain] for domain in bench.domains}
            others = {domain: np.mean([found[other][domain] for other in bench.domains if other != domain], axis=0)
                      for domain in bench.domains}  # fmt: skip
            rows.append({
                "criterion": name, "share": share, "increase": {domain: float((own[name][domain] - bench.parent[domain]).mean()) for domain in bench.domains},
                "own": vars(intervals.difference(own[name], bench.parent)), "own against random": vars(intervals.against_draws(own[name], chance)),
                "others": vars(intervals.difference(others, bench.parent)), "others against random": vars(intervals.against_draws(others, chance)),
            })  # fmt: skip
            detail += [
                {"criterion": name, "share": share, "domain": domain, **bench.row(found[domain], chance)}
                for domain in bench.domains
            ]
            say(
                f"{name} on one domain, {share:.0%}: own {rows[-1]['own']['mean']:.3f}, others {rows[-1]['others']['mean']:.3f}"
            )
        best = min(own, key=lambda name: np.mean([own[name][domain].mean() for domain in bench.domains]))
        for row in rows[-len(own) :]:
            row["against best"] = vars(intervals.difference(own[row["criterion"]], own[best]))
            row["best"] = row["criterion"] == best
    bench.rows["one domain"], bench.rows["one domain, each"] = rows, detail


# ---- localisation --------------------------------------------------------------------------------


def localisation(bench: Bench, statistics: RoutingStatistics, say: Callable[[str], None]) -> None:
    """How few demonstrations EASY-EP needs: overlap of the half chosen from some with that chosen from all."""
    keep = bench.masked.experts // 2
    rows = bench.rows["localisation"] = []
    whole = {domain: localised(statistics, domain, None, keep) for domain in bench.domains}
    chance = random_draws(bench, statistics, keep)
    for place, domain in enumerate(bench.domains):
        count_of_all = statistics.domains[domain][0].demos
        draw = np.random.default_rng([7, place])
        full = bench.losses(whole[domain])
        for count in DEMONSTRATIONS:
            picks = [draw.choice(count_of_all, count, replace=False) for _ in range(OVERLAP_DRAWS)]
            some = [localised(statistics, domain, pick, keep) for pick in picks]
            overlaps = [overlap(one, whole[domain]) for one in some]
            few = [bench.losses(one) for one in some[:FEW_DRAWS]]
            rows.append({
                "domain": domain, "demonstrations": count, "of": count_of_all,
                "tokens": float(count * statistics.domains[domain][0].sample_tokens.mean()),
                "overlap": vars(intervals.over_draws([float(np.mean(one)) for one in overlaps])),
                "by layer": [float(value) for value in np.mean(overlaps, axis=0)],
                "increase": vars(intervals.mean_of_draws(few, bench.parent, [domain])),
                "increase of all": vars(intervals.difference(full, bench.parent, [domain])),
                "increase of random": vars(intervals.mean_of_draws(chance, bench.parent, [domain])),
            })  # fmt: skip
            say(f"{domain}, {count} demonstrations: overlap {rows[-1]['overlap']['mean']:.3f}")
    bench.rows["overlap of domains"] = {
        one: {other: float(np.mean(overlap(whole[one], whole[other]))) for other in bench.domains} for one in bench.domains
    }  # fmt: skip


def localised(statistics: RoutingStatistics, domain: str, samples: np.ndarray | None, keep: int) -> Kept:
    """Return EASY-EP's choice from some demonstrations of a domain, from all when None."""
    found = {}
    for layer, seen in statistics.domains[domain].items():
        each = seen.easy_by_sample if samples is None else seen.easy_by_sample[samples]
        found[layer] = select(each.astype(np.float64).sum(0), seen.tokens, keep)
    return found


def overlap(one: Kept, other: Kept) -> list[float]:
    """Return the share of kept experts that two choices have in common, by layer."""
    return [len(set(one[layer]) & set(other[layer])) / len(one[layer]) for layer in one]


# ---- channels ------------------------------------------------------------------------------------


def channel_choices(bench: Bench, samples: Sequence[data.Sample], say: Callable[[str], None]) -> None:
    """HEAPr against magnitude and random channels, one width for all and the global ranking."""
    measured = channels_of(bench, samples)
    bench.rows["random channel draws"] = CHANNEL_DRAWS
    rows = bench.rows["channels"] = []
    for layout in ("uniform", "ragged"):
        for share in SPARSITIES:
            chance = [
                bench.losses(channels=narrowed(bench, measured.by("random", seed), share, layout))
                for seed in range(CHANNEL_DRAWS)
            ]
            row = bench.row(mean_of(chance)) | {
                "mean increase": vars(intervals.mean_of_draws(chance, bench.parent))
            }
            rows.append(
                {"criterion": f"random, mean of {CHANNEL_DRAWS}", "sparsity": share, "layout": layout, **row}
            )
            names = [name for name in CHANNELS if layout == "ragged" or name != "heapr-all"]
            found = {
                name: bench.losses(channels=narrowed(bench, measured.by(name), share, layout))
                for name in names
            }
            for name, one in found.items():
                row = bench.row(one, chance)
                if name != "magnitude":
                    row["against magnitude"] = vars(intervals.difference(one, found["magnitude"]))
                rows.append({"criterion": name, "sparsity": share, "layout": layout, **row})
                say(f"{name}, {layout}, {share:.0%}: {row['mean increase']['mean']:.3f}")


def channels_of(bench: Bench, samples: Sequence[data.Sample]) -> heapr.ChannelScores:
    """Return the channels' sums on the calibration text, from one pass that is kept."""
    file = bench.output / "channels.safetensors"
    settings = Settings(threads=bench.threads)
    if not file.exists():
        heapr.channel_scores(bench.checkpoint, samples, settings, bench.experts).save(file)
    return heapr.ChannelScores.load(file, heapr.about_of(bench.checkpoint, samples, settings))


def narrowed(
    bench: Bench, scores: heapr.ChannelScores, share: float, layout: Literal["uniform", "ragged"]
) -> Channels:
    """Return the channels that stay; exact shares, so widths are not rounded."""
    cut = widths.choose(scores, bench.experts, sparsity=share, layout=layout, round_to=1, min_width=1).cut
    return {place: tuple(ids) for place, ids in cut.channels.items()}


# ---- written models ------------------------------------------------------------------------------


def text_of(bench: Bench) -> dict[str, Any]:
    """Return the options that make surgeon.prune calibrate on the same file."""
    return {
        "calibration": (str(bench.folder / "calibration.jsonl"),),
        "samples": 1024,
        "sequence_length": 128,
    }


def losses_of_merged(bench: Bench, name: str, say: Callable[[str], None]) -> dict[int, dict[str, np.ndarray]]:
    """Return the losses of a merging method's models by experts kept; all written in one run."""
    keeps = [round(share * bench.masked.experts) for share in SHARES]
    files = {keep: bench.output / "losses" / f"{bench.key[:16]}-{name}-{keep}.npz" for keep in keeps}
    if not all(file.exists() for file in files.values()):
        folder = bench.output / "models" / name
        made = written_by(
            bench, folder, {"method": name, "keep_experts": [str(keep) for keep in keeps], **text_of(bench)}
        )
        for keep, member in zip(keeps, made["members"], strict=True):
            assert member["experts_per_layer"] == keep
            np.savez(files[keep], **losses_of_folder(bench, Path(member["path"])))
        shutil.rmtree(folder)
        say(f"{name}: three models written")
    found = {}
    for keep, file in files.items():
        with np.load(file) as stored:
            found[keep] = {domain: stored[domain] for domain in bench.domains}
    return found


def losses_of_written(bench: Bench, folder: Path, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Prune with surgeon, load the result with transformers, return its losses."""
    written_by(bench, folder, options)
    return losses_of_folder(bench, folder)


def written_by(bench: Bench, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Prune with surgeon and return its document."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return surgeon.prune(
        bench.folder, folder, threads=bench.threads, overwrite=True, no_protect=True, offline=True, **options
    )


def losses_of_folder(bench: Bench, folder: Path) -> dict[str, np.ndarray]:
    """Return the losses of a model as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    return losses(model, bench.held_out)


def written(bench: Bench, statistics: RoutingStatistics, say: Callable[[str], None]) -> None:
    """Write half of the experts for every criterion and compare the losses with those under masks."""
    keep = bench.masked.experts // 2
    rows = bench.rows["written"] = []
    for name in (*ROUTING, *WEIGHTS, "random"):
        folder = bench.output / "models" / name / "0.50"
        scores = {"scores": str(bench.output / "routing.safetensors")}
        found = losses_of_written(
            bench, folder, {"method": name, "keep_experts": str(keep), **scores, **text_of(bench)}
        )
        expected = bench.losses(kept_by(bench, statistics, name, keep))
        largest = max(float(np.abs(found[domain] - expected[domain]).max()) for domain in bench.domains)
        rows.append({"criterion": name, "largest difference": largest})
        say(f"{name} written: largest difference of a block's loss {largest:.2e}")
        shutil.rmtree(folder)
    folder = bench.output / "models" / "heapr" / "0.50"
    found = losses_of_written(
        bench, folder, {"method": "heapr", "sparsity": 0.5, "round_to": 8, **text_of(bench)}
    )
    expected = bench.losses(channels=written_channels(bench, folder))
    largest = max(float(np.abs(found[domain] - expected[domain]).max()) for domain in bench.domains)
    rows.append({"criterion": "heapr, half the channels", "largest difference": largest})
    say(f"heapr written: largest difference of a block's loss {largest:.2e}")
    shutil.rmtree(folder)


def written_channels(bench: Bench, folder: Path) -> Channels:
    """Return the channels that a written model says it kept."""
    report = json.loads((folder / "pruning.json").read_text())
    return ExpertCut.from_document(report["experts"]).channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path(__file__).resolve().parent / "RESULTS.md")
    parser.add_argument("--blocks", type=int, default=128, help="held-out blocks of every domain")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    begun = time.perf_counter()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    with np.load(options.model / "held_out.npz") as stored:
        held_out = {domain: stored[domain][: options.blocks] for domain in stored.files}
    bench = Bench(options.model, options.output, Masked(options.model), held_out, options.threads)

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - begun:5.0f} s] {line}", flush=True)

    text = data.load(str(options.model / "calibration.jsonl"), options.model, samples=1024, sequence_length=128, offline=True)  # fmt: skip
    statistics = statistics_of(bench, text.samples, text.record)
    say(f"calibrated on {text.record['samples']} samples")
    bench.rows["super experts"] = [vars(one) for one in super_experts(statistics, bench.experts)]
    peaks = np.stack([statistics.total(layer).peak for layer in bench.masked.layers])
    bench.rows["peaks"] = {
        "layers": [{"largest": float(one.max()), "median": float(np.median(one))} for one in peaks]
    }
    mixed_choices(bench, statistics, text.samples, say)
    domain_choices(bench, statistics, say)
    localisation(bench, statistics, say)
    channel_choices(bench, text.samples, say)
    written(bench, statistics, say)
    bench.rows |= {
        "training": json.loads((options.model / "training.json").read_text()),
        "parent": bench.row(bench.parent), "calibration": text.record, "blocks": {d: len(r) for d, r in held_out.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()},
    }  # fmt: skip
    (options.output / "rows.json").write_text(json.dumps(bench.rows, indent=1) + "\n")
    options.page.write_text(page.render(bench.rows))
    say(f"wrote {options.page}")


if __name__ == "__main__":
    main()
