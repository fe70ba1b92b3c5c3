"""Options of all commands that read calibration text, and their meaning for `surgeon.calibrate.data.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

Source = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="JSONL, text or parquet file, folder, or dataset id org/name[:config[:split]]; NAME=FILE names a domain; "
        "repeat [the shipped text].",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Texts taken, by --seed.")]
SequenceLength = Annotated[int, typer.Option("--sequence-length", min=2, help="Most tokens of one text.")]
Precision = Annotated[
    str, typer.Option("--calibration-dtype", help="Precision of calibration: float32, bfloat16, float16.")
]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="Join texts into full sequences.")]


def load_arguments(
    texts: Sequence[str] | None,
    *,
    samples: int = 128,
    sequence_length: int = 2048,
    pack: bool = False,
    seed: int = 0,
    offline: bool = False,
) -> dict[str, Any]:
    """Return keyword arguments of `surgeon.calibrate.data.load`, ``source`` among them.

    No text at all is the source None: the calibration text that comes with the package.

    Raises:
        UsageError: E222 a source cannot be understood, or is given twice.
    """
    from surgeon.data.records import parse_sources

    return {
        "source": parse_sources(texts) if texts else None,
        "samples": samples,
        "sequence_length": sequence_length,
        "pack": pack,
        "seed": seed,
        "offline": offline,
    }


def announcement(record: Mapping[str, Any]) -> str:
    """Return the line that says what a model is calibrated on, from a calibration set's record."""
    domains = ", ".join(f"{name} {count}" for name, count in (record.get("domains") or {}).items())
    return (
        f"calibrating on {record['name']}: {record['samples']:,} {'blocks' if record['pack'] else 'samples'}, "
        f"{record['tokens']:,} tokens" + (f" ({domains})" if domains else "")
    )
