"""What one run of pruning experts shares between its targets: the model, its experts, texts, statistics; each made once."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgeon import __version__
from surgeon.architectures import expert_records
from surgeon.architectures.expert_records.record import ExpertRecord
from surgeon.calibrate import data
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.derive import Source
from surgeon.errors import InputError, UsageError, Where
from surgeon.experts.statistics import RoutingStatistics, collect_statistics
from surgeon.experts.super_experts import SuperExpert, super_experts
from surgeon.formats.dequantized import runnable
from surgeon.prune.experts.request import WITHOUT_TEXT, ExpertRequest
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import Experts
from surgeon.unwritten.leaving import Leaving

Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]

HELD_OUT_SAMPLES, HELD_OUT_TOKENS = 16, 512
PLACES = frozenset({"model", "work", "threads", "memory_limit", "device", "offline", "calibration", "max_shard_size", "scores", "from_report"})  # fmt: skip
"""Fields of the request that say where and how fast, not what."""
OF_TEXT = ("name", "sha256", "ids_sha256", "statistics", "held_out")


@dataclass(frozen=True)
class Texts:
    """Calibration text divided in two: what statistics are taken from, and what quality is reported on.

    Attributes:
        statistics: samples, with their domains.
        held_out: domain -> token ids.
        record: what the manifest says of them.
        warnings: sentences for the user.
    """

    statistics: tuple[data.Sample, ...]
    held_out: dict[str, tuple[np.ndarray, ...]]
    record: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass
class ExpertSession:
    """One mixture of experts under one request.

    Attributes:
        source, request: the model, and what is asked for.
        work: folder for everything that a later run can take up.
        tell: progress, (what, done, total).
        say: one sentence for the user.
        stop: set to end early.
        leaving: where the result is left unwritten.
    """

    source: Source
    request: ExpertRequest
    work: Path
    tell: Tell
    say: Say
    stop: threading.Event | None = None
    warnings: list[str] = field(default_factory=list)
    leaving: Leaving | None = None

    # ---- the model ---------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @cached_property
    def record(self) -> ExpertRecord | None:
        """The record the user gave, None for that of the family."""
        given = self.request.expert_record
        return expert_records.load(Path(given)) if given else None

    @cached_property
    def experts(self) -> Experts:
        found = experts_of(self.checkpoint, self.record)
        idle = [layer.index for layer in found.layers if not layer.runs]
        if idle and self.request.mtp == "error":
            raise InputError(
                "E407", f"layer {idle[0]} predicts further tokens and has experts of its own, which no forward pass runs",
                where=Where(self.source.path), help="--mtp copy-last gives them the choice of the last layer, --mtp drop leaves them out",
            )  # fmt: skip
        return found

    @cached_property
    def runnable(self) -> Checkpoint:
        """The model as plain numbers, for everything that runs it; slicing keeps to what is stored."""
        return runnable(self.checkpoint)

    @cached_property
    def runnable_experts(self) -> Experts:
        """Its experts: names of stacked ones differ where numbers are packed."""
        if self.runnable is self.checkpoint:
            return self.experts
        return experts_of(self.runnable, self.experts.record)

    @cached_property
    def folder(self) -> Path:
        folder = self.checkpoint.folder
        if folder is None:
            raise InputError("E317", f"{self.source.path} is a bare file: pruning needs config.json and the tokenizer",
                             where=Where(self.source.path), help="give the model folder")  # fmt: skip
        return folder

    @cached_property
    def settings(self) -> Settings:
        r = self.request
        return Settings(device=r.device, dtype=r.calibration_dtype,
                        memory_limit=r.memory_limit, threads=r.threads, spill=self.work / "pass")  # fmt: skip

    @property
    def plain_settings(self) -> Settings:
        """Settings of passes that are not resumed."""
        return replace(self.settings, spill=None)

    # ---- text --------------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> Texts:
        """Calibration text, divided.

        Raises:
            InputError: E314 too few samples to divide; what `surgeon.calibrate.data.load` raises.
        """
        from surgeon.data.records import parse_sources

        r = self.request
        wanted = r.samples_wanted + HELD_OUT_SAMPLES
        found = data.load(
            parse_sources(list(r.calibration)) if r.calibration else None, self.folder, samples=wanted,
            sequence_length=r.tokens_wanted, seed=r.seed, offline=r.offline,
        )  # fmt: skip
        texts = _divided(found, r.samples_wanted)
        self.warnings.extend(texts.warnings)
        if not r.calibration:
            self.say("no --calibration was given: the text that comes with surgeon is used")
        counted = texts.record["statistics"]
        self.say(f"calibrating on {texts.record['name']}: {counted['samples']} samples, {counted['tokens']:,} tokens; "
                 f"{texts.record['held_out']['tokens']:,} tokens held out")  # fmt: skip
        if r.method == "easy-ep" and not r.calibration:
            self.warnings.append("easy-ep chooses for the domain of its text, and this text is general: give about 25 demonstrations "
                                 "of yours (prompt and the model's own answer) with --calibration, or use --method reap")  # fmt: skip
        if r.method == "easy-ep" and counted["samples"] < 5:
            self.warnings.append(
                f"{counted['samples']} demonstrations are few: the choice may change with others; 25 are usual"
            )
        return texts

    @property
    def needs_text(self) -> bool:
        """Whether the choice depends on calibration; protection does wherever it is wanted."""
        r = self.request
        if r.from_report is not None:
            return False
        return r.method not in WITHOUT_TEXT or not r.no_protect

    # ---- statistics --------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> RoutingStatistics:
        """Everything criteria ask for, from one pass; given, kept from an earlier run, or collected now."""
        given = Path(self.request.scores).expanduser() if self.request.scores else None
        if given is not None and given.is_file():
            self.say(f"statistics from {given.name}: the model is not run again for them")
            return RoutingStatistics.load(given, self.runnable)
        kept = self.work / f"routing-{self._text_key}.safetensors"
        if kept.is_file():
            return RoutingStatistics.load(kept, self.runnable)
        found = collect_statistics(
            self.runnable, self.texts.statistics, self.settings, self.runnable_experts, about=self.texts.record,
            progress=lambda done, total: self.tell("calibrating", done, total), stop=self.stop, resume=True,
        )  # fmt: skip
        self.work.mkdir(parents=True, exist_ok=True)
        found.save(kept)
        if given is not None:
            given.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, given)
        return found

    @cached_property
    def supers(self) -> list[SuperExpert]:
        """Super experts of the model, by the statistics."""
        return super_experts(self.statistics, self.experts)

    @cached_property
    def named(self) -> dict[int, frozenset[int]]:
        """Layer -> experts the user protects; known before anything runs.

        Raises:
            UsageError: E258 the model has none of this number.
        """
        found = self.request.protected
        for layer, ids in found.items():
            if layer not in {one.index for one in self.experts.running} or max(ids) >= self.experts.count:
                raise UsageError("E258", f"--protect {layer}:{max(ids)}: the model has {self.experts.count} experts in layers "
                                 f"{self.experts.running[0].index} to {self.experts.running[-1].index}",
                                 help="LAYER:EXPERT, both counted from 0; `surgeon inspect MODEL --experts` lists them")  # fmt: skip
        return found

    @cached_property
    def protected(self) -> dict[int, frozenset[int]]:
        """Layer -> experts that stay whatever their score: super experts, and those the user named."""
        found: dict[int, set[int]] = defaultdict(set, {layer: set(ids) for layer, ids in self.named.items()})
        if not self.request.no_protect and self.needs_text:
            for one in self.supers:
                if one.certain:
                    found[one.layer].add(one.expert)
        return {layer: frozenset(ids) for layer, ids in found.items()}

    def release(self) -> None:
        """Nothing is held between passes."""

    # ---- identity ----------------------------------------------------------------------------------

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What of the request and of the text decides about the result, without places."""
        document = self.request.model_dump(mode="json")
        found: dict[str, Any] = {
            "request": {name: value for name, value in document.items() if name not in PLACES}
        }
        if self.needs_text and not self._reselecting:
            found["calibration"] = {
                name: self.texts.record[name] for name in OF_TEXT if name in self.texts.record
            }
        for name in ("scores", "from_report", "expert_record"):
            given = getattr(self.request, name)
            if given and Path(given).expanduser().is_file():
                found[name] = hashlib.sha256(Path(given).expanduser().read_bytes()).hexdigest()
        return found

    @property
    def _reselecting(self) -> bool:
        """Whether the choice comes from statistics of an earlier run."""
        given = self.request.scores
        return bool(given) and Path(given).expanduser().is_file() and self.request.method != "heapr"

    @cached_property
    def _text_key(self) -> str:
        content = {
            "program": __version__, "text": self.texts.record.get("ids_sha256"), "dtype": self.request.calibration_dtype,
            "samples": len(self.texts.statistics), "view": getattr(self.runnable, "identity", ""),
            "headers": [[h.sha256, h.stamp.size, h.stamp.mtime_ns] for h in self.checkpoint.headers],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _divided(found: data.CalibrationSet, wanted: int) -> Texts:
    samples = list(found.samples)
    domains = list(dict.fromkeys(sample.domain for sample in samples))
    if len(samples) < 2 * len(domains):
        raise InputError("E314", f"{found.record['name']} gives {len(samples)} samples in {len(domains)} domains; statistics and "
                         "quality need text of their own", help="give at least 2 records a domain, better 25")  # fmt: skip
    share = max(1, min(HELD_OUT_SAMPLES, len(samples) // 8) // len(domains))
    held: dict[str, list[np.ndarray]] = {domain: [] for domain in domains}
    statistics = []
    for sample in samples:
        if len(held[sample.domain]) < share:
            held[sample.domain].append(sample.ids[:HELD_OUT_TOKENS])
        elif len(statistics) < wanted:
            statistics.append(sample)
    record = {
        **found.record,
        "statistics": _count([sample.ids for sample in statistics]),
        "held_out": _count([ids for one in held.values() for ids in one]),
    }
    warnings = [warning for warning in found.warnings if f"not {wanted + HELD_OUT_SAMPLES:,}" not in warning]
    if len(statistics) < wanted:
        warnings.append(f"{found.record['name']} gives {len(samples)} samples: {share * len(domains)} are held out, which leaves "
                        f"{len(statistics)} for statistics, not {wanted}")  # fmt: skip
    return Texts(tuple(statistics), {d: tuple(ids) for d, ids in held.items()}, record, tuple(warnings))


def _count(samples: Sequence[np.ndarray]) -> dict[str, int]:
    return {"samples": len(samples), "tokens": int(sum(len(ids) for ids in samples))}
