"""Faults C2, G8, H6: hub ids through the local cache, offline, with what is missing named."""

from __future__ import annotations

from pathlib import Path

import forge
import kit
import pytest

from surgeon.checkpoint.digests import known_digest
from surgeon.checkpoint.source import locate, looks_local
from surgeon.errors import EnvironmentFault, SurgeonError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A hub cache with one sharded model, as the hub library lays it out."""
    import hashlib

    import huggingface_hub.constants as constants

    root = tmp_path / "hub"
    entry = root / "models--org--tiny"
    made = forge.model_folder(tmp_path / "made", 1, shards=2)
    (made / "model.safetensors").unlink(missing_ok=True)
    snapshot = entry / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for file in made.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(entry / "blobs" / name)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / name)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    return root


def test_G8_a_cached_model_is_found_and_its_commit_recorded(cache):
    found = locate("org/tiny")
    assert found.path == cache / "models--org--tiny" / "snapshots" / COMMIT
    assert (found.repo, found.commit) == ("org/tiny", COMMIT)
    assert locate("org/tiny", revision=COMMIT).path == found.path
    assert locate("org/tiny", revision="main").commit == COMMIT


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_C2_a_merge_from_the_cache_records_commits_and_reuses_digests(cache, scratch, revision):
    import json

    import checker

    from surgeon.execute import execute

    short = forge.model_folder(scratch / "short", 2)
    reference = "org/tiny" + (f"@{revision}" if revision else "")
    plan = kit.plan([reference, short])
    header = next(iter(plan.inputs.values())).headers[0]
    assert known_digest(header) == header.file.resolve().name
    before = kit.snapshot([cache])
    execute(plan, scratch / "out", threads=1)
    checker.check(scratch / "out", (str(cache),))
    assert kit.snapshot([cache]) == before
    manifest = json.loads((scratch / "out" / "surgeon.json").read_text())
    assert manifest["inputs"]["org/tiny"]["commit"] == COMMIT
    assert manifest["inputs"]["org/tiny"]["files"][header.file.name]["sha256"] == header.file.resolve().name


def test_H6_a_missing_shard_names_the_command(cache, scratch):
    shard = cache / "models--org--tiny" / "snapshots" / COMMIT / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(SurgeonError) as caught:
        kit.plan(["org/tiny", forge.model_folder(scratch / "short", 2)])
    error = caught.value
    assert error.exit_code == 3 and error.code == "E302"
    assert 'hf download org/tiny --include "model-00002-of-00002.safetensors"' in error.help


def test_C2_a_dangling_cache_link_is_named(cache, scratch):
    shard = cache / "models--org--tiny" / "snapshots" / COMMIT / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    with pytest.raises(SurgeonError) as caught:
        kit.plan(["org/tiny", forge.model_folder(scratch / "short", 2)])
    assert caught.value.exit_code == 3 and "model-00002-of-00002.safetensors" in caught.value.message


def test_C2_a_shard_link_into_another_models_entry_is_refused(cache, scratch):
    shard = cache / "models--org--tiny" / "snapshots" / COMMIT / "model-00002-of-00002.safetensors"
    other = cache / "models--org--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    other.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(other)
    with pytest.raises(SurgeonError) as caught:
        kit.plan(["org/tiny", forge.model_folder(scratch / "short", 2)])
    assert caught.value.code == "E336"


@pytest.mark.parametrize(
    ("repo", "revision", "command"),
    [
        ("org/absent", None, "hf download org/absent"),
        ("org/tiny", "v2", "hf download org/tiny --revision v2"),
    ],
)
def test_H6_offline_with_nothing_cached_gives_the_command(cache, repo, revision, command):
    with pytest.raises(EnvironmentFault) as caught:
        locate(repo, revision=revision, offline=True)
    assert caught.value.code == "E521" and caught.value.exit_code == 5
    assert command in caught.value.help


class Answer:
    """Stands for the hub: not cached, then this exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *arguments, local_files_only=False, **options):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not cached") if local_files_only else self.error


def hub_errors():
    from huggingface_hub import errors

    def made(kind):
        """Make an exception without the HTTP response its constructor wants."""
        bare = type(kind.__name__, (kind,), {"__init__": lambda self, text: Exception.__init__(self, text)})
        return bare("Authorization: Bearer " + "hf_" + "secretsecret")

    return {
        "gated": (made(errors.GatedRepoError), "E523", "accept"),
        "not found": (made(errors.RepositoryNotFoundError), "E522", "spelling"),
        "no revision": (made(errors.RevisionNotFoundError), "E522", "spelling"),
        "unreachable": (made(ConnectionError), "E524", "hf download"),
        "server": (made(errors.HfHubHTTPError), "E524", "hf download"),
    }


@pytest.mark.parametrize("kind", ["gated", "not found", "no revision", "unreachable", "server"])
def test_G8_F11_hub_failures_have_messages_of_their_own_without_secrets(monkeypatch, kind):
    import huggingface_hub

    error, code, word = hub_errors()[kind]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Answer(error))
    with pytest.raises(EnvironmentFault) as caught:
        locate("org/name")
    assert caught.value.code == code and word in caught.value.help
    assert "hf_secret" not in f"{caught.value} {caught.value.help}"


@pytest.mark.parametrize(
    "text",
    ["./x", "/x", "~/x", "x.safetensors", "x", "a/b/c", "../a/b", "a/b.bin", "a//b", "", "-x", "a\nb/c"],
)
def test_F9_what_looks_like_a_path_is_a_path(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert looks_local(text)


def test_F9_an_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_local("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name").path == Path("org/name")
