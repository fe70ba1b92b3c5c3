"""Real readers: a model is loaded and used by stock transformers in a process of its own.

A reader may crash, hang or use up the memory; then that is the finding. The child process runs
`surgeon.verify.reader_child` with the hub switched off and limits on time and memory, and never
runs code that a model brings along; of models whose layers differ, whose code files the caller found
equal to the packaged ones, the packaged ones are run.

A quantized model is run in its own 16-bit type. It is compared twice: with its matrices as the reader decodes them, which
shows whether the right numbers were loaded, and as its kernels run, which may round activations as well.

Codes: E360 loading failed, E361 generation, E362 tokenizer or chat template, E363 comparison,
E364 the reader crashed; E512 a package that reads the model is missing, E513 the reader cannot do it here
(memory, the model's own code), E514 out of time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgeon import traits
from surgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint, StoredCheckpoint, open_path
from surgeon.checkpoint.dtypes import CODES, DTYPES
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.checkpoint.vocabulary import has_tokenizer
from surgeon.errors import EnvironmentFault, InputError, SurgeonError, UsageError, Where
from surgeon.formats.dequantized import DequantizedView, dequantized, scheme_of
from surgeon.kernels.cast import round_to, widen
from surgeon.system import memory_budget, physical_cores

INSTALL = "pip install 'model-surgeon[run]'"
TIMEOUT = 600.0
OVERHEAD = 1 << 30
"""Memory a reader needs beside the weights: its code, activations of short inputs, one shard."""

PACKAGES = {
    "compressed-tensors": "compressed-tensors",
    "auto-round": "auto-round",
    "bitsandbytes": "bitsandbytes",
}
"""quant_method of config.json -> what transformers needs beside itself, by its name on the package index."""

EXACT, ROUNDED = 1e-3, 0.1
"""Largest relative difference of outputs from those of the decoded numbers: in float32, where only the order of sums
differs; and where 16 bits are in between: kernels of auto-round that decode nothing, or a dense copy in another type."""
AS_RUN = 0.8
"""The same of a model as its kernels run, from the reference in float32: eight-bit activations take small random models a
tenth away, routers that choose otherwise in 16 bits a quarter; outputs that have nothing in common are 1.4 apart."""

_CODES = {"load": "E360", "generate": "E361", "tokenizer": "E362", "chat template": "E362", "against": "E363"}
_FIXES = {
    "load": "weights and config.json must belong together: surgeon verify MODEL names the tensors that differ",
    "generate": "values that are not finite: surgeon verify MODEL --values; else compare generation_config.json with the original's",
    "tokenizer": "copy the tokenizer's files from the original model",
    "chat template": "copy the chat template from the original model",
    "against": "models are compared that have one architecture and vocabulary",
}  # fmt: skip
_BUFFERS = (".inv_freq", ".masked_bias", ".position_ids", ".attn.bias", ".attention.bias")


@dataclass
class Reading:
    """What a reader said.

    Attributes:
        checks: check -> its figures; None for a check that had nothing to look at.
        errors: failures.
        warnings: what is odd and not wrong.
        versions: of the reader's packages.
        dtype: type the model was loaded in.
        precision: a quantized model with its matrices decoded was run in.
    """

    checks: dict[str, Any] = field(default_factory=dict)
    errors: list[SurgeonError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class OwnCode:
    """A packaged model class: its file in a folder of modules, and its name there."""

    folder: Path
    module: str
    name: str


def available() -> list[str]:
    """Return the packages a reader needs that are not installed; imports nothing."""
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


def require(*folders: Path) -> None:
    """Refuse what no reader can load, and a machine without a reader.

    Raises:
        UsageError: E207 not a model folder.
        EnvironmentFault: E512 torch or transformers is missing, or the package for a quantized folder.
    """
    for place in folders:
        if not (place / CONFIG_NAME).is_file():
            raise UsageError("E207", f"{place} is no model folder; readers load folders with {CONFIG_NAME}",
                             help="give the folder")  # fmt: skip
    missing = available()
    if missing:
        raise EnvironmentFault("E512", f"{' and '.join(missing)} not installed: the model cannot be loaded here",
                               help=INSTALL)  # fmt: skip
    for place in folders:
        package = missing_package(place)
        if package is not None:
            raise EnvironmentFault("E512", f"{package} is not installed: without it transformers cannot load {place}",
                                   help=f"pip install {package}")  # fmt: skip


def missing_package(folder: Path) -> str | None:
    """Return the package that transformers needs to load a quantized folder and that is not installed; imports nothing."""
    method = method_of(read_json_object(folder / CONFIG_NAME))
    package = PACKAGES.get(method or "")
    return package if package and importlib.util.find_spec(package.replace("-", "_")) is None else None


def method_of(config: Mapping[str, Any] | None) -> str | None:
    """Return the quant_method that config.json names; None for a plain model."""
    method = scheme_of(config).get("quant_method")
    return method if isinstance(method, str) else None


def read_with_transformers(
    path: Path,
    *,
    generate: bool = False,
    against: Path | None = None,
    timeout: float = TIMEOUT,
    memory_limit: int | None = None,
    own_code: Mapping[Path, OwnCode] | None = None,
    samples: Sequence[np.ndarray] = (),
    outputs: Path | None = None,
) -> Reading:
    """Load a model folder with transformers in a fresh process; optionally generate and compare.

    Args:
        generate: greedy tokens with and without the cache, tokenizer, chat template; a forward pass where nothing generates.
        against: another folder, whose outputs on fixed tokens are compared. Beside a quantized model that holds just these
            numbers (its own, dequantized), the outputs have to agree; beside any other the difference is only said.
        own_code: folder -> the packaged class it is loaded with, where its own code files equal the package's.
        samples: token ids a quantized model is shown; needs ``outputs``.
        outputs: existing folder for float32 logits [tokens, vocabulary] (last hidden states of a model without head) of
            each sample: ``decoded-N.npy`` with decoded matrices, ``as-run-N.npy`` as the kernels run.

    Raises:
        UsageError: E207 the model is a bare file, which no reader loads.
        EnvironmentFault: E512 to E514 it cannot be tried here.
    """
    require(path, *([against] if against is not None else []))
    budget = memory_limit or memory_budget()
    request = _request(path, generate, against, budget)
    request["samples"] = [np.asarray(ids).reshape(-1).tolist() for ids in samples]
    request["outputs"] = str(outputs.absolute()) if outputs is not None else None
    request["own_code"] = {
        str(place.absolute()): {"folder": str(own.folder), "module": own.module, "name": own.name}
        for place, own in (own_code or {}).items()
    }
    answer, code = _run(request, timeout)
    found = _reading(path, answer, code)
    if request["quantized"] and against is not None and "against" in found.checks:
        _judge(found, path, against)
    return found


def _judge(found: Reading, path: Path, against: Path) -> None:
    """Add an error where a quantized model is not what its own decoded numbers compute (E363)."""
    figures = found.checks["against"]
    ours, theirs = open_path(path, str(path)), open_path(against, str(against))
    try:
        figures["own"] = holds_the_same(ours, theirs)
        same_types = {t.dtype for t in theirs.tensors.values()} >= _decoded_types(ours)
    finally:
        ours.close()
        theirs.close()
    if not figures["own"]:
        return
    precision = figures["precision"] if same_types else "another"
    reason = too_far(figures["relative"], figures["as_run"], precision)
    if reason is not None:
        found.errors.append(InputError("E363", f"the model does not compute what its quantized matrices stand for: {reason}",
                                       where=Where(str(path)), help="its reader takes them for other numbers; do not use it there"))  # fmt: skip


def too_far(relative: float, as_run: float, precision: str) -> str | None:
    """Return why a quantized model's outputs are not those of the numbers it stands for, None when they are.

    Args:
        relative: difference of outputs, matrices decoded, by the norm of the reference.
        as_run: the same as its kernels run.
        precision: the first was computed in, and the reference with the same matrices.
    """
    allowed = EXACT if precision == "float32" else ROUNDED
    if not relative <= allowed:
        return f"the outputs differ by {relative:.3g} (relative), at most {allowed:g} was expected"
    if not as_run <= AS_RUN:
        return f"as its kernels run, the outputs differ by {as_run:.3g} (relative), at most {AS_RUN:g} was expected"
    return None


def holds_the_same(stored: Checkpoint, plain: Checkpoint) -> bool:
    """Say whether a plain model holds exactly the numbers a quantized one stands for, in whatever type keeps them."""
    view = _decoded(stored)
    if view is None:
        return False
    names = set(view.tensors)
    if traits.quantized(plain) is not None or names != set(plain.tensors):
        return False
    if any(view.tensors[name].shape != plain.tensors[name].shape for name in names):
        return False
    return all(_equal(view, plain, name) for name in sorted(names))


def _decoded_types(stored: Checkpoint) -> set[str]:
    """Return the types matrices of a quantized model are decoded to."""
    view = _decoded(stored)
    return set() if view is None else {t.dtype for n, t in view.tensors.items() if view.computed(n)}


def _equal(view: DequantizedView, plain: Checkpoint, name: str) -> bool:
    mine, theirs = view.tensors[name], plain.tensors[name]
    step = max(view.granularity(name), 1 << 20)
    for start in range(0, mine.elements, step):
        stop = min(start + step, mine.elements)
        one, other = view.read(name, start, stop), plain.read(name, start, stop)
        if mine.dtype == theirs.dtype:
            same = np.array_equal(one, other)
        elif {DTYPES[mine.dtype].family, DTYPES[theirs.dtype].family} != {"float"}:
            same = False
        else:  # decoded to float16, kept in a model of bfloat16
            same = np.array_equal(round_to(widen(one, mine.dtype), theirs.dtype), widen(other, theirs.dtype))
        if not same:
            return False
    return True


def _request(path: Path, generate: bool, against: Path | None, budget: int) -> dict[str, Any]:
    checkpoint = open_path(path, str(path))
    try:
        request = _describe(checkpoint)
        needed = _needed(checkpoint, wide=generate or against is not None)
    finally:
        checkpoint.close()
    if against is not None:
        other = open_path(against, str(against))
        needed = max(needed, _needed(other, wide=True))
        request["vocabulary"] = min(request["rows"], _rows(other)) or None
        other.close()
    else:
        request["vocabulary"] = None
    if needed > budget:
        raise EnvironmentFault(
            "E513", f"loading {path} needs about {needed / 1e9:.1f} GB of memory, {budget / 1e9:.1f} GB are available",
            help="verify it on a larger machine; the static checks need no memory",
        )  # fmt: skip
    return {
        **request, "path": str(path.absolute()), "generate": generate, "threads": physical_cores(),
        "against": str(against.absolute()) if against else None, "has_tokenizer": has_tokenizer(path),
        "memory_limit": max(budget, 2 * OVERHEAD),
    }  # fmt: skip


def _describe(checkpoint: StoredCheckpoint) -> dict[str, Any]:
    """Return what the loaded model is compared with: parameters, declared type."""
    config = checkpoint.config or {}
    section = traits.text_section(config)
    declared = next((s[k] for s in (config, section) for k in ("dtype", "torch_dtype") if isinstance(s.get(k), str)), None)  # fmt: skip
    declared = declared.removeprefix("torch.") if declared else None
    packed = traits.quantized(checkpoint) is not None
    head, embedding = traits.head_name(checkpoint.tensors), traits.embedding_name(checkpoint.tensors)
    skipped = {n for n in checkpoint.tensors if n.endswith(_BUFFERS)}
    if traits.is_tied(checkpoint) and head is not None and embedding is not None:
        skipped.add(head)
    count = sum(t.elements for n, t in checkpoint.tensors.items() if n not in skipped)
    stored = {t.dtype for t in checkpoint.tensors.values() if DTYPES[t.dtype].family == "float"}
    # Mixed files load as declared, in one type; a type the files never use proves nothing either way.
    plain = declared in CODES and not packed and stored == {CODES[declared]}
    return {
        "parameters": None if packed else count,
        "dtype": declared if plain else None,
        "rows": _rows(checkpoint),
        "quantized": _quantized(checkpoint) if packed else None,
    }


def _quantized(checkpoint: StoredCheckpoint) -> dict[str, Any]:
    """Return how many modules have to be quantized in memory: of the forms that are read here, all that are on disk.

    transformers decodes experts of compressed-tensors while it loads them.
    """
    method, least = method_of(checkpoint.config), 0
    view = _decoded(checkpoint)
    if view is not None:
        decoded = [name for name in view.tensors if view.computed(name)]
        least = sum(method != "compressed-tensors" or traits.part_of(name) != "expert" for name in decoded)
    return {"method": method, "least": least, "package": PACKAGES.get(method or "")}


def _decoded(checkpoint: Checkpoint) -> DequantizedView | None:
    """Return the plain numbers of a model in one of the forms of `PACKAGES`, None of any other and where they cannot be read."""
    if method_of(checkpoint.config) not in PACKAGES:
        return None
    try:
        return dequantized(checkpoint)
    except InputError:
        return None


def _rows(checkpoint: StoredCheckpoint) -> int:
    name = traits.embedding_name(checkpoint.tensors)
    return checkpoint.tensors[name].shape[0] if name else 0


def _needed(checkpoint: StoredCheckpoint, *, wide: bool) -> int:
    stored = sum(t.nbytes for t in checkpoint.tensors.values())
    if (view := _decoded(checkpoint)) is not None:
        # compressed-tensors unpacks everything in the first pass; what is compared is widened, packed matrices alone are not
        unpacked = method_of(checkpoint.config) == "compressed-tensors"
        each = 4 if wide else 2
        return (
            OVERHEAD
            + stored
            + sum(each * t.elements for n, t in view.tensors.items() if unpacked or not view.computed(n))
        )
    return OVERHEAD + (
        max(stored, sum(4 * t.elements for t in checkpoint.tensors.values())) if wide else stored
    )


def _run(request: dict[str, Any], timeout: float) -> tuple[dict[str, Any], int]:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(request["threads"]),
    }  # fmt: skip
    child = Path(__file__).with_name("reader_child.py")
    with tempfile.TemporaryDirectory(prefix="surgeon-reader-") as folder:
        file = Path(folder) / "answer.json"
        process = subprocess.Popen(
            [sys.executable, "-P", str(child)], env=environment, cwd=folder, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps({**request, "answer": str(file)}).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            stage = _answer(file).get("stage", "start")
            raise EnvironmentFault("E514", f"the reader did not finish within {timeout:g} s; it was {stage}",
                                   help="--timeout allows more; a chat template that never ends also looks like this") from None  # fmt: skip
        finally:
            if process.poll() is None:
                _kill(process)
        return _answer(file), process.returncode


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (OSError, AttributeError):
        process.kill()
    process.wait()


def _answer(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}


def _reading(path: Path, answer: dict[str, Any], code: int) -> Reading:
    stage = answer.get("stage", "start")
    if stage != "done" and not answer.get("unable"):
        if code == -signal.SIGKILL:
            raise EnvironmentFault("E513", f"the reader was killed while {stage}; most likely the memory ran out",
                                   help="verify it on a larger machine")  # fmt: skip
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        error = InputError("E364", f"the reader {how} while {stage}", where=Where(str(path)),
                           help="transformers crashes on this model; the static checks may say why")  # fmt: skip
        return Reading(
            answer.get("checks", {}), [error], answer.get("warnings", []), answer.get("versions", {})
        )
    if answer.get("unable"):
        text = answer["unable"]
        absent = "not installed" in text or "requires" in text
        raise EnvironmentFault("E512" if absent else "E513", f"the model cannot be loaded here: {text}",
                               help=INSTALL if absent else "verify it on a machine where the model can be loaded; the static checks need no such machine")  # fmt: skip
    errors: list[SurgeonError] = [
        InputError(
            _CODES.get(f["check"], "E364"),
            f["message"],
            where=Where(str(path)),
            help=_FIXES[f["check"]] if f["check"] in _FIXES else _FIXES["load"],
        )
        for f in answer["failures"]
    ]
    return Reading(answer["checks"], errors, answer["warnings"], answer.get("versions", {}), answer.get("dtype"), answer.get("precision"))  # fmt: skip


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
