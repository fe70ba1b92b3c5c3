"""From what the user wrote to a local path: folders, files, hub ids through the local cache.

A reference is local if it exists or looks like a path; a missing local path is never sent to
the hub. Hub ids are looked up in the local cache first; only then, and only when not offline,
is the hub asked.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import EnvironmentFault, InputError, UsageError, close_matches

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
    "*.tiktoken",
    "*/config.json",
]


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Attributes:
        path: folder or file.
        label: how the user wrote it.
        repo: hub id or None.
        commit: resolved commit of a hub model, or None.
    """

    path: Path
    label: str
    repo: str | None = None
    commit: str | None = None


def looks_local(text: str) -> bool:
    """Return True when a reference must be a path on this machine."""
    return (
        text.startswith((".", "/", "~"))
        or text.endswith((".safetensors", ".bin", ".pt", ".gguf"))
        or os.path.exists(text)
        or not _HUB_ID.match(text)
    )


def locate(
    path: str, revision: str | None = None, subfolder: str | None = None, *, offline: bool = False
) -> Located:
    """Find a model on this machine, downloading it when it is a hub id that is not cached.

    Raises:
        InputError: E301 the local path does not exist.
        EnvironmentFault: E521 offline and not cached, E522 not found on the hub, E523 gated,
            E524 the hub cannot be reached.
    """
    label = path + (f"@{revision}" if revision else "")
    if not path:
        raise UsageError("E204", "an empty model reference", help="give a path, or a hub id such as org/name")
    if looks_local(path):
        local = Path(os.path.expanduser(path))
        if not local.exists() and not local.is_symlink():
            raise _missing(path, local)
        if revision:
            raise UsageError(
                "E204",
                f"{path} is local; a revision ({revision}) only makes sense for a hub model",
                help=f"leave out @{revision}",
            )
        if subfolder:
            local = local / subfolder
        return Located(local, label)
    return _hub(
        path,
        revision,
        subfolder,
        label,
        offline or os.environ.get("HF_HUB_OFFLINE", "") in {"1", "ON", "YES", "TRUE", "true"},
    )


def _missing(path: str, local: Path) -> InputError:
    parent = local.parent
    near = close_matches(local.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else None
    return InputError(
        "E301",
        f"no such model: {path}",
        help=near or "give a folder, a .safetensors file, or a hub id such as org/name",
    )


def _hub(repo: str, revision: str | None, subfolder: str | None, label: str, offline: bool) -> Located:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    get = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    patterns = [f"{subfolder}/{p}" for p in _WANTED] if subfolder else _WANTED

    def fetch(local_only: bool) -> str:
        return snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=local_only
        )

    try:
        folder = fetch(True)
    except hub.LocalEntryNotFoundError:
        if offline:
            raise EnvironmentFault(
                "E521",
                f"{label} is not in the local hub cache and the network is off",
                help=f"run once online: {get}",
            ) from None
        try:
            folder = fetch(False)
        except hub.GatedRepoError:
            raise EnvironmentFault(
                "E523",
                f"{label} is gated: the hub wants you to accept its terms",
                help=f"accept them at https://huggingface.co/{repo}, then: hf auth login",
            ) from None
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
            raise EnvironmentFault(
                "E522",
                f"{label} was not found on the hub (or it is private)",
                help="check the spelling; for a local folder start with ./",
            ) from None
        except Exception as error:
            raise EnvironmentFault(
                "E524",
                f"the hub cannot be reached for {label}: {type(error).__name__}",
                help=f"try again later, or fetch it elsewhere: {get}",
            ) from error
    except hub.HFValidationError as error:
        raise UsageError("E204", f"{label} is neither a local path nor a hub id: {error}",
                         help="./PATH, or a hub id such as org/name") from None  # fmt: skip
    path = Path(folder)
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else None
    return Located(path / subfolder if subfolder else path, label, repo, commit)
