"""Checks of a model that read only files: structure, config, index, companions, digests, values.

`verify_model` checks what a run is about to publish against its plan; `verify_path` checks any
model on disk against its own config, index and manifest. Neither imports model code: a model
that merely loads proves nothing, because readers fill missing tensors with random numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.architectures import conformance
from surgeon.checkpoint.checkpoint import Checkpoint, StoredCheckpoint, open_path
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import open_regular, printable
from surgeon.checkpoint.strict_json import read_bytes, read_json_object
from surgeon.errors import InputError, SurgeonError, Where, raise_all
from surgeon.formats.dequantized import scheme_of
from surgeon.kernels import cast
from surgeon.output.layout import Layout
from surgeon.output.manifest import CHECKSUMS, MANIFEST, seal_holds
from surgeon.output.staging import replaced
from surgeon.plan import BLOCK_ELEMENTS, OutputModel
from surgeon.verify import quantized


@dataclass
class Report:
    """What was checked and what was found; ``failed`` counts the errors of each check that has any."""

    checks: list[str] = field(default_factory=list)
    errors: list[SurgeonError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    shards: int = 0
    bytes: int = 0
    parameters: int = 0


def verify_model(
    folder: Path, layout: Layout, model: OutputModel, digests: Mapping[str, str], *, is_file: bool
) -> None:
    """Compare a staged result with its plan. The weights were read back while they were written.

    Raises:
        InputError: E350 the staged folder differs from the plan, or its config from its tensors.
    """
    findings: list[SurgeonError] = []
    expected = {o.name: (o.dtype, o.shape) for shard in layout.shards for o in shard.tensors}
    target = folder / layout.shards[0].name if is_file else folder
    checkpoint = open_path(target, target.name)
    try:
        found = {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}
        if found != expected:
            names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            findings.append(
                InputError(
                    "E350",
                    f"the staged result differs from its plan in {printable(names[0])}",
                    help="run again; --no-resume starts over",
                )
            )
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and name not in digests:
                findings.append(
                    InputError(
                        "E350",
                        f"the staged result holds a file the plan does not: {printable(name)}",
                        help="run again; --no-resume starts over",
                    )
                )
        for name, digest in sorted(digests.items()):
            path = folder / name
            if not path.is_file():
                findings.append(
                    InputError(
                        "E350",
                        f"{printable(name)} is missing in the staged result",
                        help="run again; --no-resume starts over",
                    )
                )
            elif not name.endswith(".safetensors") and _sha256(path) != digest:
                findings.append(
                    InputError(
                        "E350",
                        f"{printable(name)} is not what was written",
                        where=Where(str(path)),
                        help="the disk or another program changed it; run again",
                    )
                )
        if model.config is not None:
            findings.extend(_config_findings(checkpoint, Report(), planned=True))
    finally:
        checkpoint.close()
    raise_all(findings)


def verify_unwritten(checkpoint: Checkpoint) -> None:
    """Compare the config of a model that is not written with its names, shapes and types.

    Raises:
        InputError: E343.
    """
    raise_all(_config_findings(checkpoint, Report(), planned=True))


def _config_findings(checkpoint: Checkpoint, report: Report, planned: bool = False) -> list[SurgeonError]:
    """Compare config.json with the tensors; tensors that a plan carries along on purpose are no surprise.

    Of a quantized model, what config.json says of its modules first, then the plain model it stands for.
    """
    errors: list[SurgeonError] = []
    config, tensors = checkpoint.config or {}, checkpoint.tensors
    if scheme_of(config):
        found = quantized.check(checkpoint)
        report.notes.extend(found.notes)
        if found.errors:
            return found.errors
        if found.plain is not None:
            config, tensors = found.plain.config or {}, found.plain.tensors
            report.parameters = sum(t.elements for t in tensors.values())
            if found.modules:
                report.checks.append("quantization")
    shapes = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    for finding in conformance.check(config, shapes):
        if planned and finding.kind == "unexpected-tensor":
            report.warnings.append(finding.message)
            continue
        if finding.severity == "error":
            where = Where(tensor=printable(finding.tensor)) if finding.tensor else None
            errors.append(InputError("E343", finding.message, where=where,
                                     help="the weights and config.json do not belong together"))  # fmt: skip
        elif finding.severity == "warning":
            report.warnings.append(finding.message)
        else:
            report.notes.append(finding.message)
    return errors


def _sha256(path: Path) -> str:
    with os.fdopen(open_regular(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_path(
    path: Path, *, hashes: bool = True, values: bool = False, ignore_unlisted: bool = False
) -> Report:
    """Check a model folder or file; findings are returned, not raised.

    Args:
        path: folder or .safetensors file.
        hashes: re-hash every file a manifest, SHA256SUMS or the hub cache vouches for.
        values: read all weights: non-finite values are errors, all-zero matrices warnings.
    """
    report = Report()
    report.checks.append("structure")
    if not path.exists() and path.parent.is_dir() and (old := replaced(path)):
        report.errors.append(
            InputError("E301", f"{printable(str(path))} is absent: a run that was to replace it was interrupted",
                       where=Where(str(path)),
                       help=f"repeat that run to finish it, or restore the previous model: mv '{old[-1]}' '{path}'")
        )  # fmt: skip
        report.failed["structure"] = 1
        return report
    try:
        checkpoint = open_path(path, str(path), ignore_unlisted=ignore_unlisted)
    except SurgeonError as error:
        report.errors.extend([error, *error.others])
        report.failed["structure"] = len(report.errors)
        return report
    try:
        report.tensors, report.shards = len(checkpoint.tensors), len(checkpoint.headers)
        report.bytes = sum(t.nbytes for t in checkpoint.tensors.values())
        report.parameters = sum(t.elements for t in checkpoint.tensors.values())
        report.notes.extend(checkpoint.notes)
        if checkpoint.index_file is not None:
            _check(report, "index", lambda: _index(checkpoint, report))
        if checkpoint.config is not None:
            _check(report, "config", lambda: _config(checkpoint, report))
            _check(report, "tokenizer", lambda: _tokens(path, checkpoint, report))
        _modes(path, checkpoint, report)
        if hashes:
            _check(report, "hashes", lambda: _hashes(path, checkpoint, report))
        if values:
            _check(report, "values", lambda: _values(checkpoint, report))
    finally:
        checkpoint.close()
    return report


def _check(report: Report, name: str, work: Callable[[], None]) -> None:
    """Run one check; what it raises and what it adds to the errors counts as its failure."""
    before = len(report.errors)
    try:
        work()
    except SurgeonError as error:
        report.errors.extend([error, *error.others])
    found = len(report.errors) - before
    if found:
        report.failed[name] = found
    if found and name not in report.checks:
        report.checks.append(name)


def _config(checkpoint: StoredCheckpoint, report: Report) -> None:
    report.checks.append("config")
    # A manifest vouches for a tensor set that was planned; its hashes are checked on their own. Tensors that
    # a merge carried along (it warned) are then reported, not refused.
    ours = checkpoint.folder is not None and (checkpoint.folder / MANIFEST).is_file()
    report.errors.extend(_config_findings(checkpoint, report, planned=ours))


def _index(checkpoint: StoredCheckpoint, report: Report) -> None:
    assert checkpoint.index_file is not None
    report.checks.append("index")
    metadata = read_json_object(checkpoint.index_file).get("metadata")
    if not isinstance(metadata, dict):
        report.errors.append(InputError("E351", f"{checkpoint.index_file.name} has no metadata; transformers fails on it",
                                        where=Where(str(checkpoint.index_file)), help="surgeon export MODEL -o OUT writes the index anew"))  # fmt: skip
        return
    total = metadata.get("total_size")
    stored = sum(t.nbytes for t in checkpoint.tensors.values())
    if isinstance(total, (int, float)) and total != stored:
        report.warnings.append(f"the index says {total:,} bytes, the shards hold {stored:,}")


def _tokens(path: Path, checkpoint: StoredCheckpoint, report: Report) -> None:
    from surgeon.checkpoint.companions import check_token_ids, missing_companions, read_generation_config
    from surgeon.checkpoint.vocabulary import has_tokenizer, read_vocabulary

    if not path.is_dir():
        return
    rows = _embedding_rows(checkpoint)
    if has_tokenizer(path):
        report.checks.append("tokenizer")
        vocabulary = read_vocabulary(path)
        if rows and len(vocabulary) and max(vocabulary.tokens.values()) >= rows:
            report.errors.append(
                InputError("E352", f"the tokenizer has ids up to {max(vocabulary.tokens.values()):,}, the embedding has "
                           f"{rows:,} rows", help="the tokenizer belongs to another model")
            )  # fmt: skip
    generation = read_generation_config(path)
    if generation is not None and rows:
        check_token_ids(generation, rows, file="generation_config.json")
    if "CausalLM" in str((checkpoint.config or {}).get("architectures")):
        names = {p.name for p in path.iterdir()}
        missing = [
            m for m in missing_companions(names, path) if m not in {"LICENSE", "tokenizer_config.json"}
        ]
        if missing:
            report.warnings.append(f"missing beside the weights: {', '.join(missing)}")


def _embedding_rows(checkpoint: StoredCheckpoint) -> int:
    for name, info in checkpoint.tensors.items():
        if (
            name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
            and "vis" not in name
        ):
            return info.shape[0]
    return 0


def _modes(path: Path, checkpoint: StoredCheckpoint, report: Report) -> None:
    for header in checkpoint.headers:
        if os.stat(header.file).st_mode & 0o077 == 0:
            report.warnings.append(f"{header.file.name} can be read by its owner only")
            return


def _hashes(path: Path, checkpoint: StoredCheckpoint, report: Report) -> None:
    """Compare with every digest somebody vouches for (fault B9)."""
    known: dict[Path, str] = {}
    source = ""
    if path.is_dir():
        sums = path / CHECKSUMS
        own = path / MANIFEST
        if sums.is_file():
            source = CHECKSUMS
            text = read_bytes(sums).decode("utf-8", errors="replace")
            lines = text.removesuffix("\n").split("\n")
            pairs = [(line[66:], line[:64]) for line in lines if line[64:66] in {"  ", " *"}]
            damaged = [n for n, line in enumerate(lines, 1) if not _SUM.fullmatch(line)]
            if own.is_file():  # we wrote it: every byte of it is known
                if not text.endswith("\n"):
                    damaged.append(len(lines))
                if damaged:
                    report.errors.append(InputError("E353", f"{CHECKSUMS} is damaged in line {damaged[0]}",
                                                    where=Where(str(sums), damaged[0]), help="restore it, or produce the model again"))  # fmt: skip
                elif {n: d for n, d in pairs if n != MANIFEST} != dict(_recorded(own)):
                    report.errors.append(InputError("E353", f"{CHECKSUMS} and {MANIFEST} list different files",
                                                    where=Where(str(sums)), help="one of them was changed"))  # fmt: skip
            known = {path / n: d for n, d in _contained(pairs, CHECKSUMS)}
        elif own.is_file():
            source = MANIFEST
            report.errors.append(InputError("E353", f"{CHECKSUMS} is missing beside {MANIFEST}", where=Where(str(path)),
                                            help="produce or fetch the model again"))  # fmt: skip
            known = {path / n: d for n, d in _contained(_recorded(own), MANIFEST)}
        if source:
            listed = {str(p.relative_to(path)) for p in known} | {CHECKSUMS}
            for extra in sorted(p.name for p in path.iterdir() if p.is_file() and p.name not in listed):
                report.warnings.append(f"{printable(extra)} is not listed in {source}")
    else:
        sidecar = path.with_name(f"{path.name}.{MANIFEST}")
        if sidecar.is_file():
            source = sidecar.name
            known = dict((path, d) for n, d in _recorded(sidecar) if n == path.name)
            if not known or not seal_holds(read_bytes(sidecar)):
                report.errors.append(InputError("E353", f"{printable(sidecar.name)} was changed or damaged",
                                                where=Where(str(sidecar)), help="produce the file again"))  # fmt: skip
    if not known:
        for header in checkpoint.headers:
            real = header.file.resolve()
            if real.parent.name == "blobs" and len(real.name) == 64:
                known[header.file] = real.name
                source = "the hub cache"
    if not known:
        report.notes.append("no recorded hashes: bit rot cannot be detected")
        return
    report.checks.append("hashes")
    report.notes.append(f"hashes are compared with {source}")
    for file, digest in sorted(known.items()):
        name = file.relative_to(path) if path.is_dir() else file.name
        if not file.is_file():
            report.errors.append(
                InputError(
                    "E353",
                    f"{printable(str(name))} is listed in {source} and missing",
                    help="restore it, or produce the model again",
                )
            )
        elif _sha256(file) != digest.lower():
            report.errors.append(
                InputError("E353", f"{printable(str(name))} is not the file that was recorded in {source}",
                           where=Where(str(file)), help="it was changed or damaged; restore or produce it again")
            )  # fmt: skip


_SUM = re.compile("[0-9a-f]{64}  .+")


def _recorded(manifest: Path) -> list[tuple[str, str]]:
    files = read_json_object(manifest).get("files")
    return [(n, d) for n, d in files.items() if isinstance(d, str)] if isinstance(files, dict) else []


def _contained(pairs: list[tuple[str, str]], source: str) -> list[tuple[str, str]]:
    """Refuse recorded names that leave the folder."""
    for name, _ in pairs:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise InputError("E353", f"{source} names a file outside the folder: {printable(name)[:80]}",
                             help="it was not written by this program or by sha256sum in this folder")  # fmt: skip
    return pairs


def _values(checkpoint: StoredCheckpoint, report: Report) -> None:
    report.checks.append("values")
    for name, info in checkpoint.tensors.items():
        if DTYPES[info.dtype].family != "float":
            continue
        bad, zero = 0, info.elements > 0
        for start in range(0, info.elements, 4 * BLOCK_ELEMENTS):
            data = checkpoint.read(name, start, min(start + 4 * BLOCK_ELEMENTS, info.elements))
            mask = cast.nonfinite(data, info.dtype)
            bad += int(mask.sum()) if mask is not None else 0
            zero = zero and not np.any(data)
        if bad:
            report.errors.append(
                InputError(
                    "E321",
                    f"{bad:,} non-finite values in {printable(name)}",
                    where=Where(str(info.file)),
                    help="the file is damaged or the training diverged; surgeon inspect MODEL --stats shows all",
                )
            )
        elif zero and len(info.shape) > 1:
            report.warnings.append(f"{printable(name)} is all zeros")


def manifest_of(path: Path) -> dict[str, Any] | None:
    """Return the manifest beside a model, or None."""
    file = path / MANIFEST if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST}")
    return json.loads(file.read_bytes()) if file.is_file() else None
