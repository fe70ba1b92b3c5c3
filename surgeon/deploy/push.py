"""From a verified folder to a repository of the hub: checked here first, uploaded as one commit, last.

Only what the folder's SHA256SUMS lists is uploaded. Weight files of an earlier model that the new one does not
have are removed in the same commit, so that nobody ever loads a mixture of the two. The token is huggingface_hub's own: it is
never read here, and nothing the hub answers is repeated but its status.

Codes: E2031 not a repository, E2032 not a folder, E2033 values of options; E5001 offline, E5002 not allowed, E5003 the
upload failed; see `surgeon.deploy.hub_card` for the card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_bytes
from surgeon.deploy.hub_card import amended, check_card, is_licence
from surgeon.errors import EnvironmentFault, InputError, UsageError, Where, raise_all
from surgeon.output.manifest import CHECKSUMS
from surgeon.output.modelcard import looks_like_hub_id
from surgeon.verify.static import verify_path

_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)|(model|pytorch_model)\.(safetensors|bin)\.index\.json"
)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_OFF = {"1", "ON", "YES", "TRUE", "true"}


@dataclass
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        files: path in the repository -> bytes.
        left_out: files of the folder that no record lists.
        removed: weight files of an earlier model that went.
        url, commit: of the upload; None in a dry run.
    """

    repo: str
    revision: str
    private: bool
    card: dict[str, Any]
    files: dict[str, int]
    changed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: Sequence[str] = (),
    licence: str | None = None,
    dry_run: bool = False,
    offline: bool = False,
    say: Callable[[str], None] | None = None,
) -> Pushed:
    """Verify a model folder, check its card, and upload it to the hub.

    Args:
        repo: org/name; made when it is not there.
        private: make it private, where it is made; also lets a card without a licence pass.
        revision: branch to push to, made when it is not there; default ``main``.
        base_model: hub ids for the card, in place of what it says.
        licence: licence id for the card, in place of what it says.
        dry_run: check everything, upload nothing, ask the network nothing.
        say: receives sentences about what happens.

    Raises:
        UsageError: E2031 to E2033, an argument is wrong.
        InputError: the folder does not verify, or E3031 to E3034, its card is not fit for the hub.
        EnvironmentFault: E5001 offline, E5002 no or not enough rights, E5003 the upload failed.
    """
    place = _folder(folder)
    _check_arguments(repo, revision, base_model, licence)
    if say is not None:
        say(f"verifying {printable(str(folder))}")
    report = verify_path(place)
    raise_all(report.errors)
    card, errors, warnings = check_card(place, repo, private=private, base_models=base_model, licence=licence)
    raise_all(errors)
    names, left_out = _listed(place)
    changed = amended(place, card)
    sizes = {name: len(changed[name]) if name in changed else (place / name).stat().st_size for name in names}
    found = Pushed(
        repo, revision or "main", private, card, sizes, tuple(changed), left_out, warnings=[*_warned(report), *warnings]
    )  # fmt: skip
    if dry_run:
        return found
    _online(offline, folder, repo, private, revision, base_model, licence)
    _upload(found, place, changed)
    return found


def _folder(folder: str | Path) -> Path:
    place = Path(folder).expanduser()
    if place.is_dir():
        return place.absolute()
    if place.exists():
        raise UsageError(
            "E2032", f"{printable(str(folder))} is a file; push takes a model folder", help="hf upload takes single files"
        )  # fmt: skip
    raise UsageError(
        "E2032",
        f"there is no folder {printable(str(folder))}",
        help="give the folder a surgeon command wrote",
    )


def _check_arguments(
    repo: str, revision: str | None, base_models: Sequence[str], licence: str | None
) -> None:
    if not looks_like_hub_id(repo):
        raise UsageError(
            "E2031", f'"{printable(repo)[:100]}" is no repository of the hub', help="--repo org/name"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageError("E2033", f'--revision is "{printable(revision)[:100]}"', help="the name of a branch, such as main or w4a16")  # fmt: skip
    for name in base_models:
        if not looks_like_hub_id(name):
            raise UsageError("E2033", f'--base-model is "{printable(name)[:100]}"', help="a hub id: org/name")
    if licence is not None and not is_licence(licence):
        raise UsageError("E2033", f'--licence is "{printable(licence)[:100]}"', help="an id as the hub has it: apache-2.0, mit, llama3.1, other")  # fmt: skip


def _warned(report: Any) -> list[str]:
    """Return the report's warnings but those about files that are left out anyway."""
    return [text for text in report.warnings if not text.endswith(f"is not listed in {CHECKSUMS}")]


def _listed(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the files to upload, and those that are left out because nothing vouches for them."""
    present = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return present, ()
    listed = {line[66:] for line in read_bytes(sums).decode().splitlines()} | {CHECKSUMS}
    missing = sorted(listed - set(present))
    if missing:
        raise InputError("E353", f"{printable(missing[0])} is listed in {CHECKSUMS} and missing", where=Where(str(folder)),
                         help="restore the file from a copy, or make the model again; surgeon verify shows all that differs")  # fmt: skip
    return [name for name in present if name in listed], tuple(n for n in present if n not in listed)


def _online(
    offline: bool, folder: str | Path, repo: str, private: bool, revision: str | None, base_models: Sequence[str], licence: str | None
) -> None:  # fmt: skip
    if not offline and os.environ.get("HF_HUB_OFFLINE", "") not in _OFF:
        return
    import shlex

    words = ["surgeon", "push", str(folder), "--repo", repo, *(["--private"] if private else [])]
    words += ["--revision", revision] if revision else []
    words += [word for name in base_models for word in ("--base-model", name)]
    words += ["--licence", licence] if licence else []
    raise EnvironmentFault("E5001", f"{printable(str(folder))} is ready for {repo}, and the network is off",
                           help=f"run it where the hub can be reached: {shlex.join(words)}")  # fmt: skip


def _upload(found: Pushed, folder: Path, changed: dict[str, bytes]) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub import errors as hub

    api = HfApi(library_name="surgeon", library_version=__version__)
    try:
        api.create_repo(found.repo, private=found.private, exist_ok=True)
        if found.revision != "main":
            api.create_branch(found.repo, branch=found.revision, exist_ok=True)
        there = api.list_repo_files(found.repo, revision=found.revision)
        found.removed = tuple(
            sorted(name for name in there if _WEIGHTS.fullmatch(name) and name not in found.files)
        )
        operations = [
            *(CommitOperationAdd(name, changed[name] if name in changed else str(folder / name)) for name in found.files),
            *(CommitOperationDelete(name) for name in found.removed),
        ]  # fmt: skip
        commit = api.create_commit(
            found.repo, operations, commit_message=f"Upload {folder.name} (surgeon {__version__})", revision=found.revision
        )  # fmt: skip
    except hub.LocalTokenNotFoundError:
        raise EnvironmentFault("E5002", f"pushing to {found.repo} needs a token, and none is stored here",
                               help="hf auth login, or set HF_TOKEN") from None  # fmt: skip
    except hub.HfHubHTTPError as error:
        raise _refused(found, error) from None
    except Exception as error:
        raise EnvironmentFault(
            "E5003",
            f"the upload to {found.repo} failed: {type(error).__name__}",
            help="run it again: what is there already is not sent twice, and nothing shows before all of it is there",
        ) from None
    found.url, found.commit = str(commit.commit_url), str(commit.oid)


def _refused(found: Pushed, error: Any) -> EnvironmentFault:
    """Return the hub's refusal by its status; its text may repeat what was sent, so it is not shown."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return EnvironmentFault(
            "E5002", f"the hub does not let this account write to {found.repo} (status {status})",
            help="hf auth login with a token that may write there; hf auth whoami shows the account",
        )  # fmt: skip
    return EnvironmentFault(
        "E5003",
        f"the hub refused the upload to {found.repo} (status {status})",
        help="try again later; nothing shows there before all of it is there",
    )
