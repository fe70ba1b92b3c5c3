"""What one run of pruning shares between its targets: the model, texts, table, rankings, losses; each made once."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.calibrate import divided, quality
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.dtypes import CODES
from surgeon.derive import Source
from surgeon.errors import InputError, SurgeonError, UsageError, Where
from surgeon.measure.compare import generates
from surgeon.measure.conditions import Conditions
from surgeon.measure.differencing import Levels, measure_table
from surgeon.measure.table import LatencyTable
from surgeon.measure.workload import Workload
from surgeon.prune import database
from surgeon.prune.cost import Cost, SizeCost, TimeCost
from surgeon.prune.criteria import minitron
from surgeon.prune.depth_ranking import DepthRanking
from surgeon.prune.goal import Goal
from surgeon.prune.levels import granularity
from surgeon.prune.permitted import Permitted
from surgeon.prune.ranking import Ranking
from surgeon.prune.request import TARGETS, PruneRequest, Target
from surgeon.prune.true_loss import TrueLoss, Weights
from surgeon.structure.cut import Cut, Kept
from surgeon.structure.find import structure_of
from surgeon.structure.parts import Structure
from surgeon.unwritten.leaving import Leaving

Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]

PLACES = frozenset(
    {"model", "work", "threads", "memory_limit", "latency_table", "device", "offline", "calibration", "max_shard_size"}
)  # fmt: skip
"""Fields of the request that say where and how fast, not what."""

JUST_MORE = 1 + 1e-6
"""The least speedup asked of a stage that is there already: the next smaller size."""

OF_TEXT = ("name", "sha256", "ids_sha256", "statistics", "search", "held_out")
"""What of a text's record goes into a manifest."""


@dataclass
class Session:
    """One source model under one request.

    Attributes:
        source: the model.
        request: what is asked for.
        work: folder for everything that a later run can take up.
        tell: progress, (what, done, total).
        say: one sentence for the user.
        stop: set to end early.
        origin: the session of the dense model, where this one's source was itself cut from it.
        leaving: where the result is left unwritten.
    """

    source: Source
    request: PruneRequest
    work: Path
    tell: Tell
    say: Say
    stop: threading.Event | None = None
    origin: Session | None = None
    warnings: list[str] = field(default_factory=list)
    leaving: Leaving | None = None

    @cached_property
    def structure(self) -> Structure:
        found = structure_of(self.source.checkpoint)
        for layer in self.request.protect_layers:
            if not 0 <= layer < found.layers:
                raise UsageError(
                    "E267",
                    f"--protect-layers {layer}: the model has layers 0 to {found.layers - 1}",
                    help="count layers from 0",
                )
        return found

    @cached_property
    def folder(self) -> Path:
        """The model folder; pruning needs more than a bare file."""
        folder = self.source.checkpoint.folder
        if folder is None:
            raise InputError("E317", f"{self.source.path} is a bare file: pruning needs config.json and the tokenizer",
                             where=Where(self.source.path), help="give the model folder")  # fmt: skip
        return folder

    @cached_property
    def decoder(self) -> bool:
        """Whether the model predicts next tokens."""
        return generates(self.folder)

    @cached_property
    def workload(self) -> Workload:
        r = self.request
        return Workload.usual(
            decoder=self.decoder, mode=r.mode, batch=r.batch, context=r.context, generate=r.generate
        )

    @cached_property
    def settings(self) -> Settings:
        r = self.request
        return Settings(device=r.device if r.device != "auto" else _auto(), dtype=r.calibration_dtype,
                        memory_limit=r.memory_limit, threads=r.threads, spill=self.work / "pass")  # fmt: skip

    @cached_property
    def conditions(self) -> Conditions:
        r = self.request
        return Conditions(device=r.device, dtype=r.dtype or "auto", threads=r.threads, memory_limit=r.memory_limit,
                          seed=r.seed, precision=r.tolerance / 3)  # fmt: skip

    @cached_property
    def permitted(self) -> Permitted:
        return Permitted(self.source, self.structure, self.request, self.decoder, self.say)

    @property
    def structures(self) -> tuple[str, ...]:
        """The structures that may be cut, in force."""
        return self.permitted.structures

    @cached_property
    def modes(self) -> tuple[str, ...]:
        """Kinds of attention units that may go; of those a given table says nothing about, none."""
        found = self.permitted.modes
        if not found or not self.request.latency_table or not self.request.target_speedup:
            return found
        first = next(part for part in self.structure.attention if part is not None)
        least = {"groups": (first.per_group, 1), "heads": (first.groups, first.groups)}
        return tuple(mode for mode in found if _knows(self.table, *least[mode]))

    def writable(self, cut: Cut) -> bool:
        """Say whether a stock class holds a cut."""
        return self.permitted.writable(cut)

    # ---- identity ----------------------------------------------------------------------------------

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What of the request and of the text decides about the result, without places."""
        document = self.request.model_dump(mode="json")
        found: dict[str, Any] = {
            "request": {name: value for name, value in document.items() if name not in PLACES},
            "calibration": {name: self.texts.record[name] for name in OF_TEXT if name in self.texts.record},
        }
        if self.request.latency_table:
            content = Path(self.request.latency_table).read_bytes()
            found["latency_table"] = hashlib.sha256(content).hexdigest()
        return found

    @cached_property
    def key(self) -> str:
        """What results of one target in the work folder depend on: source, request without targets, text, program."""
        request = {name: value for name, value in self.asked["request"].items() if name not in TARGETS}
        checkpoint = self.source.checkpoint
        content = {
            "program": __version__, **self.asked, "request": request, "device": self.settings.device,
            "threads": self.request.threads, "config": checkpoint.config, "view": getattr(checkpoint, "identity", ""),
            "headers": [[h.sha256, h.stamp.size, h.stamp.mtime_ns] for h in checkpoint.headers],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # ---- text --------------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> divided.Texts:
        request = self.request
        found = divided.load(
            request.calibration, self.folder, samples=request.samples, sequence_length=request.sequence_length,
            seed=request.seed, offline=request.offline,
        )  # fmt: skip
        self.warnings.extend(found.warnings)
        if not self.request.calibration:
            self.say("no --calibration was given: the text that comes with surgeon is used")
        self.say(
            f"calibrating on {found.record['name']}: {found.record['statistics']['tokens']:,} tokens for statistics, "
            f"{found.record['search']['tokens']:,} to compare plans, {found.record['held_out']['tokens']:,} held out"
        )
        return found

    # ---- costs -------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> LatencyTable:
        """The latency table: given, kept from an earlier run, or measured now."""
        r = self.request
        config = self.source.checkpoint.config or {}
        if r.latency_table:
            place = Path(r.latency_table)
            table = LatencyTable.load(place, self._here, config, table_anyway=r.table_anyway)
            fields = type(r).model_fields
            if any(
                getattr(r, name) != fields[name].default for name in ("mode", "batch", "context", "generate")
            ):
                table.check(None, workload=self.workload, where=place)
            self.workload = table.workload
            for note in table.notes:
                self.say(note)
            return table
        levels = self._levels()
        file = self._table_file(levels)
        if file.is_file():
            try:
                return LatencyTable.load(file, self._here, config, workload=self.workload)
            except SurgeonError:
                file.unlink()  # of other conditions: measured again
        self.say(f"measuring the latency table ({self.workload.sentence()})")
        table = measure_table(
            config, self.structure, self.workload, levels, self.conditions, progress=self.tell, stop=self.stop
        )
        self.work.mkdir(parents=True, exist_ok=True)
        table.save(file)
        for note in table.notes:
            self.say(note)
        return table

    @property
    def knows_table(self) -> bool:
        """Whether the latency table is given, or lies in the work folder from an earlier run."""
        return self.request.latency_table is not None or self._table_file(self._levels()).is_file()

    def _levels(self) -> Levels:
        """Return the sizes that are timed."""
        ffn = next((part.width for part in self.structure.ffn if part is not None), 0)
        step = granularity(ffn, self.request.round_to) if ffn else 1
        modes = self.modes or (None,)
        levels = [Levels.of(self.structure, attention=mode, multiple=step) for mode in modes]
        return Levels(tuple(dict.fromkeys(a for one in levels for a in one.attention)), levels[0].ffn)

    def _table_file(self, levels: Levels) -> Path:
        content = [self.workload.document(), levels.attention, levels.ffn, self.request.tolerance]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        return self.work / f"table-{name}.json"

    @cached_property
    def _here(self):
        from surgeon.measure.environment import Environment
        from surgeon.measure.models import RandomModels

        with self.conditions.in_force():
            probe = RandomModels(
                self.source.checkpoint.config or {}, self.structure, self.workload, self.conditions
            )
            return Environment.here(self.conditions, dtype=probe.dtype, attention=probe.attention)

    def goal(self, target: Target, table: LatencyTable | None = None) -> Goal:
        """Return what a target, which counts from the dense model, means as a budget of this session's source."""
        checkpoint, value = self.source.checkpoint, target.value
        cost: Cost
        if target.kind == "speedup":
            table = table or self.table
            cost = TimeCost(table, self.structure)
            value /= self.reached(table)
            value = max(value, JUST_MORE) if self.origin else value
        elif target.kind == "size":
            cost = SizeCost(
                checkpoint, self.structure, "bytes", CODES[self.request.dtype] if self.request.dtype else None
            )
        else:
            cost = SizeCost(checkpoint, self.structure)
        if target.kind == "sparsity" and self.origin is not None:
            whole = SizeCost(self.origin.source.checkpoint, self.origin.structure).prunable()
            value = max(JUST_MORE - 1, 1 - whole * (1 - value) / cost.prunable())
        return Goal(target.kind, value, cost)

    def reached(self, table: LatencyTable) -> float:
        """Return how many times as fast as the dense model this session's source is by a table."""
        return table.dense / TimeCost(table, self.structure).dense if self.origin is not None else 1.0

    # ---- statistics --------------------------------------------------------------------------------

    @cached_property
    def database(self) -> database.Database:
        """Rankings of all modules, from one pass over the text."""
        kinds = tuple(name for name in self.structures if name in ("heads", "ffn"))
        found = database.build(
            self.source.checkpoint, self.structure, self.texts.statistics, self.settings, method=self.request.solver,
            folder=self.work / "database", structures=kinds, modes=self.modes or None, damp=self.request.damp,
            seed=self.request.seed, stop=self.stop, progress=self.tell,
        )  # fmt: skip
        self.warnings.extend(found.notes)
        return found

    def ranking(self, layer: int, kind: str, mode: str) -> Ranking:
        return self.database.ranking(layer, kind, mode)

    def depth_ranking(self, most: int | None = None, method: str | None = None) -> DepthRanking:
        """Return which layers go first; `most` and `method` as in `surgeon.prune.layer_order.ranked`."""
        from surgeon.prune.layer_order import ranked

        name = method or ("nmse" if self.request.method != "depth" else self.request.solver)
        return ranked(self, name, most)

    @cached_property
    def drops(self) -> tuple[tuple[int, ...], ...]:
        """Sets of layers that may go: none, or nested ones by what the output loses."""
        if "layers" not in self.structures or self.structure.layers <= 2:
            return ((),)
        return self.depth_ranking(self.most_drops).drops

    @cached_property
    def most_drops(self) -> int:
        """Layers that may go at most: half of them, and no more than meet the strongest target alone."""
        half = max(1, self.structure.layers // 2)
        goals = [self.goal(target) for target in self.request.targets if target.kind != "layers"]
        return max((min(half, drops_needed(goal)) for goal in goals), default=half)

    # ---- losses ------------------------------------------------------------------------------------

    @cached_property
    def true_loss(self) -> TrueLoss:
        return TrueLoss(
            self.source.checkpoint, self.structure, self.texts.search, self.settings, stop=self.stop
        )

    @cached_property
    def _known(self) -> dict[str, float]:
        return {}

    def losses(self, cuts: Sequence[Cut]) -> list[float]:
        """Return true losses; each cut is run once in a session."""
        fresh = {cut.identity(): cut for cut in cuts if cut.identity() not in self._known}
        if fresh:
            found = self.true_loss(list(fresh.values()), self.weights)
            self._known.update(zip(fresh, map(float, found), strict=True))
            self.tell("comparing plans", len(self._known), len(self._known))
        return [self._known[cut.identity()] for cut in cuts]

    def release(self) -> None:
        """Free the activations that comparing plans holds; they are computed anew when more plans come."""
        loss = self.__dict__.pop("true_loss", None)
        if loss is not None:
            loss.close()

    @cached_property
    def weights(self) -> Weights | None:
        """What gives a module's output matrix for the units it keeps; None where a criterion changes nothing."""
        changes = self.database.criterion.solves or self.database.method == "flap"
        return self.database.weights if changes else None

    def hidden_kept(self, count: int) -> Kept:
        """Return the channels of the residual stream that stay (Minitron)."""
        scores = minitron.hidden_scores(
            self.source.checkpoint, self.texts.statistics, self.settings, stop=self.stop,
            progress=lambda done, total: self.tell("ranking the residual stream", done, total),
        )  # fmt: skip
        order = minitron.hidden_order(scores)
        return tuple(sorted(int(channel) for channel in order[len(order) - count :]))

    @cached_property
    def reference(self) -> list[Any]:
        """Last hidden states of the source on the held-out text."""
        return quality.last_states(self.source.checkpoint, self.texts.held_out, self.settings, stop=self.stop)

    @property
    def used_text(self) -> bool:
        """Whether calibration text was read in this run."""
        return "texts" in self.__dict__

    def keep(self, name: str, document: dict[str, Any]) -> None:
        """Write a file of plain data into the work folder."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / name).write_text(json.dumps(document, indent=1) + "\n")


def _knows(table: LatencyTable, heads: int, groups: int) -> bool:
    try:
        table.attention_seconds(heads, groups)
    except UsageError:
        return False
    return True


def drops_needed(goal: Goal) -> int:
    """Return how many layers must go to reach a goal with layers alone, the cheapest first."""
    structure, left = goal.cost.structure, goal.cost.dense
    times = sorted(goal.cost.layer(layer, structure.shape(layer)) for layer in range(structure.layers))
    for number, time in enumerate(times, start=1):
        left -= time
        if left <= goal.budget:
            return number
    return len(times)


def _auto() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
