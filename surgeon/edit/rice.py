"""RICE: give the experts a model thinks with more weight (arXiv 2505.14681), written into the weights.

The paper multiplies the routing weight of two to five cognitive experts by beta while the model runs. An expert's
contribution is its weight times its output, so the same factor on its down projection (and the bias there) computes
the same in every runtime: exactly when beta is a power of two, else up to the rounding of the storage type.

What the paper's figures carry: AIME24 73.3 -> 83.3 and AIME25 63.3 -> 73.3 for DeepSeek-R1 are 30 problems each, where one
problem is 3.3 points; in the same paper physics falls from 91.9 to 89.5, biology from 79.0 to 73.9, and AIME25 with many
draws from 68.5 to 67.7. Too large a factor makes output collapse. So: an experiment, to be evaluated.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.architectures import expert_records
from surgeon.calibrate.data import CalibrationSet, load
from surgeon.calibrate.routing import route
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.tokens import load_encoder
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.edit.request import EditRequest
from surgeon.errors import InputError, UsageError
from surgeon.experts.cognitive import (
    DEFAULT_MARKERS,
    CognitiveCounts,
    CognitiveExpert,
    Marker,
    marker_places,
)
from surgeon.structure.experts.cut import ExpertCut, Place
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import Experts
from surgeon.structure.experts.slices import power_of_two
from surgeon.structure.experts.view import ExpertView

COUNT = 2
"""Experts the paper scales in most of its models."""

NEUTRAL_KL = 0.1
"""Divergence on neutral text, in nats a token, above which a user is told that the factor changes everything."""

FEW_MARKERS = 20
"""Positions of a marker below which a user is told that little stands behind the choice."""

CHUNK = 1 << 24

_SCALE = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*=\s*([^\s]+)\s*")


@dataclass(frozen=True)
class Found:
    """Cognitive experts in data.

    Attributes:
        chosen: those that are scaled, the most closely tied first.
        occurrences: marker -> positions it has in the data.
        tokens: tokens looked at.
        missing: usual markers that are nowhere in the data.
    """

    chosen: tuple[CognitiveExpert, ...]
    occurrences: dict[str, int]
    tokens: int
    missing: tuple[str, ...]

    def warnings(self) -> list[str]:
        """Return what speaks against believing it, as sentences."""
        rare = [marker for marker, count in self.occurrences.items() if count < FEW_MARKERS]
        if not rare:
            return []
        return [f"few occurrences of {', '.join(rare)}: which experts belong to them is uncertain"]

    def record(self) -> dict[str, Any]:
        """Return what was found as plain data."""
        return {
            "experts": [expert.document() for expert in self.chosen], "markers": self.occurrences, "tokens": self.tokens,
            "missing": list(self.missing),
        }  # fmt: skip


@dataclass
class Scaled:
    """An edit that is ready to be planned.

    Attributes:
        view: the model with its factors.
        changed: names of the tensors whose values they change.
        report: what was found and what it does to neutral text, as plain data.
        recipe: what makes the same edit again, without paths.
        notes, warnings: sentences for the user.
    """

    view: Checkpoint
    changed: list[str]
    report: dict[str, Any]
    recipe: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def experts_in(checkpoint: Checkpoint, request: EditRequest) -> Experts:
    """Return the model's experts, by the user's record where one is given."""
    own = expert_records.load(request.expert_record) if request.expert_record else None
    return experts_of(checkpoint, own)


def scaled(
    checkpoint: Checkpoint,
    request: EditRequest,
    settings: Settings,
    *,
    compare: Callable[[Checkpoint], dict[str, float] | None],
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Scaled:
    """Return the model with the experts scaled that a request names, or that are found in its responses.

    Args:
        compare: returns perplexities and divergence on neutral text, None where they are not wanted.

    Raises:
        UsageError, InputError: as `parse_scales`, `find` and `bake`.
    """
    experts = experts_in(checkpoint, request)
    notes, warnings = [], []
    report: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    if request.scale_experts:
        scales = parse_scales(request.scale_experts)
    else:
        assert request.beta is not None
        check_factor(request.beta, "--beta")
        texts, found = _in_responses(checkpoint, experts, request, settings, progress, stop)
        warnings += [*texts.warnings, *found.warnings()]
        if found.missing:
            notes.append(f"not in the responses, so not looked for: {', '.join(found.missing)}")
        scales = {(expert.layer, expert.expert): request.beta for expert in found.chosen}
        report["found"] = found.record()
        recipe |= {"beta": request.beta, "markers": found.occurrences}
        recipe["responses"] = {
            key: texts.record[key] for key in ("name", "sha256", "ids_sha256", "samples", "tokens")
        }
    view: Any = bake(checkpoint, experts, scales)
    if any(power_of_two(factor) is None for factor in scales.values()):
        notes.append(
            "factors that are no powers of two are rounded to the storage type and cannot be taken back exactly"
        )
    warnings.append(
        "scaled experts are an experiment: gains were published on sets of 30 problems, with losses elsewhere"
    )
    report["scales"] = [
        {"layer": place[0], "expert": place[1], "factor": scales[place]} for place in sorted(scales)
    ]
    report["undo"] = undo(scales)
    report["quality"] = quality = compare(view)
    if quality is not None and quality["kl"] > NEUTRAL_KL:
        warnings.append(
            f"neutral text changes by {quality['kl']:.2g} nats a token: the factor does more than favour thinking; try a "
            "smaller one"
        )
    recipe["scale_experts"] = named(scales)
    return Scaled(view, changed(checkpoint, view, experts, scales), report, recipe, notes, warnings)


def _in_responses(
    checkpoint: Checkpoint, experts: Experts, request: EditRequest, settings: Settings,
    progress: Callable[[int, int], None] | None, stop: threading.Event | None,
) -> tuple[CalibrationSet, Found]:  # fmt: skip
    """Read the responses and look for the experts of their markers."""
    folder = checkpoint.folder
    if folder is None:
        raise UsageError("E295", f"{checkpoint.label} is a file without a tokenizer", help="give the model folder")  # fmt: skip
    assert request.responses is not None
    texts = load(request.responses, folder, samples=request.samples, sequence_length=request.sequence_length,
                 seed=request.seed, offline=request.offline)  # fmt: skip
    tokenizer = load_encoder(folder).tokenizer
    found = find(
        checkpoint, experts, [sample.ids for sample in texts.samples], request.markers,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], settings,
        count=COUNT if request.experts_count is None else request.experts_count, progress=progress, stop=stop,
    )  # fmt: skip
    return texts, found


def parse_scales(texts: Iterable[str]) -> dict[Place, float]:
    """Read "LAYER:EXPERT=FACTOR", several separated by commas.

    Raises:
        UsageError: E247 it is something else, an expert is named twice, or a factor would change nothing or everything.
    """
    found: dict[Place, float] = {}
    for part in (piece for text in texts for piece in text.split(",")):
        match = _SCALE.fullmatch(part)
        try:
            factor = float(match[3]) if match else math.nan
        except ValueError:
            factor = math.nan
        if match is None or math.isnan(factor):
            raise UsageError("E247", f'--scale-experts "{part.strip()}" is not LAYER:EXPERT=FACTOR',
                             help="for instance 12:5=4,30:17=4")  # fmt: skip
        check_factor(factor, "--scale-experts")
        place = (int(match[1]), int(match[2]))
        if place in found:
            raise UsageError(
                "E247",
                f"--scale-experts names expert {place[1]} of layer {place[0]} twice",
                help="give each expert one factor",
            )
        found[place] = factor
    if not found:
        raise UsageError("E247", "--scale-experts names no expert", help="LAYER:EXPERT=FACTOR")
    return found


def check_factor(factor: float, option: str) -> None:
    """Refuse a factor that does nothing, or that is no factor.

    Raises:
        UsageError: E247.
    """
    if not math.isfinite(factor) or factor <= 0 or factor == 1:
        raise UsageError("E247", f"{option} multiplies by {factor:g}",
                         help="2 to 512 were published, tuned for each model; powers of two are exact")  # fmt: skip


def find(
    checkpoint: Checkpoint,
    experts: Experts,
    samples: Sequence[np.ndarray],
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    settings: Settings,
    *,
    count: int = COUNT,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Found:
    """Return the experts most closely tied to markers, by the mean of their nPMI.

    Args:
        samples: token ids of the model's own responses, thinking included.
        texts: markers; none takes the usual ones, of which those that are not in the data are left out.
        encode: text to token ids without special tokens around it.
        count: how many experts.

    Raises:
        InputError: E439 a marker, or every usual one, is nowhere in the data.
        UsageError: E247 more experts are asked for than there are.
    """
    total = sum(layer.count for layer in experts.running)
    if not 1 <= count <= total:
        raise UsageError("E247", f"--experts-count is {count}; the model has {total} experts", help="2 to 5 is usual")  # fmt: skip
    markers = [Marker.of(text, encode) for text in texts or DEFAULT_MARKERS]
    missing: list[str] = []
    if not texts:
        missing = [m.text for m in markers if not any(len(m.positions(ids)) for ids in samples)]
        markers = [m for m in markers if m.text not in missing]
    if not markers:
        raise InputError("E439", f"none of the usual markers ({', '.join(DEFAULT_MARKERS)}) is in the data",
                         help="give the model's responses with their thinking, or name its markers: --marker TEXT")  # fmt: skip
    counts = CognitiveCounts(marker_places(markers, samples), [len(ids) for ids in samples], experts)
    route(checkpoint, samples, settings, counts, experts=experts, progress=progress, stop=stop)
    return Found(tuple(counts.ranked()[:count]), counts.occurrences, counts.tokens, tuple(missing))


def bake(checkpoint: Checkpoint, experts: Experts, scales: Mapping[Place, float]) -> ExpertView:
    """Return the model with each of these experts' contributions multiplied by its factor.

    Raises:
        UsageError: E243 there is no such expert. InputError: E425 the storage cannot hold the factor.
    """
    return ExpertView(checkpoint, experts, ExpertCut(scales=dict(scales)))


def changed(checkpoint: Checkpoint, view: ExpertView, experts: Experts, scales: Mapping[Place, float]) -> list[str]:  # fmt: skip
    """Return the names of the tensors whose values a factor changed, sorted; those of other experts are not looked at."""
    found = set()
    for layer, expert in scales:
        for tensor in experts.layer(layer).of("down", "down_bias"):
            if tensor.expert in (None, expert) and _differs(checkpoint, view, tensor.name):
                found.add(tensor.name)
    return sorted(found)


def _differs(checkpoint: Checkpoint, view: ExpertView, name: str) -> bool:
    if view.computed(name):
        return True
    size = checkpoint.tensors[name].nbytes
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        if not np.array_equal(checkpoint.read_bytes(name, start, stop), view.read_bytes(name, start, stop)):
            return True
    return False


def named(scales: Mapping[Place, float]) -> str:
    """Return factors as --scale-experts takes them."""
    return ",".join(f"{layer}:{expert}={factor:g}" for (layer, expert), factor in sorted(scales.items()))


def undo(scales: Mapping[Place, float]) -> str:
    """Return the --scale-experts that takes these factors back, exactly where they are powers of two."""
    return ",".join(f"{layer}:{expert}={1 / factor!r}" for (layer, expert), factor in sorted(scales.items()))
