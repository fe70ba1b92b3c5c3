"""Which files of a model folder survive, links, limits, generation settings and chat templates."""

from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest

from surgeon.checkpoint.companions import (
    Companion,
    check_token_ids,
    companion_kind,
    copy_companion,
    find_companions,
    licence_files,
    missing_companions,
    read_chat_templates,
    read_generation_config,
    reason_left_out,
)
from surgeon.errors import EnvironmentFault, InputError

KEPT = {
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "merges.txt": "tokenizer",
    "tokenizer.model": "tokenizer",
    "chat_template.jinja": "chat-template",
    "additional_chat_templates/tool_use.jinja": "chat-template",
    "generation_config.json": "generation",
    "preprocessor_config.json": "processor",
    "processor_config.json": "processor",
    "LICENSE": "licence",
    "LICENSE.txt": "licence",
    "NOTICE": "licence",
    "USE_POLICY.md": "licence",
    "Notice.txt": "licence",
    "modeling_foo.py": "code",
    "configuration_foo.py": "code",
    "modules.json": "other",
    "config_sentence_transformers.json": "other",
    "sentence_bert_config.json": "other",
    "1_Pooling/config.json": "other",
    "something_unheard_of.json": "other",
}
LEFT_OUT = [
    "config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "model.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "openvino/openvino_model.xml",
    "original/params.json",
    "original/tokenizer.model",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "training_args.bin",
    "trainer_state.json",
    "events.out.tfevents.1.host",
    "checkpoint-500/model.safetensors",
    "global_step10/zero.pt",
    ".git/config",
    ".gitattributes",
    ".cache/huggingface/download/x.lock",
    ".env",
    "__pycache__/modeling_foo.cpython-311.pyc",
    "wandb/run.json",
    "evil.pkl",
    "data.pickle",
    "adapter_config.json",
    "adapter_model.safetensors",
    "quantize_config.json",
    "README.md",
    "surgeon.json",
    "SHA256SUMS",
    "mergekit_config.yml",
    "model.tar.gz",
    "tokenizer.json.lock",
    "tokenizer.json.incomplete",
    "assets/figure.png",
    "benchmark.jpg",
]


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else f"content of {name}\n")
    return folder


def test_E8_golden_list_of_what_is_carried_over(tmp_path):
    fill(tmp_path, [*KEPT, *LEFT_OUT])
    found = find_companions(tmp_path)
    assert {c.name: c.kind for c in found.files} == KEPT
    assert [c.name for c in found.files] == sorted(KEPT)
    assert found.missing == ()
    assert {c.name for c in found.of_kind("code")} == {"modeling_foo.py", "configuration_foo.py"}
    listed = dict(found.left_out)
    assert listed["evil.pkl"] == "pickle" and listed["optimizer.pt"] == "left over from training"
    assert listed[".git/"] == "hidden" and "onnx/" in listed and listed["model.gguf"] == "weights"


@pytest.mark.parametrize("name", LEFT_OUT)
def test_each_denied_name_has_a_reason(name):
    assert reason_left_out(name)


@pytest.mark.parametrize("name", KEPT)
def test_each_kept_name_has_a_kind(name):
    assert reason_left_out(name) is None and companion_kind(name) == KEPT[name]


def test_E8_missing_companions_are_reported(tmp_path):
    fill(tmp_path, ["model.safetensors"])
    expected = ("tokenizer", "tokenizer_config.json", "generation_config.json", "chat template", "LICENSE")
    assert find_companions(tmp_path).missing == expected
    fill(tmp_path, ["tokenizer.json", "generation_config.json", "LICENSE.md"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert find_companions(tmp_path).missing == ()
    assert "tokenizer" in missing_companions({"tokenizer_config.json", "added_tokens.json"})


def test_weights_of_listed_modules_survive_but_not_as_pickle(tmp_path):
    fill(
        tmp_path,
        ["model.safetensors", "2_Dense/model.safetensors", "2_Dense/config.json", "3_Dense/config.json"],
    )
    fill(tmp_path, ["3_Dense/pytorch_model.bin", "other/model.safetensors", "other/config.json"])
    modules = [
        {"idx": 0, "path": ""},
        {"idx": 1, "path": "2_Dense"},
        {"idx": 2, "path": "3_Dense"},
        {"path": "../x"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = find_companions(tmp_path)
    assert [c.name for c in found.files] == [
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_Dense/config.json",
        "modules.json",
    ]
    assert found.of_kind("module")[0].name == "2_Dense/model.safetensors"
    listed = dict(found.left_out)
    assert listed["3_Dense/pytorch_model.bin"] == "weights" and listed["other/"] == "another model"


# ---- links ----------------------------------------------------------------------------------------


def hub_cache(root):
    repo = root / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs" / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    return snapshot


def test_C2_hub_cache_links_are_followed_and_copied_by_content(tmp_path):
    snapshot = hub_cache(tmp_path)
    (found,) = find_companions(snapshot).files
    out = tmp_path / "out" / "tokenizer.json"
    digest = copy_companion(found, out)
    assert digest == hashlib.sha256(b"{}").hexdigest() and out.read_text() == "{}" and not out.is_symlink()
    link = tmp_path / "shortcut"
    link.symlink_to(snapshot)
    assert [c.name for c in find_companions(link).files] == ["tokenizer.json"]


def test_C2_links_out_of_folder_and_cache_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    snapshot = hub_cache(tmp_path)
    (snapshot / "NOTICE").symlink_to(secret)
    with pytest.raises(InputError, match="NOTICE is a link that leaves the model folder") as caught:
        find_companions(snapshot)
    assert caught.value.code == "E336" and caught.value.exit_code == 3
    with pytest.raises(InputError, match="leaves the model folder"):
        licence_files([("a", snapshot)])


def test_C2_another_models_cache_entry_is_outside(tmp_path):
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "2").write_text("x")
    (snapshot / "merges.txt").symlink_to(other / "2")
    with pytest.raises(InputError, match="leaves the model folder"):
        find_companions(snapshot)


def test_C2_linked_folders_are_checked_and_links_inside_are_fine(tmp_path):
    model = fill(tmp_path / "model", ["real/vocab.json"])
    (model / "vocab.json").symlink_to("real/vocab.json")
    assert {c.name for c in find_companions(model).files} == {"real/vocab.json", "vocab.json"}
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.json").write_text("{}")
    (model / "1_Pooling").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="1_Pooling is a link"):
        find_companions(model)


def test_C2_links_of_left_out_files_do_not_matter(tmp_path):
    model = fill(tmp_path / "model", ["tokenizer.json"])
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert [c.name for c in find_companions(model).files] == ["tokenizer.json"]


def test_C2_a_dangling_link_is_an_input_error(tmp_path):
    model = fill(tmp_path / "model", ["tokenizer.json"])
    (model / "merges.txt").symlink_to("gone")
    with pytest.raises(InputError, match="does not exist") as caught:
        find_companions(model)
    assert caught.value.code == "E301"


def test_special_files_are_never_opened(tmp_path):
    model = fill(tmp_path / "model", ["tokenizer.json"])
    os.mkfifo(model / "pipe.json")
    found = find_companions(model)
    assert [c.name for c in found.files] == ["tokenizer.json"] and (
        "pipe.json",
        "not a regular file",
    ) in found.left_out


# ---- copying and limits ----------------------------------------------------------------------------


def test_copies_are_plain_readable_files_and_never_overwrite(tmp_path):
    model = fill(tmp_path / "model", ["tokenizer.json"])
    os.chmod(model / "tokenizer.json", 0o600)
    (found,) = find_companions(model).files
    out = tmp_path / "out" / "deep" / "tokenizer.json"
    copy_companion(found, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    with pytest.raises(EnvironmentFault):
        copy_companion(found, out)


def test_a_file_that_grows_or_shrinks_while_copying_is_noticed(tmp_path):
    model = fill(tmp_path / "model", ["tokenizer.json"])
    (found,) = find_companions(model).files
    (model / "tokenizer.json").write_text("{}" * 100)
    with pytest.raises(InputError, match="changed while it was in use"):
        copy_companion(found, tmp_path / "one")
    with pytest.raises(InputError, match="changed while it was in use"):
        copy_companion(Companion("t", model / "tokenizer.json", 500, "tokenizer"), tmp_path / "two")


def test_sizes_and_counts_are_bounded(tmp_path):
    fill(tmp_path, ["tokenizer.json", "notes.txt"])
    (tmp_path / "notes.txt").write_text("x" * 1000)
    found = find_companions(tmp_path, max_file_bytes=100)
    assert [c.name for c in found.files] == ["tokenizer.json"] and "larger than" in dict(found.left_out)[
        "notes.txt"
    ]
    (tmp_path / "tokenizer.json").write_text(" " * 1000)
    for limits in ({"max_file_bytes": 100}, {"max_total_bytes": 100}, {"max_files": 1}):
        with pytest.raises(InputError) as caught:
            find_companions(tmp_path, **limits)
        assert caught.value.code == "E338"


def test_nesting_is_bounded(tmp_path):
    fill(tmp_path, ["a/b/c/ok.json", "a/b/c/d/e/f/deep.json"])
    found = find_companions(tmp_path)
    assert [c.name for c in found.files] == ["a/b/c/ok.json"] and (
        "a/b/c/d/",
        "nested too deep",
    ) in found.left_out


# ---- licences ----------------------------------------------------------------------------------------


def test_licences_of_all_sources_are_kept_once_each(tmp_path):
    a = fill(tmp_path / "a", [])
    for name, text in (("a", "Apache"), ("b", "Apache"), ("c", "Custom")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "LICENSE").write_text(text)
    (tmp_path / "c" / "NOTICE").write_text("by c")
    found = licence_files([("org/a", a), ("org/b", tmp_path / "b"), ("org/c", tmp_path / "c")])
    assert [(c.name, c.source.read_text()) for c in found] == [
        ("LICENSE", "Apache"),
        ("LICENSE.org-c", "Custom"),
        ("NOTICE", "by c"),
    ]


# ---- generation settings ---------------------------------------------------------------------------


def test_E8_generation_config_is_read(tmp_path):
    assert read_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(InputError):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        {"eos_token_id": 10},
        {"eos_token_id": [1, 10]},
        {"bos_token_id": -1},
        {"pad_token_id": 99},
        {"eos_token_id": -1},
    ],
)
def test_E8_ids_outside_the_vocabulary_are_refused(document):
    with pytest.raises(InputError, match=r"outside the vocabulary of 10 rows") as caught:
        check_token_ids(document, 10, file="generation_config.json")
    assert caught.value.code == "E337" and caught.value.exit_code == 3


@pytest.mark.parametrize("value", ["2", 2.0, True, [1, None], {"id": 1}])
def test_E8_ids_must_be_integers(value):
    with pytest.raises(InputError, match="not a token id"):
        check_token_ids({"eos_token_id": value}, 10, file="config.json")


@pytest.mark.parametrize(
    "document", [{}, {"eos_token_id": None}, {"eos_token_id": [0, 9], "pad_token_id": -1}]
)
def test_E8_usual_ids_pass(document):
    check_token_ids(document, 10, file="config.json")


# ---- chat templates ----------------------------------------------------------------------------------


def test_E8_both_forms_of_the_chat_template_are_found_and_compared(tmp_path):
    assert read_chat_templates(tmp_path).default is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    assert read_chat_templates(tmp_path).found_in == ("tokenizer_config.json",)
    (tmp_path / "chat_template.jinja").write_text("one\n")
    found = read_chat_templates(tmp_path)
    assert found.default == "one\n" and found.agree
    assert found.found_in == ("chat_template.jinja", "tokenizer_config.json")
    (tmp_path / "chat_template.jinja").write_text("two")
    found = read_chat_templates(tmp_path)
    assert found.default == "two" and not found.agree


def test_named_chat_templates(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, {"broken": 1}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    fill(tmp_path, ["additional_chat_templates/rag.jinja"])
    found = read_chat_templates(tmp_path)
    assert found.default == "d" and found.named["tool_use"] == "t" and "rag" in found.named


def test_G3_hostile_templates_are_only_text(tmp_path):
    hostile = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "pwned") + "') }}"
    (tmp_path / "chat_template.jinja").write_text(hostile)
    assert read_chat_templates(tmp_path).default == hostile
    (found,) = find_companions(tmp_path).files
    copy_companion(found, tmp_path / "out" / found.name)
    assert (tmp_path / "out" / found.name).read_text() == hostile and not (tmp_path / "pwned").exists()


def test_C2_a_template_link_out_of_the_folder_is_refused(tmp_path):
    model = fill(tmp_path / "model", [])
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "x").write_text("secret")
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "x")
    with pytest.raises(InputError, match="leaves the model folder"):
        read_chat_templates(model)


def test_only_the_standard_library_is_needed_besides_the_checkpoint_package():
    import ast
    from pathlib import Path

    import surgeon.checkpoint.companions as module

    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    import sys

    assert names - sys.stdlib_module_names == {"surgeon"}
