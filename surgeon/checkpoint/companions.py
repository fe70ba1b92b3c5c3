"""The files of a model folder that are not weights: which of them a new model carries over.

What is left out is listed; everything else survives, because a folder may hold files this
program has never heard of (``modules.json`` and ``1_Pooling/`` of embedding models, processor
settings, code of custom architectures). Left out are weights in any format, what training
left behind, caches, hidden files, and what belongs to the source alone (its model card,
checksums, manifest). Nothing here is executed, rendered or unpickled.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import open_regular, printable
from surgeon.checkpoint.strict_json import read_bytes, read_json_object
from surgeon.errors import EnvironmentFault, InputError, Where

MAX_FILE_BYTES = 256_000_000
MAX_TOTAL_BYTES = 1_000_000_000
MAX_FILES = 2_000
MAX_DEPTH = 4
MAX_TEMPLATE_BYTES = 2_000_000

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("tiktoken.model", "qwen.tiktoken"),
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER = "additional_chat_templates"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
GENERATION_FILE = "generation_config.json"

_NOT_VOCABULARY = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}
_REWRITTEN = {"config.json"}
_OWN_TO_SOURCE = {"surgeon.json", "sha256sums", "mergekit_config.yml", "recipe.yaml", "plan.json"}
_STALE = {"quantize_config.json", "quant_config.json", "hf_quant_config.json", "adapter_config.json"}
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state|training_state|"
    r"train_results|all_results|eval_results|latest_checkpoint|events\.out\.tfevents|nohup\.out)",
    re.I,
)
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|pt2|pte|ckpt|gguf|ggml|onnx|onnx_data|onnx\.data|h5|hdf5|msgpack|tflite|ot|npz|"
    r"npy|mlmodel|engine|plan|nemo|llamafile|distcp|index|index\.json)"
)
_PICKLES = re.compile(r".*\.(pkl|pickle|joblib|dill|cloudpickle)")
_BINARIES = re.compile(r".*\.(zip|tar|gz|tgz|xz|bz2|7z|zst|whl|egg|so|dll|dylib|exe|pyc)")
_LEFTOVERS = re.compile(r".*(\.(lock|incomplete|tmp|part|partial|swp|bak|orig|log)|~)")
_MEDIA = re.compile(r".*\.(png|jpe?g|gif|svg|webp|mp[34]|mov|pdf|wav)")
_FOLDERS = re.compile(
    r"(onnx|openvino|gguf|coreml|mlx|flax|tflite|original|__pycache__|wandb|runs|logs?|tensorboard|"
    r"checkpoint-\d+|global_step\d+|.*\.mlpackage|eval_results|assets|figures|images)",
    re.I,
)
_LICENCE = re.compile(r"(licen[cs]e|notice|use[_-]?policy|copying|copyright|third[_-]party)", re.I)


@dataclass(frozen=True)
class Companion:
    """One file to carry over.

    Attributes:
        name: path inside the output folder, with forward slashes.
        source: where its content is read from.
        size: bytes when it was listed.
        kind: "tokenizer", "chat-template", "generation", "processor", "licence", "code",
            "module" (weights of a listed sub-module) or "other".
    """

    name: str
    source: Path
    size: int
    kind: str


@dataclass(frozen=True)
class Companions:
    """What a folder hands on: files to copy, names left out with the reason, expected ones it lacks."""

    folder: Path
    files: tuple[Companion, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()

    def of_kind(self, *kinds: str) -> tuple[Companion, ...]:
        """Return the files of these kinds, sorted by name."""
        return tuple(c for c in self.files if c.kind in kinds)


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a folder, as text.

    Attributes:
        default: the template a loader would use, or None.
        named: further templates by name ("tool_use", ...).
        found_in: the files that hold a default template, the one that wins first.
        agree: False when two of those files hold different text.
    """

    default: str | None
    named: dict[str, str] = field(default_factory=dict)
    found_in: tuple[str, ...] = ()
    agree: bool = True


def companion_kind(name: str) -> str:
    """Return the kind of a carried-over file from its path inside the folder."""
    if name in TOKENIZER_FILES:
        return "tokenizer"
    if name in TEMPLATE_FILES or name.startswith(TEMPLATE_FOLDER + "/"):
        return "chat-template"
    if name == GENERATION_FILE:
        return "generation"
    if name in PROCESSOR_FILES:
        return "processor"
    if is_licence_file(name):
        return "licence"
    return "code" if name.endswith(".py") else "other"


def is_licence_file(name: str) -> bool:
    """Tell whether a file name looks like a licence, notice or use policy."""
    return "/" not in name and _LICENCE.match(name) is not None and not name.endswith(".py")


def reason_left_out(name: str) -> str | None:
    """Return why the file at this path inside a model folder is not carried over, or None when it is."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    for part in parts[:-1]:
        if _FOLDERS.fullmatch(part):
            return f"in {part}/, which is not part of the model"
    leaf = parts[-1].lower()
    if len(parts) == 1 and leaf in _REWRITTEN:
        return "written anew"
    if leaf in _OWN_TO_SOURCE or leaf.startswith(("readme", "model_card")):
        return "describes the source"
    if leaf in _STALE:
        return "describes another form of the weights"
    if _TRAINING.match(leaf):
        return "left over from training"
    if _PICKLES.fullmatch(leaf):
        return "pickle"
    if _WEIGHTS.fullmatch(leaf):
        return "weights"
    if _BINARIES.fullmatch(leaf):
        return "archive or binary"
    if _LEFTOVERS.fullmatch(leaf):
        return "temporary"
    if _MEDIA.fullmatch(leaf):
        return "media"
    return None


def find_companions(
    folder: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    max_total_bytes: int = MAX_TOTAL_BYTES,
    max_files: int = MAX_FILES,
) -> Companions:
    """List what a model folder hands on to a model made from it.

    Raises:
        InputError: E336 a link leaves the folder and its hub cache entry; E338 a file, their
            sum or their number is too large to be companions of a model.
        EnvironmentFault: E502 not readable.
    """
    folder = Path(folder)
    roots = allowed_roots(folder)
    modules = _module_folders(folder)
    files: list[Companion] = []
    left_out: list[tuple[str, str]] = []
    for name, path in _walk(folder, "", 0, roots, left_out):
        parent = name.rpartition("/")[0]
        reason = reason_left_out(name)
        kind = companion_kind(name)
        if reason == "weights" and parent in modules and name.endswith(".safetensors"):
            reason, kind = None, "module"
        if reason is not None:
            left_out.append((name, reason))
            continue
        check_link(path, roots)
        if not path.exists():
            raise InputError(
                "E301",
                f"{printable(name)} is a link to a file that does not exist",
                where=Where(str(path)),
                help="fetch the model again; its cache entry is incomplete",
            )
        if not path.is_file():
            left_out.append((name, "not a regular file"))
            continue
        size = path.stat().st_size
        if size > max_file_bytes:
            if kind == "other":
                left_out.append((name, f"larger than {max_file_bytes:,} bytes"))
                continue
            raise _too_large(
                path, f"{printable(name)} has {size:,} bytes; at most {max_file_bytes:,} are copied"
            )
        files.append(Companion(name, path, size, kind))
    total = sum(c.size for c in files)
    if total > max_total_bytes or len(files) > max_files:
        raise _too_large(
            folder,
            f"{folder} holds {len(files):,} files of {total:,} bytes beside its weights; that is no model folder",
        )
    files.sort(key=lambda c: c.name)
    return Companions(
        folder, tuple(files), tuple(sorted(left_out)), missing_companions({c.name for c in files}, folder)
    )


def missing_companions(names: Iterable[str], folder: Path | None = None) -> tuple[str, ...]:
    """Return what a text-generating model is expected to have but these names lack (fault E8)."""
    names = set(names)
    missing = []
    if not names & set(TOKENIZER_FILES) - _NOT_VOCABULARY:
        missing.append("tokenizer")
    if "tokenizer_config.json" not in names:
        missing.append("tokenizer_config.json")
    if GENERATION_FILE not in names:
        missing.append(GENERATION_FILE)
    if not names & set(TEMPLATE_FILES):
        config = read_optional_object(folder / "tokenizer_config.json") if folder is not None else None
        if not (config or {}).get("chat_template"):
            missing.append("chat template")
    if not any(is_licence_file(name) for name in names):
        missing.append("LICENSE")
    return tuple(missing)


def allowed_roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders a link inside ``folder`` may lead to: itself and its hub cache entry."""
    real = Path(os.path.realpath(folder))
    roots = [real]
    for at in (Path(os.path.abspath(folder)), real):
        for parent in at.parents:
            if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
                roots.append(Path(os.path.realpath(parent.parent)))
    return tuple(dict.fromkeys(roots))


def check_link(path: Path, roots: Sequence[Path]) -> None:
    """Refuse a path whose target lies outside ``roots`` (E336, fault C2)."""
    target = Path(os.path.realpath(path))
    if not any(target == root or root in target.parents for root in roots):
        raise InputError(
            "E336",
            f"{printable(path.name)} is a link that leaves the model folder",
            where=Where(str(path)),
            help="replace the link by a copy of the file; only links into the hub cache are followed",
        )


def copy_companion(companion: Companion, destination: Path) -> str:
    """Copy one file by content to a path that must not exist; return its SHA-256 as hex.

    Links are read through and never recreated; the copy is a plain file with mode 0644.

    Raises:
        InputError: E334 when the file changed size since it was listed.
        EnvironmentFault: E503 when the destination exists.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    source = open_regular(companion.source)
    try:
        flags = (
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        )
        try:
            target = os.open(destination, flags, 0o644)
        except FileExistsError as error:
            raise EnvironmentFault(
                "E503", f"{destination} exists already", help="choose another -o"
            ) from error
        with os.fdopen(target, "wb") as out:
            done = 0
            while piece := os.read(source, 1 << 20):
                done += len(piece)
                if done > companion.size:
                    break
                out.write(piece)
                digest.update(piece)
        if done != companion.size:
            raise InputError(
                "E334",
                f"{printable(companion.name)} changed while it was in use",
                where=Where(str(companion.source)),
                help="something is rewriting the model; run again when it is complete",
            )
        os.chmod(destination, 0o644)
    finally:
        os.close(source)
    return digest.hexdigest()


def licence_files(sources: Sequence[tuple[str, Path]]) -> tuple[Companion, ...]:
    """Return the licences and notices of all sources, each content once, under names that do not collide.

    Args:
        sources: (short name, folder), the donor of the other companions first. Its files keep
            their names; a different file of a later source becomes ``LICENSE.<short name>``.

    Raises:
        InputError: as `find_companions`, for links (E336).
    """
    taken: dict[str, Companion] = {}
    seen: set[tuple[str, str]] = set()
    for label, folder in sources:
        roots = allowed_roots(folder)
        for path in sorted(Path(folder).iterdir()):
            if not is_licence_file(path.name) or not path.is_file() or reason_left_out(path.name):
                continue
            check_link(path, roots)
            content = read_bytes(path, MAX_TEMPLATE_BYTES)
            key = (path.name.split(".")[0].lower(), hashlib.sha256(content).hexdigest())
            if key in seen:
                continue
            seen.add(key)
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip(".-") or "model"
            name, number = path.name, 1
            while name.lower() in taken:
                number += 1
                name = f"{path.name}.{slug}" if number == 2 else f"{path.name}.{slug}-{number - 1}"
            taken[name.lower()] = Companion(name, path, len(content), "licence")
    return tuple(sorted(taken.values(), key=lambda c: c.name))


def read_optional_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that may be absent; refuse links that leave the folder and broken JSON."""
    if not path.exists():
        return None
    check_link(path, allowed_roots(path.parent))
    return read_json_object(path)


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """Return generation_config.json of a folder, or None.

    Raises:
        InputError: E308 not a JSON object.
    """
    return read_optional_object(Path(folder) / GENERATION_FILE)


def token_ids(document: dict[str, Any], key: str, *, file: str) -> tuple[int, ...]:
    """Return the ids under ``key`` (absent, null, one integer or a list) as a tuple.

    Raises:
        InputError: E337 when the value is anything else.
    """
    value = document.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise InputError(
            "E337",
            f"{key} in {file} is {printable(repr(value))[:80]}, not a token id",
            where=Where(file),
            help="token ids are whole numbers from 0 up",
        )
    return tuple(values)


def check_token_ids(document: dict[str, Any], rows: int, *, file: str) -> None:
    """Refuse bos, eos or pad ids that have no row in an embedding of ``rows`` rows (fault E8).

    -1 stands for "none" in some published configs and is accepted for pad_token_id only.

    Raises:
        InputError: E337 naming the key, the id and the number of rows.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for number in token_ids(document, key, file=file):
            if number == -1 and key == "pad_token_id":
                continue
            if not 0 <= number < rows:
                raise InputError(
                    "E337",
                    f"{key} {number} in {file} is outside the vocabulary of {rows:,} rows",
                    where=Where(file),
                    help="generation would never stop or fail; correct the id, or take the tokenizer's model "
                    "as donor with --tokenizer",
                )


def read_chat_templates(folder: Path) -> ChatTemplates:
    """Return a folder's chat templates from every place loaders know, as text and unrendered.

    A loader takes chat_template.jinja before tokenizer_config.json before chat_template.json;
    ``agree`` says whether those present hold the same text.

    Raises:
        InputError: E308 broken JSON, text that is not UTF-8 or above the size limit.
    """
    folder = Path(folder)
    found: list[tuple[str, str]] = []
    named: dict[str, str] = {}
    file = folder / "chat_template.jinja"
    if file.exists():
        found.append((file.name, _template_text(file)))
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = (read_optional_object(folder / name) or {}).get("chat_template")
        if isinstance(value, str) and value:
            found.append((name, value))
        elif isinstance(value, dict):
            value = [{"name": k, "template": v} for k, v in value.items()]
        if isinstance(value, list):
            for entry in value:
                if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
                    continue
                if entry.get("name") == "default":
                    found.append((name, entry["template"]))
                elif isinstance(entry.get("name"), str):
                    named.setdefault(entry["name"], entry["template"])
    more = folder / TEMPLATE_FOLDER
    if more.is_dir():
        check_link(more, allowed_roots(folder))
        for path in sorted(more.glob("*.jinja")):
            named[path.stem] = _template_text(path, allowed_roots(folder))
    if not found:
        return ChatTemplates(None, named)
    return ChatTemplates(
        found[0][1],
        named,
        tuple(name for name, _ in found),
        all(t.strip() == found[0][1].strip() for _, t in found),
    )


def _template_text(path: Path, roots: Sequence[Path] | None = None) -> str:
    check_link(path, roots or allowed_roots(path.parent))
    try:
        return read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "E308",
            f"{printable(path.name)} is not UTF-8 (byte {error.start})",
            where=Where(str(path)),
            help="the file is damaged; fetch it again",
        ) from None


def _walk(folder: Path, prefix: str, depth: int, roots: Sequence[Path], left_out: list[tuple[str, str]]):
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda e: e.name)
    except PermissionError as error:
        raise EnvironmentFault(
            "E502", f"cannot read {folder}: permission denied", help="ls -ld shows its owner and mode"
        ) from error
    for entry in entries:
        name = prefix + entry.name
        path = Path(entry.path)
        if not entry.is_dir(follow_symlinks=True):
            yield name, path
            continue
        reason = reason_left_out(name + "/x")
        if reason is None and depth + 1 >= MAX_DEPTH:
            reason = "nested too deep"
        if (
            reason is None
            and (path / "config.json").exists()
            and _has_weights(path)
            and name not in _module_folders(folder)
        ):
            reason = "another model"
        if reason is not None:
            left_out.append((name + "/", reason))
            continue
        check_link(path, roots)
        yield from _walk(path, name + "/", depth + 1, roots, left_out)


def _has_weights(folder: Path) -> bool:
    return any(name.endswith((".safetensors", ".bin", ".gguf")) for name in os.listdir(folder))


def _module_folders(folder: Path) -> frozenset[str]:
    """Sub-folders that modules.json lists: stages of an embedding model, some with weights of their own."""
    path = folder / "modules.json"
    if not path.is_file():
        return frozenset()
    import json

    try:
        listed = json.loads(read_bytes(path, 1_000_000))
    except ValueError:
        return frozenset()
    if not isinstance(listed, list):
        return frozenset()
    paths = (entry.get("path") for entry in listed if isinstance(entry, dict))
    return frozenset(p for p in paths if isinstance(p, str) and p and "/" not in p and not p.startswith("."))


def _too_large(path: Path, message: str) -> InputError:
    return InputError(
        "E338", message, where=Where(str(path)), help="remove from the folder what is not part of the model"
    )
