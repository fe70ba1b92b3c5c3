"""The reader in its own process: what it finds, and what happens when it crashes or hangs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import forge
import pytest

from surgeon.errors import EnvironmentFault, UsageError
from surgeon.verify import readers

pytest.importorskip("transformers")


@pytest.fixture
def folder(scratch) -> Path:
    return forge.model_folder(scratch / "model", 1)


def replace_child(monkeypatch, tmp_path, source: str) -> None:
    file = tmp_path / "reader_child.py"
    file.write_text(source)
    monkeypatch.setattr(readers, "__file__", str(tmp_path / "readers.py"))


def test_a_sound_model_loads_generates_and_equals_itself(folder):
    found = readers.read_with_transformers(folder, generate=True, against=folder)
    assert not found.errors
    assert found.checks["load"]["class"] == "LlamaForCausalLM"
    assert found.checks["generate"]["tokens"] == 16
    assert found.checks["tokenizer"]["texts"] == 20
    assert found.checks["chat template"]
    assert found.checks["against"]["max_difference"] == 0
    assert found.checks["against"]["top1_agreement"] == 1


def test_another_model_gives_other_logits(folder, scratch):
    other = forge.model_folder(scratch / "other", 2)
    found = readers.read_with_transformers(folder, against=other)
    assert not found.errors
    assert found.checks["against"]["max_difference"] > 0


@pytest.mark.slow
def test_a_missing_tensor_is_found_although_the_loader_fills_it(folder):
    tensors = forge.llama_tensors(1)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    forge.write(folder / "model.safetensors", tensors)
    found = readers.read_with_transformers(folder)
    assert {e.code for e in found.errors} == {"E360"}
    assert any("1 missing" in e.message and "up_proj" in e.message for e in found.errors)


@pytest.mark.slow
def test_a_type_other_than_declared_and_extra_layers_are_found(scratch):
    folder = forge.model_folder(scratch / "model", 1, num_hidden_layers=3)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 2}))
    found = readers.read_with_transformers(folder)
    assert any("the files hold" in e.message or "unexpected" in e.message for e in found.errors)


@pytest.mark.slow
def test_a_template_that_raises_or_forgets_the_user(folder):
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for template in ("{{ raise_exception('no') }}", "nothing", "{{ ''.__class__.__mro__ }}"):
        file.write_text(json.dumps({**content, "chat_template": template}))
        found = readers.read_with_transformers(folder, generate=True)
        assert [e.code for e in found.errors] == ["E362"], template


@pytest.mark.slow
def test_a_template_that_never_ends_runs_out_of_time(folder):
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    file.write_text(json.dumps({**content, "chat_template": endless}))
    with pytest.raises(EnvironmentFault, match="chat template") as caught:
        readers.read_with_transformers(folder, generate=True, timeout=25)
    assert caught.value.code == "E514"


@pytest.mark.slow
def test_code_of_the_model_is_not_run(folder):
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(EnvironmentFault, match="own code"):
        readers.read_with_transformers(folder)


def test_a_crash_is_a_finding_with_the_stage(folder, monkeypatch, tmp_path):
    replace_child(
        monkeypatch, tmp_path,
        "import json, os, sys, signal\n"
        "r = json.load(sys.stdin)\n"
        "open(r['answer'], 'w').write(json.dumps({'stage': 'loading the weights', 'checks': {}}))\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n",
    )  # fmt: skip
    found = readers.read_with_transformers(folder)
    assert [e.code for e in found.errors] == ["E364"]
    assert "SIGSEGV" in found.errors[0].message
    assert "loading the weights" in found.errors[0].message


@pytest.mark.parametrize(
    "source", ["import sys; sys.exit(3)", "raise ValueError", "", "import sys; open('x')"]
)
def test_an_answer_that_never_comes_is_a_finding(folder, monkeypatch, tmp_path, source):
    replace_child(monkeypatch, tmp_path, source)
    found = readers.read_with_transformers(folder)
    assert [e.code for e in found.errors] == ["E364"]


def test_being_killed_looks_like_memory(folder, monkeypatch, tmp_path):
    replace_child(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EnvironmentFault) as caught:
        readers.read_with_transformers(folder)
    assert caught.value.code == "E513"


def test_a_hanging_reader_and_its_children_are_ended(folder, monkeypatch, tmp_path):
    marker = tmp_path / "pid"
    replace_child(
        monkeypatch, tmp_path,
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(marker)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)\n",
    )  # fmt: skip
    with pytest.raises(EnvironmentFault) as caught:
        readers.read_with_transformers(folder, timeout=5)
    assert caught.value.code == "E514"
    deadline = time.monotonic() + 10
    while _runs(int(marker.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(marker.read_text()))


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def test_no_reader_is_an_environment_fault_with_the_command(folder, monkeypatch):
    monkeypatch.setattr(readers, "available", lambda: ["torch"])
    with pytest.raises(EnvironmentFault) as caught:
        readers.read_with_transformers(folder)
    assert (caught.value.code, caught.value.exit_code) == ("E512", 5)
    assert "pip install" in caught.value.help


def test_too_little_memory_is_said_before_it_is_tried(folder):
    with pytest.raises(EnvironmentFault) as caught:
        readers.read_with_transformers(folder, memory_limit=1 << 20)
    assert caught.value.code == "E513"


def test_a_bare_file_is_a_usage_error(scratch):
    file = forge.write(scratch / "x.safetensors", forge.llama_tensors(1))
    with pytest.raises(UsageError):
        readers.read_with_transformers(file)


def test_the_parent_imports_no_torch():
    assert "surgeon.verify.reader_child" not in sys.modules
