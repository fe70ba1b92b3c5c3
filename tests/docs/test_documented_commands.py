"""Every command that the documents show runs, page by page and in order, on small models in place of the ones it names.

What is changed before it runs is in the tables below: names of models lead to small ones, sizes are scaled, and options
that only cost time are added. Nothing else is; a command that fails, or that needs something the page does not make,
fails the test.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import test_documents as documents
import transformers

from surgeon.cli import app

pytestmark = pytest.mark.slow

MODELS = documents.MODELS
STANDINS = {
    "long": ("long", "long-reasoner", "a", "c", "efficient", "other"),
    "short": ("short", "short-reasoner", "b", "original"),
    "base": ("base", "origin"),
}
DENSE = ("model", "my-model", "fast")
MIXTURES = ("MODEL", "my-mixture")

CHANGED = {
    "5GB": "1200kB", "30GB": "500kB", "3B": "1200k", "0.01": "0.02", "16": "2", "24": "3", "20": "2", "12": "2",
    "0.05": "0.5",
}  # fmt: skip
"""Values that only make sense for large models, after the option they belong to."""
SCALED = {
    "--target-size",
    "--target-params",
    "--target-kl",
    "--keep-layers",
    "--layer",
    "--samples",
    "--kl-budget",
}

LESS = {
    "prune": ("--samples", "8", "--sequence-length", "64"),
    "quantize": ("--samples", "8", "--sequence-length", "64"),
    "eval": ("--limit", "4", "--max-new-tokens", "16"),
    "measure": ("--repeat", "3", "--context", "32", "--generate", "8"),
    "inspect": ("--samples", "8", "--sequence-length", "64"),
}
"""Options added unless the command has them."""

ELSEWHERE = {
    "push": "needs a hub: tests/deploy/test_push.py has a small one",
    "export family": "a family of measured speedups: tests/prune",
    "run --from": "goes on with what a run before it left: tests/pipeline",
    "run": "planned here; recipes run below, in tests/recipe and tests/pipeline",
    "prune with --target-speedup": "timing in tests is chance: it is planned here, and run in tests/prune",
    "tutorial.md": "runs as it is written: test_documents.py",
}


def standins(folder: Path) -> None:
    """Make what the documents name: models, texts, questions, mergekit's file."""
    from safetensors.numpy import save_file

    for original, names in STANDINS.items():
        for name in names:
            shutil.copytree(MODELS / original, folder / name)
    for name in DENSE:
        dense(folder / name)
    for name in MIXTURES:
        mixture(folder / name)
    for name in ("long", "short"):  # bare files, without a config beside them
        source = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name)
        save_file({k: v.float().numpy() for k, v in source.state_dict().items() if k != "lm_head.weight"},
                  folder / f"{name}.safetensors")  # fmt: skip
    pairs = [(a, b) for a in range(2, 9) for b in range(2, 9)]
    _lines(
        folder,
        [{"question": f"Add {a}+{b}.", "answer": str(a + b)} for a, b in pairs],
        "questions",
        "held-out",
        "q",
        "train",
    )
    _lines(
        folder,
        [{"prompt": f"Add {a}+{b}.", "response": f"answer:{a + b}"} for a, b in pairs],
        "short-answers",
    )
    _lines(folder, [{"prompt": f"Add {a}+{b}.", "short": f"answer:{a + b}", "long": f"{a}+{b}={a + b},answer:{a + b}"}
                    for a, b in pairs], "both-answers")  # fmt: skip
    for name in ("demos", "code", "math", "texts"):
        _lines(
            folder,
            [
                {"text": f"{name} {a} plus {b} is {a + b}, and {b} times {a} is {a * b}. " * 6}
                for a, b in pairs
            ],
            name,
        )
    (folder / "scores.json").write_text(json.dumps(
        {"format": "surgeon layer scores", "version": 1, "models": {"long": {"layers": {str(n): 0.5 for n in range(4)}}}}
    ))  # fmt: skip
    shutil.copy(MODELS / "merge.yaml", folder / "mergekit-config.yml")


def _lines(folder: Path, records: list[dict], *names: str) -> None:
    for name in names:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def dense(folder: Path) -> None:
    """Write a random Llama, whose class can hold a bias and whose widths every format takes."""
    import torch

    config = transformers.LlamaConfig(
        vocab_size=281, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=1024, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODELS / "long" / name, folder)


def mixture(folder: Path) -> None:
    """Write a random mixture of eight experts with the small models' tokenizer."""
    import torch

    config = transformers.Qwen3MoeConfig(
        vocab_size=281, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, intermediate_size=64, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)


def changed(words: list[str]) -> list[str]:
    """Return a command as it runs here."""
    verb, rest = words[0], list(words[1:])
    for place, word in enumerate(rest[:-1]):
        if word in SCALED:
            rest[place + 1] = CHANGED.get(rest[place + 1], rest[place + 1])
    for option, value in zip(LESS.get(verb, ())[::2], LESS.get(verb, ())[1::2], strict=True):
        if option not in rest and documents.parser(verb) and takes(verb, option):
            rest += [option, value]
    if "--gate" in rest:
        rest.append("--gate-limited")
    if (verb == "prune" and "--target-speedup" in rest) or verb == "run":
        rest.append("--dry-run")
    return [verb, *rest]


def takes(verb: str, option: str) -> bool:
    return any(option in one.opts for one in documents.parser(verb).params)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    standins(folder)
    return folder


PAGES = sorted({where.partition(":")[0] for where, _ in documents.COMMANDS} - ELSEWHERE.keys())


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page, place, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "page"
    shutil.copytree(place, folder)
    PREPARED.get(page, lambda folder: None)(folder)
    ran = 0
    for where, words in documents.COMMANDS:
        if (
            not where.startswith(f"{page}:")
            or words[0] == "push"
            or "--from" in words
            or " ".join(words[:2]) in ELSEWHERE
        ):
            continue
        # Without a model the command is about the folder it is called in.
        inside = words[0] == "prune" and (len(words) == 1 or words[1].startswith("-"))
        monkeypatch.chdir(folder / "my-model" if inside else folder)
        given = changed(words)
        output = given[given.index("-o") + 1] if "-o" in given else "merged" if given[0] == "merge" else ""
        if output and (folder / output).exists() and takes(given[0], "--overwrite"):
            given.append("--overwrite")  # the page lists alternatives under one name
        given = [
            one for word in given for one in (sorted(map(str, Path().glob(word))) if "/*" in word else [word])
        ]
        code = app.run(given[0], given[1:])
        said = capsys.readouterr()
        AFTER.get((page, words[0]), lambda folder: None)(folder)
        # What gates say of random models is chance.
        assert code in ((0, 4) if "--gate" in given else (0,)), (
            f"{where}: surgeon {' '.join(given)}\n{said.out[-1500:]}\n{said.err[-1500:]}"
        )
        ran += 1
    assert ran


def _run(folder: Path, *words: str, codes: tuple[int, ...] = (0,)) -> None:
    import os

    here = Path.cwd()
    os.chdir(folder)
    try:
        assert app.run(words[0], list(words[1:])) in codes, words
    finally:
        os.chdir(here)


def _recipes(folder: Path) -> None:
    """Write the recipe that the page shows first under the name its commands use."""
    first = next(block for block in documents.YAML if block.page.name == "recipes.md")
    (folder / "long-to-short.yaml").write_text(first.text.replace("speedup: 1.5", "sparsity: 0.2"))


def _recipe_of_ones_own(folder: Path) -> None:
    text = (documents.ROOT / "recipes" / "pipelines" / "merge-prune-quantize.yaml").read_text()
    for name in ("my-recipe", "nightly"):
        (folder / f"{name}.yaml").write_text(text.replace("samples: 128", "samples: 8, sequence_length: 64"))


def _nightly(folder: Path) -> None:
    """Write the recipe, and a document as its run would."""
    _recipe_of_ones_own(folder)
    _run(folder, "eval", "long", "--questions", "questions.jsonl", "-o", "result.json", *LESS["eval"])


def _results(folder: Path) -> None:
    """Write a merged model, and results of other models beside those that the page makes."""
    shutil.copytree(MODELS / "short", folder / "merged")
    _run(folder, "eval", "long", "--questions", "questions.jsonl", "-o", "long.json", *LESS["eval"])
    (folder / "sweep").mkdir()
    shutil.copy(folder / "long.json", folder / "sweep" / "one.json")


def _some_results(folder: Path) -> None:
    _run(folder, "eval", "long", "--questions", "questions.jsonl", "-o", "0.7.json", *LESS["eval"])
    shutil.copy(folder / "0.7.json", folder / "0.9.json")


def _pruned(folder: Path) -> None:
    _run(folder, "prune", "model", "--sparsity", "0.3", "--structures", "ffn", "--round-to", "256", "--layout", "per-layer",
         "--search", "dp", "-o", "pruned", *LESS["prune"])  # fmt: skip


def _responses(folder: Path) -> None:
    """Write responses whose thinking is short or long; what a random model says has none."""
    records = [
        {"prompt": f"Add {n}+2.", "thinking": "so. " * (2 if n % 2 else 350), "response": f"{n + 2}"}
        for n in range(24)
    ]
    _lines(folder, records, "responses")
    _run(folder, "edit", "model", "--method", "thinkedit", "--responses", "responses.jsonl", "--save-direction", "d.safetensors",
         "-o", "saved")  # fmt: skip


def _record(folder: Path) -> None:
    """Save the record that the command before prints, as the page says."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        _run(folder, "inspect", "MODEL", "--experts", "--guess")
    (folder / "record.yaml").write_text(said.getvalue())


PREPARED = {
    "recipes.md": _recipes, "README.md": _recipe_of_ones_own, "ci.md": _nightly, "evaluating.md": _results,
    "long-to-short.md": _some_results, "formats.md": _pruned, "experts.md": _record,
}  # fmt: skip
"""What a page takes for granted."""
AFTER = {("editing.md", "eval"): _responses}


RUNNABLE = [
    block for block in documents.YAML if block.page.name != "tutorial.md" and "jobs:" not in block.text.splitlines()
]  # fmt: skip


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_every_recipe_of_a_page_runs(block, place, tmp_path):
    """The tutorial's runs as it is written, in test_documents.py; workflows of CI in test_action.py."""
    folder = tmp_path / "page"
    shutil.copytree(place, folder)
    (folder / "recipe.yaml").write_text(block.text.replace("speedup: 1.5", "sparsity: 0.2"))
    _run(folder, "run", "recipe.yaml", "-o", "out", codes=(0, 4) if "gates:" in block.text else (0,))
    assert any(folder.glob("out*/**/surgeon.json"))
