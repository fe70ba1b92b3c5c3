"""Latency tables: what attention and FFN of one layer cost at every size, in one environment.

    time of a model = rest + sum over its layers of (attention[heads, groups] + ffn[width])

All layers share the rows: shapes are equal, so times are. Sizes between the measured ones are
interpolated linearly (and continued below the smallest: having a module at all costs something, so
the line does not lead to the 0 of a removed one) between values that never fall with size (isotonic regression, weighted by the
precision of each; Barlow et al., Statistical Inference under Order Restrictions, 1972). Tables are
made by `surgeon.measure.differencing`.

Codes: E282 a target out of reach, E283 a file that is no table or another model's, E284 a shape the
table does not hold, E516 a table of another environment.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import MAX_JSON_BYTES, read_json_object
from surgeon.errors import EnvironmentFault, SurgeonError, UsageError, Where
from surgeon.measure.environment import Environment
from surgeon.measure.files import write_json
from surgeon.measure.workload import Workload
from surgeon.structure.cut import LayerShape

KIND = "surgeon latency table"
SCHEMA = 1
_TIMELESS = frozenset(
    {
        "_name_or_path", "name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version", "initializer_range",
        "use_cache", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta",
        "rope_scaling", "rope_parameters", "id2label", "label2id", "task_specific_params", "pruned_heads",
    }
)  # fmt: skip
"""Keys of config.json that say nothing about time, beside token ids and dropout."""

Heads = tuple[int, int]
"""(query heads, key/value heads) of one layer; (0, 0) has no attention."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of one workload in one environment, in seconds.

    Attributes:
        environment, workload: what the times hold for.
        model: identity of the configuration they were measured for.
        layers: of the model.
        full: shape of its layers.
        rest: everything outside the layers: embeddings, final norm, vocabulary head, launching.
        attention: (heads, groups) -> one layer's attention with its norm and residual.
        ffn: width -> one layer's FFN with its norm and residual.
        attention_spread, ffn_spread: half-widths of 95 % intervals of the saving against the full size.
        layer_spread: half-width of the 95 % interval of one full layer.
        timed_layers: layers of the models that were timed.
        correction: factors of attention and of ffn, and a share of the whole model's measured time that is added
            to the rest: (1, 1, 0) as measured; `surgeon.measure.correction` fits others.
        notes: what a reader of the figures should know.
    """

    environment: Environment
    workload: Workload
    model: str
    layers: int
    full: LayerShape
    rest: float
    attention: Mapping[Heads, float]
    ffn: Mapping[int, float]
    attention_spread: Mapping[Heads, float]
    ffn_spread: Mapping[int, float]
    layer_spread: float = 0.0
    timed_layers: int = 4
    correction: tuple[float, float, float] = (1.0, 1.0, 0.0)
    notes: tuple[str, ...] = ()

    @property
    def dense(self) -> float:
        """Seconds of the whole model."""
        return self.total((self.full,) * self.layers)

    def attention_seconds(self, heads: int, groups: int) -> float:
        """Return the time of one layer's attention.

        Raises:
            UsageError: E284 the table says nothing about this shape.
        """
        return self.correction[0] * self._attention(self.attention, heads, groups)

    def ffn_seconds(self, width: int) -> float:
        """Return the time of one layer's FFN (UsageError E284 as `attention_seconds`)."""
        return self.correction[1] * self._ffn(self.ffn, width)

    def layer(self, shape: LayerShape) -> float:
        """Return the time of one layer."""
        return self.attention_seconds(shape.heads, shape.groups) + self.ffn_seconds(shape.ffn)

    def parts(self, shapes: Sequence[LayerShape]) -> tuple[float, float, float]:
        """Return the time of a model's attention, FFNs and rest."""
        rest = self.rest
        if self.correction[2]:
            rest += self.correction[2] * self.corrected().dense
        return (
            sum(self.attention_seconds(s.heads, s.groups) for s in shapes),
            sum(self.ffn_seconds(s.ffn) for s in shapes),
            max(0.0, rest),
        )

    def total(self, shapes: Sequence[LayerShape]) -> float:
        """Return the time of a model whose layers have these shapes; dropped layers are left out."""
        return sum(self.parts(shapes))

    def speedup(self, shapes: Sequence[LayerShape]) -> float:
        """Return how many times as fast as the whole model one of these layers is."""
        return self.dense / self.total(shapes)

    def uncertainty(self, shapes: Sequence[LayerShape]) -> float:
        """Return the half-width of the 95 % interval of `speedup`, from the noise of the measurements alone.

        Two kinds add up: the saving of each level, once for every layer at that level; and the time of
        one layer, by which the whole model is extrapolated from ``timed_layers``, which cancels in
        part between the whole and the cut model.
        """
        total, dense = self.total(shapes), self.dense
        counts: dict[tuple[str, Any], int] = {}
        for shape in shapes:
            for key in (("attention", (shape.heads, shape.groups)), ("ffn", shape.ffn)):
                counts[key] = counts.get(key, 0) + 1
        squares = 0.0
        for (kind, size), count in counts.items():
            spread = (
                self._attention(self.attention_spread, *size)
                if kind == "attention"
                else self._ffn(self.ffn_spread, size)
            )
            squares += (count * spread / total) ** 2
        lever = (self.layers - self.timed_layers) / dense - (len(shapes) - self.timed_layers) / total
        squares += (lever * self.layer_spread) ** 2
        return dense / total * math.sqrt(squares)

    def shares(self) -> dict[str, float]:
        """Return what share of the whole model's time each component takes."""
        attention, ffn, rest = self.parts((self.full,) * self.layers)
        return {"attention": attention / self.dense, "ffn": ffn / self.dense, "rest": rest / self.dense}

    def require(
        self, target: float, smallest: LayerShape, *, layers: int = 2, help: str | None = None
    ) -> None:
        """Refuse a speedup that no permitted model reaches, before any work (fault J6).

        Args:
            target: speedup asked for.
            smallest: the cheapest layer that is permitted.
            layers: fewest layers that must stay.

        Raises:
            UsageError: E282.
        """
        if not target > 1 or math.isinf(target):
            raise UsageError("E282", f"a speedup of {target:g} is no speedup", help="a number above 1")
        most = self.speedup((smallest,) * layers)
        if target <= most:
            return
        shares = self.shares()
        below = math.floor(100 * most) / 100
        raise UsageError(
            "E282", f"a speedup of {target:g} cannot be reached: at most {below:.2f} with {layers} layers of the smallest permitted shape; "
            f"of the whole model's time attention takes {shares['attention']:.0%}, FFN {shares['ffn']:.0%}, "
            f"embeddings and vocabulary head {shares['rest']:.0%} ({self.workload.sentence()})",
            help=help or f"choose a target from 1 to {below:.2f}, or permit more: --structures heads,ffn,layers",
        )  # fmt: skip

    def corrected(self, attention: float = 1.0, ffn: float = 1.0, fixed: float = 0.0) -> LatencyTable:
        """Return the table with these corrections in place of earlier ones.

        Args:
            attention, ffn: factors of the measured times.
            fixed: share of the whole model's measured time that is added to the rest.
        """
        return replace(self, correction=(attention, ffn, fixed))

    # ---- rows ----------------------------------------------------------------------------------

    def _attention(self, row: Mapping[Heads, float], heads: int, groups: int) -> float:
        if (heads, groups) in row:
            return row[heads, groups]
        full = (self.full.heads, self.full.groups)
        each = full[0] // full[1] if full[1] else 0
        # Whole groups go, or equally many heads of every group: two rows that share their ends.
        if groups and heads == groups * each:
            family = {h: v for (h, g), v in row.items() if g * each == h}
        elif groups and groups == full[1] and heads % groups == 0:
            family = {h: v for (h, g), v in row.items() if g == full[1] or not h}
        else:
            family = {}
        found = _between(family, heads)
        if found is None:
            raise UsageError("E284", f"the latency table holds no times for {heads} heads with {groups} key/value heads",
                             help="measure it with these heads: surgeon measure MODEL --mode table")  # fmt: skip
        return found

    def _ffn(self, row: Mapping[int, float], width: int) -> float:
        found = _between(row, width)
        if found is None:
            raise UsageError("E284", f"the latency table holds no times for an FFN of {width:,} channels",
                             help=f"it was measured at {', '.join(f'{w:,}' for w in sorted(row))}")  # fmt: skip
        return found

    # ---- files ---------------------------------------------------------------------------------

    def check(self, here: Environment | None, config: Mapping[str, Any] | None = None, *, workload: Workload | None = None,
              table_anyway: bool = False, where: Path | None = None) -> LatencyTable:  # fmt: skip
        """Refuse a table of another environment, model or workload; ``table_anyway`` permits another environment.

        Raises:
            EnvironmentFault: E516. UsageError: E283.
        """
        place = Where(str(where)) if where else None
        if config is not None and identity(config) != self.model:
            raise UsageError("E283", "the latency table was measured for a model of other sizes", where=place,
                             help="measure this one: surgeon measure MODEL --mode table -o table.json")  # fmt: skip
        if workload is not None and workload != self.workload:
            raise UsageError("E283", f"the latency table is about another workload: {self.workload.sentence()}; asked for is {workload.sentence()}",
                             where=place, help="leave the workload's options out to use the table's")  # fmt: skip
        if here is None:
            return self
        try:
            self.environment.check(here, "the latency table")
        except EnvironmentFault as fault:
            if not table_anyway:
                fault.where = place
                raise
            return replace(self, notes=(*self.notes, f"{fault.message}; used anyway"))
        return self

    def document(self) -> dict[str, Any]:
        """Return the table as plain data; `from_document` reads it."""
        return {
            "kind": KIND, "schema": SCHEMA, "environment": self.environment.document(), "workload": self.workload.document(),
            "model": self.model, "layers": self.layers,
            "full": {"heads": self.full.heads, "groups": self.full.groups, "head_dim": self.full.head_dim, "ffn": self.full.ffn},
            "seconds": {
                "dense": self.dense, "rest": self.rest, "layer_spread": self.layer_spread,
                "attention": [{"heads": h, "groups": g, "seconds": s, "spread": self.attention_spread[h, g]}
                              for (h, g), s in sorted(self.attention.items(), reverse=True)],
                "ffn": [{"width": w, "seconds": s, "spread": self.ffn_spread[w]} for w, s in sorted(self.ffn.items(), reverse=True)],
            },
            "timed_layers": self.timed_layers, "correction": list(self.correction), "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: Path | None = None) -> LatencyTable:
        """Read what `document` made.

        Raises:
            UsageError: E283.
        """
        place = Where(str(where)) if where else None
        if document.get("kind") != KIND or document.get("schema") != SCHEMA:
            raise UsageError("E283", "this is no latency table" if document.get("kind") != KIND else
                             f"the latency table has schema {printable(str(document.get('schema')))}, this version reads {SCHEMA}",
                             where=place, help="surgeon measure MODEL --mode table -o table.json makes one")  # fmt: skip
        try:
            seconds, full = document["seconds"], document["full"]
            attention = {(int(e["heads"]), int(e["groups"])): e for e in seconds["attention"]}
            ffn = {int(e["width"]): e for e in seconds["ffn"]}
            table = cls(
                Environment.from_document(document["environment"]), Workload.from_document(document["workload"]),
                str(document["model"]), int(document["layers"]),
                LayerShape(int(full["heads"]), int(full["groups"]), int(full["head_dim"]), int(full["ffn"])),
                float(seconds["rest"]), {k: float(e["seconds"]) for k, e in attention.items()},
                {k: float(e["seconds"]) for k, e in ffn.items()}, {k: float(e["spread"]) for k, e in attention.items()},
                {k: float(e["spread"]) for k, e in ffn.items()}, float(seconds["layer_spread"]), int(document["timed_layers"]),
                tuple(map(float, document["correction"])), tuple(map(str, document["notes"])),  # type: ignore[arg-type]
            )  # fmt: skip
            values = [*table.attention.values(), *table.ffn.values(), table.rest, *table.correction[:2],
                      *table.attention_spread.values(), *table.ffn_spread.values(), table.layer_spread]  # fmt: skip
            if (
                not all(math.isfinite(v) and v >= 0 for v in values)
                or len(table.correction) != 3
                or not abs(table.correction[2]) < 10
                or not table.dense > 0
            ):
                raise ValueError("times must be finite and not negative")
        except SurgeonError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError("E283", f"the latency table is damaged: {printable(f'{type(error).__name__}: {error}'[:120])}", where=place,
                             help="measure it again") from error  # fmt: skip
        return table

    def save(self, path: Path) -> None:
        """Write the table in one step.

        Raises:
            EnvironmentFault: E502.
        """
        write_json(self.document(), Path(path))

    @classmethod
    def load(cls, path: Path, here: Environment | None = None, config: Mapping[str, Any] | None = None, *,
             workload: Workload | None = None, table_anyway: bool = False) -> LatencyTable:  # fmt: skip
        """Read a table and `check` it.

        Raises:
            UsageError: E283. EnvironmentFault: E502 it cannot be read, E516 it was measured elsewhere.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError("E283", f"there is no latency table at {printable(str(path))}",
                             help="surgeon measure MODEL --mode table -o table.json makes one")  # fmt: skip
        table = cls.from_document(read_json_object(path, MAX_JSON_BYTES), path)
        return table.check(here, config, workload=workload, table_anyway=table_anyway, where=path)


def identity(config: Mapping[str, Any]) -> str:
    """Return a digest of what in a configuration decides about time; fine-tunes of one model share it."""
    kept = _timed(config)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _timed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(k): _timed(v) for k, v in value.items()
            if k not in _TIMELESS and "dropout" not in str(k) and not str(k).endswith(("token_id", "token_ids"))
        }  # fmt: skip
    return value


def _between(row: Mapping[int, float], size: int) -> float | None:
    """Return a row's value at a size: a measured one, or on the line through its neighbours; None where it says nothing."""
    if size in row:
        return row[size]
    sizes = sorted(s for s in row if s)
    if len(sizes) < 2 or not 0 < size <= sizes[-1]:
        return None
    if size > sizes[0]:
        return float(np.interp(size, sizes, [row[s] for s in sizes]))
    slope = (row[sizes[1]] - row[sizes[0]]) / (sizes[1] - sizes[0])
    return max(row.get(0, 0.0), row[sizes[0]] - slope * (sizes[0] - size))


def monotone(row: Mapping[Any, float], spread: Mapping[Any, float]) -> dict[Any, float]:
    """Return a row whose values never fall with size, as near to the measured ones as their precision says.

    Args:
        row: size (a number, or heads first) -> seconds.
        spread: half-widths; a value without noise counts as the most precise of the others.
    """
    sizes = sorted(row)
    if len(sizes) < 2:
        return dict(row)
    least = min((spread[s] for s in sizes if spread[s] > 0), default=1.0)
    # Pool adjacent violators: a run of falling values becomes its weighted mean.
    pools: list[tuple[float, float, int]] = []
    for size in sizes:
        value, weight, count = row[size], 1 / max(spread[size], least) ** 2, 1
        while pools and pools[-1][0] > value:
            before, its_weight, its_count = pools.pop()
            value = (its_weight * before + weight * value) / (its_weight + weight)
            weight, count = weight + its_weight, count + its_count
        pools.append((value, weight, count))
    fitted = [value for value, _, count in pools for _ in range(count)]
    return {size: max(0.0, value) for size, value in zip(sizes, fitted, strict=True)}
