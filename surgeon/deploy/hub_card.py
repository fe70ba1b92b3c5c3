"""The model card as the hub reads it: what its front matter must say, and one that says it.

A folder's README.md, surgeon.json and SHA256SUMS vouch for each other. Where somebody adds a licence or a base model for
the hub, all three are made anew, so that the uploaded folder verifies as the local one does.

Codes: E3031 no card, E3032 no licence, E3033 base models, E3034 tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_bytes, read_json_object
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.output.manifest import CHECKSUMS, MANIFEST, checksums, sha256
from surgeon.output.modelcard import looks_like_hub_id, read_front_matter
from surgeon.scalars import show

CARD = "README.md"
RELATIONS = ("adapter", "merge", "quantized", "finetune")
"""Values of ``base_model_relation`` that the hub knows."""

_FRONT = re.compile(r"---[ \t]*\n.*?\n---[ \t]*(?:\n|\Z)", re.S)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def is_licence(text: str) -> bool:
    """Say whether text has the form of a licence id (apache-2.0)."""
    return _LICENCE.fullmatch(text) is not None


def check_card(
    folder: Path, repo: str, *, private: bool, base_models: Sequence[str] = (), licence: str | None = None
) -> tuple[dict[str, Any], list[SurgeonError], list[str]]:
    """Check a card for the hub.

    Args:
        private: the repository is; a licence may be missing then.
        base_models: hub ids that take the place of the card's.
        licence: takes the place of the card's.

    Returns:
        The front matter as it will be uploaded, what is wrong with it, and what should be better.
    """
    path = folder / CARD
    where = Where(str(path))
    text = read_bytes(path, 4_000_000).decode("utf-8", "replace") if path.is_file() else ""
    card = read_front_matter(text)
    if not card:
        what = "its README.md has no front matter that can be read" if text else "it has no model card"
        help = "every folder that surgeon writes has one; write one that begins with ---, license: and base_model:"
        return (
            {},
            [
                InputError(
                    "E3031", f"{printable(folder.name)} cannot be pushed: {what}", where=where, help=help
                )
            ],
            [],
        )
    if licence:
        card = {
            "license": licence,
            **{k: v for k, v in card.items() if k not in ("license", "license_name", "license_link")},
        }
    if base_models:
        card = {**card, "base_model": list(base_models)}
        card.setdefault("base_model_relation", _relation(folder))
    errors: list[SurgeonError] = []
    warnings: list[str] = []
    if not card.get("license"):
        if private:
            warnings.append("the card states no licence: name one before the repository is made public")
        else:
            errors.append(InputError("E3032", "the card states no licence, and the repository is public", where=where,
                                     help="--licence apache-2.0, or what the models it was made from ask for; or --private"))  # fmt: skip
    errors.extend(_base_models(card, repo, where, warnings))
    tags = card.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        errors.append(
            InputError(
                "E3034", f"tags of the card are {show(tags)}", where=where, help="tags: [surgeon, merge]"
            )
        )
    elif "surgeon" not in (tags or ()):
        warnings.append('the card has no tag "surgeon": it was written by another program, or changed')
    return card, errors, warnings


def _relation(folder: Path) -> str:
    """Return how a model relates to what it was made from, by the verb in its manifest."""
    path = folder / MANIFEST
    verb = read_json_object(path).get("verb") if path.is_file() else None
    return {"merge": "merge", "quantize": "quantized"}.get(str(verb), "finetune")


def _base_models(card: dict[str, Any], repo: str, where: Where, warnings: list[str]) -> list[SurgeonError]:
    given, relation = card.get("base_model"), card.get("base_model_relation")
    named = given if isinstance(given, list) else [given] if given else []
    errors: list[SurgeonError] = []
    for name in named:
        if not looks_like_hub_id(name):
            errors.append(InputError("E3033", f"base_model names {show(name)}, which is no hub id", where=where,
                                     help="--base-model org/name, once for each model"))  # fmt: skip
        elif name == repo:
            errors.append(InputError("E3033", f"base_model names the repository itself: {repo}", where=where,
                                     help="--base-model org/name of the model this one was made from, or another --repo"))  # fmt: skip
    if relation is not None and relation not in RELATIONS:
        errors.append(InputError("E3033", f"base_model_relation is {show(relation)}", where=where,
                                 help=f"one of: {', '.join(RELATIONS)}"))  # fmt: skip
    if not named:
        warnings.append(
            "the card names no base model, so the hub shows no model tree: --base-model org/name adds it"
        )
    elif relation is None:
        warnings.append("the card has no base_model_relation: the hub guesses one")
    return errors


def amended(folder: Path, card: dict[str, Any]) -> dict[str, bytes]:
    """Return the files that change when the card's front matter becomes ``card``; {} when it already is.

    Besides README.md these are the records of its digest.
    """
    import yaml

    text = read_bytes(folder / CARD, 4_000_000).decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    if read_front_matter(text) == card:
        return {}
    front = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
    readme = f"---\n{front}---\n{_FRONT.sub('', text, count=1)}".encode()
    files = {CARD: readme}
    if (folder / MANIFEST).is_file():
        manifest = json.loads(read_bytes(folder / MANIFEST))
        manifest["files"][CARD] = sha256(readme)
        files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    if (folder / CHECKSUMS).is_file():
        lines = read_bytes(folder / CHECKSUMS).decode().splitlines()
        digests = {line[66:]: line[:64] for line in lines}
        digests |= {name: sha256(content) for name, content in files.items() if name in digests}
        files[CHECKSUMS] = checksums(digests)
    return files
