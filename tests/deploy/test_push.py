"""Pushing to the hub: verified and checked here before anything is sent; one commit; the token never shows (F11)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

import surgeon
from surgeon.cli.push import push as command
from surgeon.deploy.push import push
from surgeon.errors import EnvironmentFault, InputError, UsageError
from surgeon.output.modelcard import read_front_matter
from surgeon.verify.static import verify_path

SECRET = "hf_SECRETsecretSECRETsecretSECRET"


@pytest.fixture
def merged(long_short, scratch) -> Path:
    long, short = long_short
    for folder in long_short:
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# model\n")
    return Path(surgeon.merge([long, short], method="linear", output=scratch / "merged").path)


class Hub:
    """What huggingface_hub's client would have done."""

    def __init__(self, there: tuple[str, ...] = (), refusal: Exception | None = None) -> None:
        self.there, self.refusal = there, refusal
        self.calls: list[str] = []
        self.repository: dict = {}
        self.branches: list[str] = []
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []

    def __call__(self, **_: object) -> Hub:
        return self

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append("create_repo")
        if self.refusal:
            raise self.refusal
        self.repository = {"id": repo, "private": private}

    def create_branch(self, repo, *, branch, exist_ok):
        self.branches.append(branch)

    def list_repo_files(self, repo, *, revision):
        return list(self.there)

    def create_commit(self, repo, operations, *, commit_message, revision):
        self.calls.append("create_commit")
        self.revision = revision
        for one in operations:
            if isinstance(one, huggingface_hub.CommitOperationDelete):
                self.deleted.append(one.path_in_repo)
            else:
                with one.as_file() as stream:
                    self.files[one.path_in_repo] = stream.read()
        return SimpleNamespace(commit_url="https://hub.invalid/commit/1", oid="1")


@pytest.fixture
def online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def use(fake: Hub) -> Hub:
        monkeypatch.setattr(huggingface_hub, "HfApi", fake)
        return fake

    return use


def response(status: int) -> SimpleNamespace:
    request = SimpleNamespace(headers={"authorization": f"Bearer {SECRET}"})
    return SimpleNamespace(status_code=status, headers={}, text=f"bad token {SECRET}", request=request)


def run(capsys, *words: str) -> tuple[int, str, str]:
    import typer

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    with pytest.raises(SystemExit) as end:
        app(list(words))
    shown = capsys.readouterr()
    return end.value.code, shown.out, shown.err


def test_the_folder_arrives_as_it_is_in_one_commit(merged, online):
    fake = online(
        Hub(
            there=(
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "notes.md",
                "x-Q4.gguf",
            )
        )
    )
    (merged / "scribble.txt").write_text("not part of the model")
    found = push(merged, "org/name", private=True, revision="w4")
    assert fake.repository == {"id": "org/name", "private": True}
    assert fake.branches == ["w4"] and fake.revision == "w4"
    assert fake.files == {p.name: p.read_bytes() for p in merged.iterdir() if p.name != "scribble.txt"}
    # An index left behind would make readers look for shards that are gone; other files are not ours to remove.
    assert sorted(fake.deleted) == ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert fake.calls == ["create_repo", "create_commit"]
    assert found.left_out == ("scribble.txt",) and found.commit == "1"


def test_what_is_given_for_the_card_arrives_in_a_folder_that_still_verifies(merged, online, scratch):
    fake = online(Hub())
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in merged.iterdir()}
    found = push(merged, "org/name", base_model=["org/long", "org/short"], licence="mit")
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in merged.iterdir()} == before
    arrived = scratch / "arrived"
    arrived.mkdir()
    for name, content in fake.files.items():
        (arrived / name).write_bytes(content)
    assert verify_path(arrived).errors == [] and "hashes" in verify_path(arrived).checks
    card = read_front_matter((arrived / "README.md").read_text())
    assert card["base_model"] == ["org/long", "org/short"] and card["base_model_relation"] == "merge"
    assert card["license"] == "mit" and "surgeon" in card["tags"]
    assert set(found.changed) == {"README.md", "surgeon.json", "SHA256SUMS"}
    assert (arrived / "README.md").read_text().partition("\n# ")[2] == (
        merged / "README.md"
    ).read_text().partition("\n# ")[2]


def test_a_damaged_folder_is_not_sent(merged, online):
    fake = online(Hub())
    weights = merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError) as refused:
        push(merged, "org/name")
    assert refused.value.code == "E353" and fake.calls == []


def _without_records(folder: Path, readme: str | None) -> Path:
    """Make it a folder of another program: no records that the card has to agree with."""
    for name in ("surgeon.json", "SHA256SUMS", "README.md"):
        (folder / name).unlink()
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


@pytest.mark.parametrize(
    ("readme", "code"),
    [
        (None, "E3031"),
        ("# no front matter\n", "E3031"),
        ("---\ntags: [surgeon]\n---\n", "E3032"),
        ("---\nlicense: mit\nbase_model: ./my/long\n---\n", "E3033"),
        ("---\nlicense: mit\nbase_model: org/name\n---\n", "E3033"),
        ("---\nlicense: mit\nbase_model: org/a\nbase_model_relation: child\n---\n", "E3033"),
        ("---\nlicense: mit\ntags: surgeon\n---\n", "E3034"),
    ],
)  # fmt: skip
def test_cards_the_hub_would_misread_are_refused(merged, online, readme, code):
    fake = online(Hub())
    with pytest.raises(InputError) as refused:
        push(_without_records(merged, readme), "org/name")
    assert refused.value.code == code and fake.calls == []
    assert refused.value.where is not None and str(refused.value.where.file).endswith("README.md")


def test_a_private_repository_may_lack_a_licence(merged, online):
    online(Hub())
    found = push(
        _without_records(merged, "---\nbase_model: org/a\ntags: [surgeon]\n---\n"), "org/name", private=True
    )
    assert any("no licence" in text for text in found.warnings)


def test_offline_says_the_command_to_run_later(merged, capsys):
    code, _, err = run(capsys, str(merged), "--repo", "org/name", "--private", "--base-model", "org/a")
    assert code == 5 and "E5001" in err
    assert f"surgeon push {merged} --repo org/name --private --base-model org/a" in err


def test_a_dry_run_asks_nobody(merged, monkeypatch, capsys):
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    code, text, _ = run(capsys, str(merged), "--repo", "org/name", "--dry-run", "--json")
    document = json.loads(text)
    assert code == 0 and document["status"] == "dry-run" and document["commit"] is None
    assert document["files"]["model.safetensors"] == (merged / "model.safetensors").stat().st_size
    assert fake.calls == []


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (hub.HfHubHTTPError(f"401 {SECRET}", response=response(401)), "E5002"),
        (hub.HfHubHTTPError(f"500 {SECRET}", response=response(500)), "E5003"),
        (hub.LocalTokenNotFoundError(SECRET), "E5002"),
        (ConnectionError(f"Bearer {SECRET}"), "E5003"),
    ],
)
def test_F11_the_token_never_shows(merged, online, capsys, refusal, code):
    online(Hub(refusal=refusal))
    for flags in ((), ("--json",), ("-v",)):
        exit_code, text, err = run(capsys, str(merged), "--repo", "org/name", *flags)
        assert exit_code == 5 and code in text + err
        assert SECRET not in text + err
    with pytest.raises(EnvironmentFault) as raised:
        push(merged, "org/name")
    assert raised.value.__suppress_context__ and SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "code"),
    [({"repo": "name"}, "E2031"), ({"repo": "https://hub/org/name"}, "E2031"), ({"revision": "../x"}, "E2033"),
     ({"base_model": ["./long"]}, "E2033"), ({"licence": "Apache 2"}, "E2033")],
)  # fmt: skip
def test_wrong_arguments(merged, words, code):
    with pytest.raises(UsageError) as refused:
        push(merged, **{"repo": "org/name", **words})
    assert refused.value.code == code


def test_only_folders_are_pushed(merged):
    for place in (merged / "model.safetensors", merged / "nothing"):
        with pytest.raises(UsageError) as refused:
            push(place, "org/name")
        assert refused.value.code == "E2032"


def test_a_missing_file_is_found_before_anything_is_sent(merged, online):
    fake = online(Hub())
    shutil.move(merged / "SHA256SUMS", merged.parent / "sums")
    with pytest.raises(InputError):
        push(merged, "org/name")
    assert fake.calls == []
