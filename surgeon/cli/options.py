"""Options that mean the same in every command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id.")]
ModelOrHere = Annotated[str, typer.Argument(metavar="[MODEL]", help="Folder or hub id [the current folder].")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; logs on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and warnings only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail; all findings of an error.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress line.")]
OutputPath = Annotated[
    str | None, typer.Option("--output", "-o", help="Folder, or file ending in .safetensors.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a previous model folder as a whole.")]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace whatever file -o names.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue a matching interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan, check, estimate, print; write nothing.")]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16 or bfloat16 for written floats [base model's]."),
]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Decimal units.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=256, help="Workers [physical cores].")]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory-limit", help="e.g. 2GB [min(cgroup, 80 % of free RAM)].")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random methods; recorded.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Weights = Annotated[
    str, typer.Option("--weights", help="auto, index or single: which weights count when a folder has both.")
]
IgnoreUnlisted = Annotated[
    bool,
    typer.Option("--ignore-unlisted", help="Leave out tensors a shard holds but its index does not list."),
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="config.json for a bare .safetensors file.")]
Strict = Annotated[bool, typer.Option("--strict", help="Warnings are errors.")]
ExpertRecord = Annotated[
    str | None,
    typer.Option("--expert-record", help="YAML that says where experts lie, for a family without a record."),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Copy NaN and Inf where a tensor is only copied.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickle checkpoints through torch's weights-only loader.")
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Read quantized models as plain 16-bit numbers, converted while reading; recorded.",
    ),
]


def byte_size(text: str | None, option: str) -> int | None:
    """Parse a size option.

    Raises:
        UsageError: E209.
    """
    from surgeon.system import parse_size

    if text is None:
        return None
    try:
        value = parse_size(text)
    except ValueError:
        raise UsageError("E209", f'{option} is "{text}"', help="a size such as 5GB, 800MB or 2GiB") from None
    if value < 1:
        raise UsageError("E209", f'{option} is "{text}"', help="it must be above 0")
    return value


def numbers(texts: list[str] | None, option: str) -> tuple[float, ...]:
    """Parse repeated options and comma lists of numbers."""
    values = []
    for text in texts or []:
        for part in text.split(","):
            try:
                values.append(float(part))
            except ValueError:
                raise UsageError(
                    "E209", f'{option} is "{text}"', help="a number, or a comma list of numbers"
                ) from None
    return tuple(values)


def assignments(texts: list[str] | None, option: str) -> dict[str, Any]:
    """Parse repeated NAME=VALUE options; a comma list becomes a list."""
    found: dict[str, Any] = {}
    for text in texts or []:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise UsageError("E209", f'{option} is "{text}"', help="NAME=VALUE")
        if name.strip() in found:
            raise UsageError("E209", f"{option} sets {name.strip()} twice", help="give it once")
        found[name.strip()] = value.split(",") if "," in value else value
    return found
