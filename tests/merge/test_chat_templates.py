"""Choice of the chat template, the built-in ones against mergekit's, and templates as mere text (G3)."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest

from surgeon.errors import UsageError
from surgeon.merge.chat_templates import BUILT_IN, choose_template, template_files

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
    ],
]
HOSTILE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**12) %}{% endfor %}" + "{{ 1/0 }}"
)


def render(template, conversation, prompt=True):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    return chat.render_jinja_template(
        [conversation],
        chat_template=template,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )[0][0]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_ins_render_like_mergekits(name, conversation, prompt):
    data = pytest.importorskip("mergekit._data.chat_templates")
    theirs = render(files(data).joinpath(name + ".jinja").read_text(), conversation, prompt)
    ours = render(BUILT_IN[name], conversation, prompt)
    if name in ("chatml", "mistral"):
        assert ours == theirs
        return
    if name == "alpaca" and conversation[-1]["role"] == "assistant":
        theirs += "### Response:" if prompt else ""  # mergekit's asks for an answer only after a question
    # the files of mergekit leak their own indentation and line ends into the prompt; ours are the formats
    # as their models were trained on
    assert re.sub(r"\s+", "", ours) == re.sub(r"\s+", "", theirs)


def test_built_ins_have_the_published_form():
    turns = CONVERSATIONS[2]
    assert render(BUILT_IN["llama3"], turns) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert render(BUILT_IN["exaone"], turns) == (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]2+2?\n[|assistant|]"
    )
    assert render(BUILT_IN["exaone"], turns[1:2]) == "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"
    assert render(BUILT_IN["alpaca"], turns[:2]) == "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n"


@pytest.mark.parametrize(
    "templates,expected",
    [
        ([("a", "one"), ("b", "two"), ("c", "two")], "two"),
        ([("a", "one"), ("b", "two")], "one"),
        ([("a", None), ("b", "two"), ("c", "one")], "two"),
        ([("a", "x"), ("b", "two\n"), ("c", " two")], "two\n"),
        ([("a", None), ("b", "  ")], None),
        ([], None),
    ],
)
def test_auto_takes_the_most_frequent_and_the_first_listed_on_a_tie(templates, expected):
    assert choose_template("auto", templates) == expected


def test_other_settings():
    models = [("a", "first"), ("b", "second")]
    assert choose_template(None, models) is None
    assert choose_template("base", models, donor="b") == "second"
    assert choose_template("chatml", models) == BUILT_IN["chatml"]
    literal = "{{ messages[0]['content'] }}"
    assert choose_template(literal, models) == literal


@pytest.mark.parametrize(
    "setting,hint", [("chatlm", 'did you mean "chatml"?'), ("{{ x }}", "at least 20"), ("zzz", "auto")]
)
def test_unknown_names_are_usage_errors(setting, hint):
    with pytest.raises(UsageError) as caught:
        choose_template(setting, [])
    assert caught.value.code == "E242" and caught.value.exit_code == 2 and hint in caught.value.help


def test_G3_hostile_templates_are_copied_as_text_and_never_rendered():
    chosen = choose_template("auto", [("a", HOSTILE)])
    assert chosen == HOSTILE == choose_template(HOSTILE, [])
    written = template_files(chosen, b'{"model_max_length": 1}')
    assert written["chat_template.jinja"].decode() == HOSTILE
    assert json.loads(written["tokenizer_config.json"])["chat_template"] == HOSTILE


def test_E8_both_forms_hold_the_same_text():
    config = {"chat_template": "old", "x": 1000000000000000019884624838656, "name": "日本"}
    written = template_files("new {{ x }}", json.dumps(config).encode(), b'{"chat_template": "old"}')
    assert sorted(written) == ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
    after = json.loads(written["tokenizer_config.json"])
    assert (
        after == config | {"chat_template": "new {{ x }}"}
        and "日本".encode() in written["tokenizer_config.json"]
    )
    assert json.loads(written["chat_template.json"]) == {"chat_template": "new {{ x }}"}
    assert list(template_files("t", None)) == ["chat_template.jinja"]


def test_named_templates_keep_their_text():
    named = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]
    written = template_files("new", json.dumps({"chat_template": named}).encode())
    assert json.loads(written["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "new"},
        {"name": "tool_use", "template": "tools"},
    ]


def test_transformers_reads_the_written_template(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    )
    fast.save_pretrained(tmp_path)
    config = (tmp_path / "tokenizer_config.json").read_bytes()
    for name, content in template_files(BUILT_IN["chatml"], config).items():
        (tmp_path / name).write_bytes(content)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == BUILT_IN["chatml"]
