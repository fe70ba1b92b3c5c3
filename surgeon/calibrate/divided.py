"""The three texts of a run: what statistics are taken from, what plans are compared on, what quality is reported on.

They never overlap: a plan chosen on the text its statistics come from looks better than it is, and
so does a quality measured on the text a plan was chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate import data
from surgeon.errors import InputError

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


def load(
    calibration: Sequence[str] | None, folder: Path, *, samples: int, sequence_length: int, seed: int, offline: bool
) -> Texts:  # fmt: skip
    """Load calibration text and divide it.

    Args:
        calibration: sources as on the command line; None or empty takes the text that ships with the package.
        folder: of the model, for its tokenizer.
        samples: wanted for statistics; the other two parts come on top.
        sequence_length: tokens of a sample at most.

    Raises:
        InputError: E314 too few samples to divide; what `surgeon.calibrate.data.load` raises.
    """
    from surgeon.data.records import parse_sources

    wanted = samples + SEARCH_SAMPLES + HELD_OUT_SAMPLES
    found = data.load(
        parse_sources(list(calibration)) if calibration else None, folder, samples=wanted,
        sequence_length=sequence_length, seed=seed, offline=offline,
    )  # fmt: skip
    given = [sample.ids for sample in found.samples]
    if len(given) < 3:
        raise InputError("E314", f"{found.record['name']} gives {_samples(len(given))}; statistics, the choice of a plan and its "
                         "quality need text of their own", help="give at least 3 records, better 100")  # fmt: skip
    # Of a short text each later part takes an eighth.
    share = max(1, min(SEARCH_SAMPLES, len(given) // 8))
    held_out, search, statistics = given[:share], given[share : 2 * share], given[2 * share :]
    record = {
        **found.record,
        "statistics": _count(statistics), "search": _count(search), "held_out": _count(held_out),
    }  # fmt: skip
    warnings = [warning for warning in found.warnings if f"not {wanted:,}" not in warning]
    if len(statistics) < samples:
        warnings.append(
            f"{found.record['name']} gives {len(given)} samples: {share} are held out, {share} compare plans, which leaves "
            f"{len(statistics)} calibration samples for statistics, not {samples}"
        )
    return Texts(
        tuple(statistics), tuple(ids[:SEARCH_TOKENS] for ids in search),
        tuple(ids[:SEARCH_TOKENS] for ids in held_out), record, tuple(warnings),
    )  # fmt: skip


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def _count(samples: list[np.ndarray]) -> dict[str, int]:
    return {"samples": len(samples), "tokens": int(sum(len(ids) for ids in samples))}
