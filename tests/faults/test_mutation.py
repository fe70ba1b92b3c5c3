"""Whatever is done to a published file afterwards, verification notices; the checker agrees that it was whole."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import checker
import forge
import kit
import pytest

from surgeon.execute import execute
from surgeon.verify.static import verify_path


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A sharded folder and a bare file, published once."""
    root = tmp_path_factory.mktemp("published")
    models = [forge.model_folder(root / n, s) for n, s in (("long", 1), ("short", 2))]
    execute(kit.plan(models, max_shard_size=4000), root / "out", threads=1)
    execute(kit.plan([m / "model.safetensors" for m in models]), root / "out.safetensors", threads=1)
    for path in (root / "out", root / "out.safetensors"):
        checker.check(path)
        assert not verify_path(path).errors
    return root


FOLDER = [
    "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
    "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "README.md", "surgeon.json", "SHA256SUMS",
]  # fmt: skip


def flips(content: bytes, count: int) -> list[bytes]:
    chance = random.Random(len(content))
    places = {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(count))}
    return [
        content[:p] + bytes([content[p] ^ 1 << chance.randrange(8)]) + content[p + 1 :]
        for p in sorted(places)
    ]


def test_the_list_of_files_is_complete(published):
    assert sorted(FOLDER) == sorted(checker.tree(published / "out"))


@pytest.mark.parametrize("name", FOLDER)
def test_B9_verify_notices_every_change_of_a_folder(published, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(published / "out", out)
    file = out / name
    content = file.read_bytes()

    def noticed(what: str) -> None:
        assert verify_path(out).errors, f"{what} of {name} went unnoticed"
        with pytest.raises((AssertionError, OSError, ValueError)):
            checker.check(out)

    for changed in flips(content, 12):
        file.write_bytes(changed)
        noticed("a flipped bit")
    for length in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        noticed(f"truncation to {length}")
    for more in (b"\n", b"\0", b" " * 8):
        file.write_bytes(content + more)
        noticed("extension")
    file.unlink()
    noticed("deletion")
    (out / f"{name}.renamed").write_bytes(content)
    noticed("renaming")
    (out / f"{name}.renamed").unlink()
    file.mkdir()
    noticed("replacement by a folder")
    file.rmdir()
    file.write_bytes(content)
    assert not verify_path(out).errors


def test_B9_verify_notices_swapped_files(published, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(published / "out", out)
    first, second = out / FOLDER[0], out / FOLDER[1]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    assert verify_path(out).errors


@pytest.mark.parametrize("name", ["out.safetensors", "out.safetensors.surgeon.json"])
def test_B9_verify_notices_every_change_of_a_bare_file(published, tmp_path, name):
    for file in ("out.safetensors", "out.safetensors.surgeon.json"):
        shutil.copy(published / file, tmp_path / file)
    out, file = tmp_path / "out.safetensors", tmp_path / name
    content = file.read_bytes()
    for changed in [
        *flips(content, 40),
        b"",
        content[:-1],
        content[: len(content) // 2],
        content + b"\n",
        content + b" ",
    ]:
        file.write_bytes(changed)
        assert verify_path(out).errors
    file.write_bytes(content)
    assert not verify_path(out).errors
    out.unlink()
    assert verify_path(out).errors


def test_B9_a_missing_sidecar_is_said_not_assumed(published, tmp_path):
    shutil.copy(published / "out.safetensors", tmp_path)
    report = verify_path(tmp_path / "out.safetensors")
    assert not report.errors and any("bit rot cannot be detected" in n for n in report.notes)


@pytest.mark.parametrize(
    "line",
    [
        "0" * 64 + "  /etc/passwd",
        "0" * 64 + "  ../../x",
        "0" * 64 + "  a\x1b[2Jb",
        "nonsense",
        "0" * 64 + "  ",
        "\xff",
    ],
)
def test_C1_hostile_checksum_files_are_refused(published, tmp_path, line):
    out = tmp_path / "out"
    shutil.copytree(published / "out", out)
    sums = out / "SHA256SUMS"
    sums.write_text(sums.read_text() + line + "\n", encoding="latin-1")
    errors = verify_path(out).errors
    assert errors and all(str(e).isprintable() for e in errors)
    (out / "surgeon.json").unlink()
    verify_path(out)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"files": []}', '{"files": {"config.json": 7}}', "{", "null", '{"files": {"../x": "0"}}'],
)
def test_C7_hostile_manifests_do_not_break_verification(published, tmp_path, text):
    out = tmp_path / "out"
    shutil.copytree(published / "out", out)
    (out / "surgeon.json").write_text(text)
    (out / "SHA256SUMS").unlink()
    assert verify_path(out).errors
    shutil.copy(published / "out.safetensors", tmp_path)
    (tmp_path / "out.safetensors.surgeon.json").write_text(text)
    assert verify_path(tmp_path / "out.safetensors").errors
