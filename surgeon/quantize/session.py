"""What the steps of one quantization share: the model as numbers, its matrices, the form, texts; each made once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.calibrate import divided, quality
from surgeon.calibrate.matrices import Matrix
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import CODES, CONFIG_NAMES, DTYPES
from surgeon.deploy import per_layer
from surgeon.derive import Source
from surgeon.errors import InputError, UsageError, Where
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.quantize import forms
from surgeon.quantize.forms import Form
from surgeon.quantize.linear import Linear, linear_of
from surgeon.quantize.request import QuantizeRequest
from surgeon.quantize.sequential import Options
from surgeon.traits import is_tied, quantized

Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]

PLACES = frozenset({"model", "work", "threads", "memory_limit", "device", "offline", "calibration", "max_shard_size",
                    "sensitivities", "plan"})  # fmt: skip
"""Fields of the request that say where and how fast, not what."""
OF_TEXT = ("name", "sha256", "ids_sha256", "statistics", "search", "held_out")


@dataclass
class Session:
    """One model under one request.

    Attributes:
        source, request: the model, and what is asked for.
        work: folder for everything that a later run can take up.
        tell: progress, (what, done, total).
        say: one sentence for the user.
        stop: set to end early.
        warnings: sentences for the user.
        said: what was told already and need not be told again.
        original: what the result is judged by, where the model here is already a part of it.
    """

    source: Source
    request: QuantizeRequest
    work: Path
    tell: Tell
    say: Say
    stop: threading.Event | None = None
    warnings: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    original: Checkpoint | None = None

    # ---- the model ---------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        """The model as plain numbers.

        Raises:
            InputError: E311 it is quantized already.
        """
        checkpoint = self.source.checkpoint
        already = quantized(checkpoint)
        if already:
            raise InputError("E311", f"{checkpoint.label} is quantized ({already}); quantizing starts from plain weights",
                             where=Where(checkpoint.label), help="--dequantize converts while reading; the checkpoint it was made from is better")  # fmt: skip
        return checkpoint

    @cached_property
    def folder(self) -> Path:
        folder = self.checkpoint.folder
        if folder is None or self.checkpoint.config is None:
            raise InputError("E317", f"{self.source.path} is a bare file: quantizing needs config.json",
                             where=Where(self.source.path), help="give the model folder")  # fmt: skip
        return folder

    @cached_property
    def linear(self) -> Linear:
        _ = self.folder
        if per_layer.is_per_layer(self.checkpoint.config or {}):
            raise InputError("E380", f"the layers of {self.source.key} differ in size; such models cannot be run layer by layer, which quantizing does",
                             where=Where(self.source.path),
                             help="surgeon export MODEL --to gguf --gguf-type q4_0 rounds them; surgeon prune --layout uniform keeps layers alike")  # fmt: skip
        return linear_of(self.checkpoint, self.settings, self.request.ignore or ())

    @cached_property
    def dtype(self) -> str:
        """Storage code of the plain tensors of the result.

        Raises:
            UsageError: E217 a type that the form's readers do not run.
        """
        if self.request.dtype is not None:
            return CODES[self.request.dtype]
        held: dict[str, int] = {}
        for matrix in self.linear.matrices:
            code = self.checkpoint.tensors[matrix.tensor].dtype
            held[code] = held.get(code, 0) + matrix.elements
        return max(sorted(held), key=held.__getitem__)

    @cached_property
    def form(self) -> Form:
        config = self.checkpoint.config or {}
        reader = Reader(
            self.request.runtime, self.dtype, bool(is_tied(self.checkpoint)), self.request.tensor_parallel
        )
        if self.request.format == "auto-round" and self.dtype not in ("F16", "BF16"):
            raise UsageError("E217", "readers of auto-round run models in 16 bits, and this one is stored in float32",
                             help="--dtype bfloat16 rounds what is not quantized")  # fmt: skip
        found = forms.get(self.request.format, reader, config.get("model_type"))
        if self.request.double_quant:
            found.double = True  # type: ignore[attr-defined]
        return found

    def stored(self, name: str) -> tuple[str, int]:
        """Return the storage code and the bytes of a tensor that is not quantized, as it will be written."""
        info = self.checkpoint.tensors[name]
        target = CODES[self.request.dtype] if self.request.dtype else info.dtype
        code = target if DTYPES[info.dtype].family == "float" else info.dtype
        return code, info.elements * DTYPES[code].bits // 8

    @cached_property
    def gguf_sizes(self) -> Any:
        """What tells the bytes of a GGUF file, `surgeon.deploy.gguf.Sizes`."""
        from surgeon.deploy import export_gguf

        return export_gguf.sizes(
            self.source,
            self.checkpoint,
            dtype=CONFIG_NAMES[self.dtype],
            name=export_gguf.model_name(self.source),
        )

    # ---- conditions --------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Settings:
        r = self.request
        return Settings(device=r.device, dtype=r.calibration_dtype, memory_limit=r.memory_limit, threads=r.threads,
                        spill=self.work / "pass")  # fmt: skip

    @property
    def plain_settings(self) -> Settings:
        """Settings of passes that are not resumed."""
        return replace(self.settings, spill=None)

    @cached_property
    def options(self) -> Options:
        r = self.request
        gptq = r.method in ("gptq", "awq-gptq")
        # A range that leaves the least error of the weights alone leaves GPTQ no room to make up for errors: on a trained
        # decoder at 2 bits KL was .053 with the search and .015 without (benchmarks/quantization).
        clip = False if r.clip is None and gptq else r.clip
        return Options(method="gptq" if gptq else "rtn", order=r.order, damp=r.damp, clip=clip,
                       true_sequential=r.true_sequential, target_shift=r.target_shift)  # fmt: skip

    # ---- text --------------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> divided.Texts:
        r = self.request
        found = divided.load(r.calibration, self.folder, samples=r.samples, sequence_length=r.sequence_length,
                             seed=r.seed, offline=r.offline)  # fmt: skip
        self.warnings.extend(found.warnings)
        if not r.calibration:
            self.say("no --calibration was given: the text that comes with surgeon is used")
        counted = found.record["statistics"]
        self.say(f"calibrating on {found.record['name']}: {counted['samples']} samples, {counted['tokens']:,} tokens; "
                 f"{found.record['held_out']['tokens']:,} tokens held out")  # fmt: skip
        if counted["tokens"] < 4096:
            self.warnings.append(
                f"{counted['tokens']:,} calibration tokens are few: give 128 texts of 512 tokens or more"
            )
        return found

    @property
    def decoder(self) -> bool:
        """Whether the model predicts next tokens."""
        names = (self.checkpoint.config or {}).get("architectures") or []
        return any("CausalLM" in str(name) or "LMHead" in str(name) for name in names)

    @property
    def judge(self) -> Checkpoint:
        """The model that results are compared with."""
        return self.original or self.checkpoint

    @cached_property
    def reference(self) -> list[Tensor]:
        """Last hidden states of the source on the held-out text."""
        return quality.last_states(self.judge, self.texts.held_out, self.plain_settings, stop=self.stop)

    def release(self) -> None:
        """Nothing is held between steps."""

    # ---- identity ----------------------------------------------------------------------------------

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What of the request and of the text decides about the result, without places."""
        document = self.request.model_dump(mode="json")
        found: dict[str, Any] = {"request": {n: v for n, v in document.items() if n not in PLACES}}
        if self.needs_text:
            found["calibration"] = {
                name: self.texts.record[name] for name in OF_TEXT if name in self.texts.record
            }
        for name in ("plan", "sensitivities"):
            given = getattr(self.request, name)
            if given and Path(given).expanduser().is_file():
                found[name] = hashlib.sha256(Path(given).expanduser().read_bytes()).hexdigest()
        return found

    @property
    def needs_text(self) -> bool:
        """Whether the result depends on calibration."""
        r = self.request
        targeted = r.target is not None and r.sensitivity != "weight"
        return r.method != "rtn" or targeted or r.target_kl is not None


Schemes = dict[str, Scheme | None]
"""Name of a matrix -> how it is stored; None as it is."""


def by_label(matrices: tuple[Matrix, ...]) -> dict[str, Matrix]:
    """Return matrices by the name of their tensor."""
    return {matrix.tensor: matrix for matrix in matrices}
