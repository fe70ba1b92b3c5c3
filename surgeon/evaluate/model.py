"""Loading a model for evaluation, strictly, and what identifies it.

transformers fills tensors that a file lacks with random numbers and only logs it; here anything
missing, left over or of another shape is an error.

Codes: E207 no model folder, E392 it does not load as it is, E393 no prompt can be made;
E512 torch or transformers is missing, E513 not enough memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import traits
from surgeon.checkpoint.checkpoint import CONFIG_NAME, StoredCheckpoint, open_path
from surgeon.checkpoint.companions import read_generation_config, token_ids
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.dtypes import CODES
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.source import Located, locate, looks_local
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import EnvironmentFault, InputError, SurgeonError, UsageError, Where
from surgeon.formats.dequantized import DequantizedView, dequantized, permitted, plain_needed
from surgeon.system import memory_budget
from surgeon.verify.readers import require

if TYPE_CHECKING:
    from surgeon.deploy.expanded import ExpandedView

OVERHEAD = 1 << 30
"""Memory beside weights and cache: the libraries, activations of a prefill."""
_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


@dataclass(frozen=True)
class Described:
    """A model folder, from its files alone.

    Attributes:
        name: of the folder or hub id.
        located: where it lies.
        parameters, bytes: of the stored tensors.
        dtype: the type most parameters are stored in, as config.json writes it.
        sha256: over config.json, the tokenizer's and generation files and the weights' digests.
        text: the part of config.json that describes the language model.
        decoded: what is said of a quantized model that is read as plain numbers; empty of any other.
    """

    name: str
    located: Located
    parameters: int
    bytes: int
    dtype: str
    sha256: str
    text: dict[str, Any]
    decoded: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.located.path

    def plain(self) -> dict[str, Any]:
        """Return what the result document says about it."""
        return {
            "name": self.name, "path": str(self.path), "parameters": self.parameters, "bytes": self.bytes,
            "dtype": self.dtype, "sha256": self.sha256, **({"dequantized": True} if self.decoded else {}),
        }  # fmt: skip


def find(reference: str, *, offline: bool = False) -> Located:
    """Find a model folder: path, hub id, or hub id@revision.

    Raises:
        UsageError: E207 an adapter or a bare file. InputError: E301. EnvironmentFault: E502, E521 to E524.
    """
    text = str(reference).strip()
    revision = None
    if not Path(text).expanduser().exists():
        if "+" in text and Path(text.partition("+")[0]).expanduser().exists():
            raise UsageError("E207", f"{printable(text)} is a model with an adapter; evaluation takes one model on disk",
                             help="fold the adapter in first: surgeon merge MODEL+ADAPTER --method passthrough -o OUT")  # fmt: skip
        if not looks_local(text.partition("@")[0]) and "@" in text:
            text, _, revision = text.partition("@")
    try:
        found = locate(text, revision, offline=offline)
    except OSError as error:
        raise EnvironmentFault("E502", f"cannot read {printable(text)}: {error.strerror or error}",
                               help="give a path that this user can read") from error  # fmt: skip
    require(found.path)
    return found


def describe(found: Located, *, dequantize: bool = False) -> Described:
    """Read headers and configuration, and digest all files that decide what a model says.

    Digests of weights are taken from the cache where they were computed before.

    Args:
        found: the folder.
        dequantize: a quantized model is to be read as plain numbers.

    Raises:
        InputError: as `surgeon.formats.dequantized.dequantized`.
    """
    stored = open_path(found.path, found.label, repo=found.repo)
    try:
        checkpoint = permitted(stored, dequantize)
        digests = InputDigester(list(checkpoint.headers)).finish()
    finally:
        stored.close()
    decoded = () if checkpoint is stored else tuple(getattr(checkpoint, "notes", ()))
    digest = hashlib.sha256(b"dequantized\n" if decoded else b"")
    for header in sorted(checkpoint.headers, key=lambda h: h.file.name):
        digest.update(f"{header.file.name} {digests[header.file]}\n".encode())
    for file in sorted(found.path.iterdir()):
        if file.suffix in {".json", ".jinja", ".model", ".tiktoken", ".txt"} and _decides(file.name):
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
    usual = max(sorted(sizes), key=lambda code: sizes[code], default="")
    names = {code: name for name, code in CODES.items()}
    # A folder of the hub cache is named by its commit, which says nothing to a reader.
    name = found.repo or found.path.resolve().name or str(found.path)
    return Described(
        name, found, sum(sizes.values()), sum(t.nbytes for t in stored.tensors.values()),
        names.get(usual, usual), digest.hexdigest(), dict(traits.text_section(checkpoint.config or {})), decoded,
    )  # fmt: skip


def _decides(name: str) -> bool:
    return not name.endswith(".index.json") and not name.startswith(("surgeon", "README", "LICENSE", "NOTICE", "USE_POLICY", "."))  # fmt: skip


def resolve_dtype(dtype: str, device: str, models: Sequence[Described], memory_limit: int | None) -> str:
    """Return the type to compute in: for ``auto`` the stored one on a GPU; on a CPU float32 if it fits.

    float32 is both faster and more exact on most CPUs. All models of a comparison get one type.
    """
    if dtype != "auto":
        return dtype
    plain = sorted({m.dtype for m in models if m.dtype in CODES}) or ["float32"]
    stored = plain[0] if len(plain) == 1 else "bfloat16"
    if device != "cpu":
        return stored
    wide = max(4 * m.parameters for m in models)
    return "float32" if wide + OVERHEAD <= (memory_limit or memory_budget()) else stored


def resolve_device(device: str) -> str:
    """Return "cpu", "cuda" (spread over all GPUs) or "cuda:N".

    Raises:
        UsageError: E228. EnvironmentFault: E513 no such device.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError("E228", f'--device is "{printable(device)}"', help="auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= count:
        raise EnvironmentFault("E513", f"{device} is not there: this machine has {count} CUDA devices",
                               help="--device auto uses what there is")  # fmt: skip
    return device


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, with its tokenizer.

    Attributes:
        encoder: `surgeon.calibrate.tokens.Encoder`.
        stop_ids: end-of-sequence tokens, of generation_config.json, else config.json, else the tokenizer.
        context: most tokens it takes; 0 = not declared.
    """

    model: Any
    encoder: Any
    stop_ids: tuple[int, ...]
    context: int
    notes: tuple[str, ...] = ()

    def prompt(self, chat: list[dict[str, str]], where: Where) -> tuple[int, ...]:
        """Return the token ids a question becomes: through the chat template where one applies.

        Raises:
            InputError: E393 the template refuses, or nothing is left to say to the model.
        """
        tokenizer = self.encoder.tokenizer
        if self.encoder.template:
            try:
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                raise InputError("E393", f"the chat template refuses the question: {reason}", where=where,
                                 help="--no-template asks without it") from error  # fmt: skip
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer("\n\n".join(m["content"] for m in chat))["input_ids"]
        if not ids:
            raise InputError("E393", "the question has no tokens", where=where, help="leave the record out")
        if self.context and len(ids) >= self.context:
            raise InputError("E393", f"the question has {len(ids):,} tokens, the model takes {self.context:,} in all", where=where,
                             help="leave it out, or evaluate a model with a longer context")  # fmt: skip
        return tuple(int(i) for i in ids)

    def opens_thinking(self, ids: Sequence[int]) -> bool:
        """Say whether a prompt ends in an open ``<think>``, as some templates write it: the reply continues it."""
        return self.encoder.tokenizer.decode(list(ids[-16:])).rstrip().endswith("<think>")

    def text(self, ids: Sequence[int]) -> str:
        """Return a reply as text, without special tokens."""
        return self.encoder.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and reports off the terminal; what matters is raised here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load(described: Described, *, device: str, dtype: str, template: bool = True, memory_limit: int | None = None) -> Loaded:  # fmt: skip
    """Load a model and its tokenizer.

    Args:
        device: as `resolve_device` returns it. "cuda" spreads the layers over all GPUs.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: E375 the tokenizer, E392 the model; E324 to E327 one whose layers differ, which is loaded by the
            packaged code. EnvironmentFault: E512, E513.
    """
    import torch

    from surgeon.calibrate.tokens import load_encoder
    from surgeon.deploy.build import load as load_strictly
    from surgeon.deploy.per_layer import is_per_layer

    path = described.path
    _check_memory(described, device, dtype, memory_limit)
    encoder = load_encoder(path, template=template)
    try:
        if is_per_layer(read_json_object(path / CONFIG_NAME)):
            model: Any = load_strictly(path, dtype=getattr(torch, dtype), device=device)
        elif described.decoded:
            model = _decoded(described, device, getattr(torch, dtype))
        else:
            with quiet_transformers():
                model = _stock(path, device, getattr(torch, dtype))
    except (MemoryError, SurgeonError):
        raise
    except torch.OutOfMemoryError:
        raise EnvironmentFault("E513", f"{described.name} does not fit into the memory of {device}",
                               help="--device cpu, or a machine with more memory") from None  # fmt: skip
    except ImportError as error:
        raise EnvironmentFault("E512", f"the model cannot be loaded here: {one_line(error)}",
                               help="install the package that the message names") from error  # fmt: skip
    except Exception as error:
        own_code = "trust_remote_code" in str(error)
        raise InputError("E392", "the model needs its own code, which is not run" if own_code else
                         f"transformers cannot load the model: {one_line(error)}", where=Where(str(path)),
                         help="surgeon verify MODEL --load says more") from error  # fmt: skip
    model.eval()
    config = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    notes = [f"{described.name}: generation_config.json sets repetition_penalty; it is not applied"] if _penalised(path) else []  # fmt: skip
    return Loaded(model, encoder, stop_ids(path, encoder.tokenizer), limit if isinstance(limit, int) and limit > 0 else 0, tuple(notes))  # fmt: skip


def _stock(path: Path, device: str, dtype: Any) -> Any:
    """Load a model with a class of the library, strictly."""
    import transformers

    placed: dict[str, Any] = {}
    if device != "cpu":
        placed = {"device_map": "auto" if device == "cuda" else {"": device}}
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, local_files_only=True, **placed
    )  # fmt: skip
    model, info = loaded
    check_complete(info, path)
    return model


def _decoded(described: Described, device: str, dtype: Any) -> Any:
    """Load the plain numbers a quantized model stands for into a class of the library, strictly."""
    from surgeon.calibrate.pieces import read_tensor
    from surgeon.deploy.build import classes

    view = open_stored(described)
    try:
        assert view.config is not None
        tensors = {
            name: read_tensor(view, name, 0, info.elements, dtype).reshape(info.shape)
            for name, info in view.tensors.items()
        }
        parsed, kind = classes(view.config)
    finally:
        view.close()
    placed: dict[str, Any] = {}
    if device != "cpu":
        placed = {"device_map": "auto" if device == "cuda" else {"": device}}
    with quiet_transformers():
        model, info = kind.from_pretrained(
            None, config=parsed, state_dict=tensors, dtype=dtype, output_loading_info=True, **placed
        )
    check_complete(info, described.path)
    return model


def refuse_encoder(described: Described) -> None:
    """Refuse a model that fills masks (E392): transformers would give it a causal head and let it speak nonsense."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = described.text.get("model_type")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not described.text.get("is_decoder"):
        raise InputError("E392", f"{described.name} is an encoder ({kind}): it sees the whole text and predicts no next token",
                         where=Where(str(described.path)),
                         help="questions and --perplexity need a decoder; --kl compares predictions of two encoders")  # fmt: skip


def check_complete(info: dict[str, Any], path: Path) -> None:
    """Refuse a model whose loading left anything out or made anything up (E392)."""
    findings = []
    for kind in _KINDS:
        shown = sorted(str(f) for f in info.get(kind) or ())
        if shown:
            words = kind.replace("_keys", " tensors").replace("_", " ").replace("msgs", "messages")
            more = ", ..." if len(shown) > 3 else ""
            findings.append(f"{len(shown)} {words}: {printable(', '.join(shown[:3]))}{more}")
    if findings:
        raise InputError("E392", f"the model does not load as it is: {'; '.join(findings)}", where=Where(str(path)),
                         help="transformers would fill what is missing with random numbers; surgeon verify MODEL --load says more")  # fmt: skip


def _check_memory(described: Described, device: str, dtype: str, memory_limit: int | None) -> None:
    if device != "cpu":
        return
    width = 4 if dtype == "float32" else 2
    # Decoded tensors are handed over as a whole.
    needed = described.parameters * width * (2 if described.decoded else 1) + OVERHEAD
    budget = memory_limit or memory_budget()
    if needed > budget:
        raise EnvironmentFault("E513", f"{described.name} needs about {needed / 1e9:.1f} GB of memory in {dtype}, {budget / 1e9:.1f} GB are available",
                               help=("--dtype bfloat16 halves the weights; " if dtype == "float32" else "") + "--perplexity and --kl read one layer at a time")  # fmt: skip


def stop_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the end-of-sequence tokens."""
    generation = read_generation_config(path) or {}
    found = token_ids(generation, "eos_token_id", file="generation_config.json")
    if not found:
        config = json.loads((path / CONFIG_NAME).read_bytes())
        found = token_ids(config, "eos_token_id", file=CONFIG_NAME)
    if not found and tokenizer.eos_token_id is not None:
        found = (int(tokenizer.eos_token_id),)
    return tuple(sorted(set(found)))


def _penalised(path: Path) -> bool:
    return (read_generation_config(path) or {}).get("repetition_penalty", 1.0) not in (1, 1.0, None)


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {' '.join(lines)}"[:300])


def open_stored(described: Described) -> StoredCheckpoint | ExpandedView | DequantizedView:
    """Open the weights for streamed passes; a model whose layers differ is seen at the sizes of its source.

    Raises:
        InputError: E311 a quantized model that is not to be dequantized.
    """
    from surgeon.deploy.expanded import ExpandedView
    from surgeon.deploy.per_layer import is_per_layer

    found = open_path(described.path, described.located.label, repo=described.located.repo)
    if described.decoded:
        return dequantized(found)
    if traits.quantized(found):
        raise plain_needed(found, "--perplexity and --kl read plain weights, layer by layer")
    return ExpandedView(found) if is_per_layer(found.config or {}) else found
