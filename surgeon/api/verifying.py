"""`verify`: the checks of one finished model, and what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.api.looking import diff
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.source import locate
from surgeon.errors import EnvironmentFault, InputError, SurgeonError, UsageError, Where
from surgeon.merge.references import parse_model_ref
from surgeon.python import findings
from surgeon.python.progress import Progress, telling
from surgeon.python.rendering import View
from surgeon.python.results import Shown

if TYPE_CHECKING:
    from surgeon.verify import readers
    from surgeon.verify.readers import Reading
    from surgeon.verify.static import Report as Checked


@dataclass(repr=False)
class Verification(Shown):
    """What `verify` found; ``errors`` is empty when every check passed."""

    path: Path
    report: Checked
    reading: Reading | None = None
    against: dict[str, Any] | None = None
    decoded: dict[str, Any] | None = None
    findings: list[SurgeonError] = field(default_factory=list)

    @property
    def errors(self) -> list[SurgeonError]:
        return [*self.report.errors, *(self.reading.errors if self.reading else []), *self.findings]

    @property
    def warnings(self) -> list[str]:
        return [*self.report.warnings, *(self.reading.warnings if self.reading else [])]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.errors

    def view(self) -> View:
        return findings.of_verification(self)


@telling
def verify(
    model: str | Path,
    *,
    values: bool = True,
    hashes: bool = True,
    load: bool = False,
    generate: bool = False,
    against: str | Path | None = None,
    tolerance: float | None = None,
    timeout: float | None = None,
    memory_limit: int | None = None,
    ignore_unlisted: bool = False,
    offline: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a model; findings are returned, not raised.

    Args:
        values: read all weights: non-finite values are errors.
        hashes: re-hash files for which a sha256 is recorded.
        load: load it with stock transformers in a process of its own; ``generate`` and ``against`` imply it.
        generate: greedy tokens with and without the cache, tokenizer round trips, the chat template.
        against: another model folder: compare tensors, and logits on fixed tokens.
        tolerance: with ``against``: the largest relative difference of the logits that passes.
        progress: see `surgeon.python.progress.Progress`; one step for each of the checks.

    Raises:
        UsageError: the model is an adapter, or a bare file that should be loaded.
        EnvironmentFault: E512 to E514, the reader cannot be run here.
    """
    from surgeon.verify import readers
    from surgeon.verify.static import verify_path

    reference = parse_model_ref(str(model))
    if reference.adapter:
        raise UsageError("E207", f"{model} is a model with an adapter; verify checks one model on disk",
                         help="verify the two separately, or merge them first")  # fmt: skip
    try:
        path = locate(reference.path, reference.revision, reference.subfolder, offline=offline).path
        if load or generate or against is not None:
            readers.require(path)
        tell = _steps_of(load or generate, against is not None, progress)
        tell(0)
        report = verify_path(path, hashes=hashes, values=values, ignore_unlisted=ignore_unlisted)
    except OSError as error:
        raise EnvironmentFault(
            "E502",
            f"cannot read {printable(str(model))}: {error.strerror or error}",
            help="give a path that this user can read",
        ) from error
    found = Verification(path, report)
    tell(1)
    if report.errors or not (load or generate or against):
        return found  # a reader fills what is missing with random numbers: nothing it says would count
    other = None
    if against is not None:
        second = parse_model_ref(str(against))
        other = locate(second.path, second.revision, second.subfolder, offline=offline).path
    masked = _without_experts(path) if against is not None else None
    if masked is not None and other is not None:
        # Its experts are numbered anew, and it must not compute what the source does: it is compared with the
        # source in which the experts that went are masked.
        _compare_masked(found, masked, other, threads=threads, memory_limit=memory_limit)
        other = None
    elif against is not None:
        result = diff(
            model, against, values=True, anatomy=False, dequantize=True, offline=offline, threads=threads
        )
        unequal = [n for n, v in (result.values or {}).items() if v.changed]
        found.against = {
            "compared": len(result.values or {}), "equal": len(result.values or {}) - len(unequal),
            "structure_differs": result.structure.differs,
            "max_abs": max((v.max_abs for v in (result.values or {}).values()), default=0.0),
        }  # fmt: skip
    if against is not None:
        tell(2)
    found.reading = readers.read_with_transformers(
        path, generate=generate, against=other, timeout=timeout or readers.TIMEOUT, memory_limit=memory_limit,
        own_code=_own_code(path, *([other] if other is not None else [])),
    )  # fmt: skip
    if against is None and not found.reading.errors:
        _compare_decoded(found, memory_limit=memory_limit)
    logits = found.reading.checks.get("against")
    if tolerance is not None and logits and logits["relative"] > tolerance:
        found.reading.errors.append(
            InputError("E363", f"the logits differ by {logits['relative']:.3g} (relative), above {tolerance:g}",
                       where=Where(str(path)), help="--tolerance sets how much may differ; models that should be equal differ by roundings only")
        )  # fmt: skip
    tell(3 if against is not None else 2)
    return found


def _steps_of(load: bool, against: bool, progress: Progress | None) -> Callable[[int], None]:
    """Return what tells how many steps of a check are done."""
    names = ["checking files and values"]
    names += ["comparing tensors"] if against else []
    names += ["loading"] if load or against else []

    def tell(done: int) -> None:
        if progress is not None:
            progress(names[min(done, len(names) - 1)], done, len(names))

    return tell


def _compare_decoded(found: Verification, *, memory_limit: int | None) -> None:
    """Of a quantized model, compare what its reader computes with the numbers that are stored."""
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.traits import quantized

    checkpoint = open_path(found.path, str(found.path))
    if quantized(checkpoint) is None:
        return
    from surgeon.deploy import quantized_check
    from surgeon.formats.dequantized import dequantized

    try:
        found.decoded = quantized_check.check(found.path, dequantized(checkpoint), memory_limit=memory_limit)
    except InputError as error:
        if error.code in ("E445", "E446", "E447"):  # a form that is not read here; its reader loaded it
            found.decoded = {"notice": f"not compared with decoded numbers: {error.message}"}
            return
        found.findings.append(error)


def _without_experts(folder: Path) -> dict[str, Any] | None:
    """Return what the report of a pruned mixture of experts says, None for any other model."""
    try:
        document = json.loads((folder / "pruning.json").read_bytes())
        return document if isinstance(document, dict) and "experts" in document else None
    except (OSError, ValueError):
        return None


def _compare_masked(
    found: Verification,
    document: dict[str, Any],
    other: Path,
    *,
    threads: int | None,
    memory_limit: int | None,
) -> None:
    """Compare a model with fewer experts with its source, layer by layer; both may be larger than memory."""
    from surgeon.calibrate.data import random_tokens
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.experts import masked
    from surgeon.formats.dequantized import runnable
    from surgeon.structure.experts.cut import ExpertCut
    from surgeon.structure.experts.find import experts_of

    if document.get("replaced"):
        found.findings.append(InputError("E409", "its experts were merged, so nothing else computes what it must", where=Where(str(found.path)),
                                         help="leave --against out, and evaluate it"))  # fmt: skip
        return
    source, pruned = open_path(other, str(other)), open_path(found.path, str(found.path))
    try:
        cut = ExpertCut.from_document(document["experts"])
        config = source.config or {}
        vocabulary = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 1)
        samples = [sample.ids for sample in random_tokens(vocabulary, 4, 64, 0).samples]
        whole = runnable(source)
        result = masked.compare(
            whole,
            experts_of(whole),
            cut,
            runnable(pruned),
            samples,
            Settings(threads=threads, memory_limit=memory_limit),
        )
    except (KeyError, TypeError, ValueError) as error:
        found.findings.append(
            InputError(
                "E408",
                f"pruning.json is damaged: {type(error).__name__}",
                where=Where(str(found.path)),
                help="prune the source again; without --against the folder is verified without its report",
            )
        )
        return
    except SurgeonError as error:
        found.findings.append(error)
        return
    finally:
        source.close()
        pruned.close()
    found.against = {
        "masked": True, "max_difference": result.max_difference, "exact": result.exact, "tokens": result.tokens,
        "differs_from_unmasked": result.differs_from_unmasked, "tolerance": result.tolerance,
    }  # fmt: skip
    if not result.equal:
        found.findings.append(InputError("E409", f"its logits differ from those of the source with the dropped experts masked by {result.max_difference:.3g}, "
                                         f"more than roundings explain ({result.tolerance:.2g})", where=Where(str(found.path)),
                                          help="was it pruned from this --against? then files changed since: surgeon verify MODEL, or prune again"))  # fmt: skip


def _own_code(*folders: Path) -> dict[Path, readers.OwnCode]:
    """Return the packaged class for every folder of a model whose layers differ (its own files are never run).

    Raises:
        InputError: E326 a code file in a folder is not the packaged one; E327 a family without such a class.
    """
    from surgeon.checkpoint.strict_json import read_json_object
    from surgeon.deploy import packaged

    return {
        folder: own for folder in folders if (own := packaged.code_of(folder, read_json_object(folder / "config.json")))
    }  # fmt: skip
