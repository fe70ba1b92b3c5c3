"""The three texts of a run: what statistics are taken from, what plans are compared on, what quality is reported on.

They never overlap: a plan chosen on the text its statistics come from looks better than it is, and
so does a quality measured on the text a plan was chosen on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate import data
from surgeon.errors import InputError
from surgeon.prune.request import PruneRequest

SEARCH_SAMPLES, SEARCH_TOKENS = 16, 512
"""What every plan of a search is run on (16 x 512 tokens)."""
HELD_OUT_SAMPLES = 16


@dataclass(frozen=True)
class Texts:
    """Token ids, one array a sample.

    Attributes:
        statistics: second moments, norms, means.
        search: true loss of plans.
        held_out: quality before and after.
        record: what the manifest says of them.
        warnings: sentences for the user.
    """

    statistics: tuple[np.ndarray, ...]
    search: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]
    record: dict[str, Any]
    warnings: tuple[str, ...]


def load(request: PruneRequest, folder: Path) -> Texts:
    """Load calibration text and divide it.

    Raises:
        InputError: E314 too few samples to divide; what `surgeon.calibrate.data.load` raises.
    """
    from surgeon.data.records import parse_sources

    wanted = request.samples + SEARCH_SAMPLES + HELD_OUT_SAMPLES
    found = data.load(
        parse_sources(list(request.calibration)) if request.calibration else None, folder, samples=wanted,
        sequence_length=request.sequence_length, seed=request.seed, offline=request.offline,
    )  # fmt: skip
    samples = [sample.ids for sample in found.samples]
    if len(samples) < 3:
        raise InputError("E314", f"{found.record['name']} gives {len(samples)} samples; statistics, the choice of a plan and its "
                         "quality need text of their own", help="give at least 3 records, better 100")  # fmt: skip
    # Of a short text each later part takes an eighth.
    share = max(1, min(SEARCH_SAMPLES, len(samples) // 8))
    held_out, search, statistics = samples[:share], samples[share : 2 * share], samples[2 * share :]
    record = {
        **found.record,
        "statistics": _count(statistics), "search": _count(search), "held_out": _count(held_out),
    }  # fmt: skip
    warnings = [warning for warning in found.warnings if f"not {wanted:,}" not in warning]
    if len(statistics) < request.samples:
        warnings.append(
            f"{found.record['name']} gives {len(samples)} samples: {share} are held out, {share} compare plans, which leaves "
            f"{len(statistics)} calibration samples for statistics, not {request.samples}"
        )
    return Texts(
        tuple(statistics), tuple(ids[:SEARCH_TOKENS] for ids in search),
        tuple(ids[:SEARCH_TOKENS] for ids in held_out), record, tuple(warnings),
    )  # fmt: skip


def _count(samples: list[np.ndarray]) -> dict[str, int]:
    return {"samples": len(samples), "tokens": int(sum(len(ids) for ids in samples))}
