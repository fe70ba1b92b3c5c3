"""Reading records: every kind of source, and every way a source can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgeon.data.records import parse_sources, read_records
from surgeon.errors import EnvironmentFault, InputError, SurgeonError, UsageError


def write(folder, name: str, content: bytes | str):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refused(source, code: str, kind: type[SurgeonError] = InputError, **settings) -> SurgeonError:
    with pytest.raises(kind) as caught:
        read_records(str(source), **settings)
    assert caught.value.code == code, str(caught.value)
    return caught.value


# --- JSON lines ------------------------------------------------------------------------------------


def test_json_lines_keep_values_lines_and_the_digest_of_the_bytes(tmp_path):
    content = '{"text": "ä\u2028b"}\r\n\r\n  {"text": "c", "n": [1, 2.5, null, true]}\n'
    found = read_records(str(write(tmp_path, "a.jsonl", content)))
    assert [r.values for r in found.records] == [
        {"text": "ä\u2028b"},
        {"text": "c", "n": [1, 2.5, None, True]},
    ]
    assert [r.line for r in found.records] == [1, 3]
    assert (found.label, found.kind) == ("a.jsonl", "jsonl")
    assert found.sha256 == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "expecting ',' delimiter"),
        ('{"text": "a"} {"text": "b"}', "more text follows"),
        ('{"a": 1, "a": 2}', 'the key "a" occurs twice'),
        ('{"a": {"b": 1, "b": 1}}', 'the key "b" occurs twice'),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
        ('["a"]x', "a list|more text follows"),
        ('"text"', "it is a string, not an object"),
        ("17", "it is a number, not an object"),
        ("null", "it is null, not an object"),
        ("true", "it is true or false, not an object"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"a": "x\ty"}', "invalid control character"),
        ("{'a': 1}", "property name"),
        ('{"a":' * 100_000, "nested too deeply|expecting value"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_the_reason(tmp_path, line, reason):
    import re

    raw = line if isinstance(line, bytes) else line.encode()
    file = write(tmp_path, "bad.jsonl", b'{"text": "fine"}\n' + raw + b"\n")
    error = refused(file, "E371")
    assert error.where.line == 2 and error.where.file == str(file)
    assert re.search(reason, error.message), error.message
    assert "line 2" in error.message


def test_a_surrogate_pair_is_a_character(tmp_path):
    found = read_records(str(write(tmp_path, "a.jsonl", '{"text": "\\ud83d\\ude00"}')))
    assert found.records[0].values == {"text": "😀"}


def test_many_bad_lines_are_reported_at_once_but_not_more_than_twenty(tmp_path):
    lines = ['{"text": "fine"}' if i % 2 else "{broken" for i in range(100)]
    error = refused(write(tmp_path, "a.jsonl", "\n".join(lines)), "E371")
    found = [error, *error.others]
    assert [e.where.line for e in found] == [1 + 2 * i for i in range(20)]


def test_an_object_over_several_lines_says_what_is_missing(tmp_path):
    error = refused(write(tmp_path, "a.jsonl", '{\n  "text": "a"\n}\n'), "E371")
    assert "each record on one line" in error.help


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(
        st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"d800", b"NaN", b"1e999", b"\n", b"\r", b",", b":", b" ", b"\xff",
                         b'{"a": 1}', b'"text"', b"\xef\xbb\xbf", b"\x00", b"\xe2\x80\xa8"]),
        st.text(max_size=5).map(lambda t: t.encode("utf-8", "surrogatepass"))), max_size=30).map(b"".join),
    st.lists(st.dictionaries(st.text(max_size=4), st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
             lambda c: st.lists(c, max_size=3), max_leaves=5), max_size=3), max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
))  # fmt: skip
@pytest.mark.parametrize("name", ["fuzz.jsonl", "fuzz.json", "fuzz.txt"])
def test_any_bytes_parse_or_give_a_named_error(tmp_path, name, raw):
    file = write(tmp_path, name, raw)
    try:
        found = read_records(str(file))
    except InputError as error:
        assert error.code in {"E370", "E371", "E372"}
        assert error.where.file == str(file)
    else:
        assert found.records and found.sha256 == hashlib.sha256(raw).hexdigest()
        assert all(isinstance(r.values, dict) and 1 <= r.line <= raw.count(b"\n") + 1 for r in found.records)
        json.dumps([r.values for r in found.records], ensure_ascii=False, allow_nan=False).encode()


# --- JSON lists ------------------------------------------------------------------------------------


def test_a_json_list_gives_the_line_where_each_object_starts(tmp_path):
    found = read_records(str(write(tmp_path, "a.json", '\n[{"a": 1},\n {\n  "a": "x\\ny"},\n\n {"a": 3}]\n')))
    assert [r.values["a"] for r in found.records] == [1, "x\ny", 3]
    assert [r.line for r in found.records] == [2, 3, 6]
    assert found.kind == "json"


def test_json_lines_may_be_called_json(tmp_path):
    assert len(read_records(str(write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n'))).records) == 2


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[{"a": 1}\n{"a": 2}]', 2, 'a ","'),
        ('[{"a": 1},\n', 2, "expecting value"),
        ('[{"a": 1},\n]', 2, "expecting value"),
        ('[{"a": 1}]\nx', 2, "more text follows the list"),
        ('[\n\n{"a": 1,\n"a": 2}]', 3, "occurs twice"),
        ('[\n{"a": 1},\n"b"]', 3, "a string, not an object"),
        ('[\n{"a": NaN}]', 2, "NaN"),
        ('[{"a": 1}', 1, 'a ","'),
    ],
)  # fmt: skip
def test_a_bad_json_list_is_refused_with_the_line(tmp_path, content, line, reason):
    error = refused(write(tmp_path, "a.json", content), "E371")
    assert error.where.line == line and reason in error.message, error.message


# --- encodings, kinds, sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.md"])
@pytest.mark.parametrize(
    ("raw", "code", "reason"),
    [
        ('{"text": "a"}'.encode("utf-16"), "E371", "UTF-16"),
        ('{"text": "a"}'.encode("utf-16-le"), "E371", "UTF-16"),
        ('{"text": "a"}'.encode("utf-16-be"), "E371", "UTF-16"),
        ('{"text": "a"}'.encode("utf-8-sig"), "E371", "byte order mark"),
        (b"", "E372", "no records"),
        (b" \n\r\n\t", "E372", "no records"),
        (b"\x1f\x8b\x08\x00rest", "E370", "compressed"),
        (b"PAR1....", "E370", "parquet"),
        ("{'text': 'ä'}".encode("latin-1"), "E371", "UTF-8"),
    ],
)
def test_a_file_in_another_shape_is_named(tmp_path, name, raw, code, reason):
    error = refused(write(tmp_path, name, raw), code)
    assert reason in error.message and error.help


def test_an_empty_json_list_has_no_records(tmp_path):
    refused(write(tmp_path, "a.json", "[ ]"), "E372")


@pytest.mark.parametrize(("name", "help"), [("a.jsonl.gz", "gunzip"), ("a.zst", "unzstd"), ("a.zip", "unzip"), ("a.csv", "JSON lines"),
                                            ("a.bin", ".jsonl"), ("noending", ".jsonl")])  # fmt: skip
def test_other_kinds_of_files_are_refused_with_a_way_out(tmp_path, name, help):
    assert help in refused(write(tmp_path, name, "x"), "E370").help


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "calibration.jsonl", "{}")
    assert "calibration.jsonl" in refused(tmp_path / "calibratoin.jsonl", "E370").help
    refused("./nowhere.jsonl", "E370")
    refused("not a path and not an id?", "E370")
    refused("  ", "E222", UsageError)


def test_size_is_bounded_before_anything_is_read(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"text": "a"}\n' * 100)
    assert "1,400 bytes" in refused(file, "E373", limit_bytes=1399).message
    assert len(read_records(str(file), limit_bytes=1400).records) == 100
    sparse = tmp_path / "big.jsonl"
    with sparse.open("wb") as stream:
        stream.truncate(10**12)
    refused(sparse, "E373")


def test_special_files_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", "E306")


def test_a_text_file_is_one_record(tmp_path):
    found = read_records(str(write(tmp_path, "a.md", "one\r\ntwo\n")))
    assert [r.values for r in found.records] == [{"text": "one\ntwo\n"}] and found.kind == "text"


# --- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_names_and_says_what_it_left_out(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    b = write(folder, "b.jsonl", '{"text": "b"}\n')
    a = write(folder, "a.json", '[{"text": "a"}]')
    write(folder, "README.md", "about")
    write(folder, ".hidden.jsonl", "broken")
    (folder / "deeper").mkdir()
    found = read_records(str(folder))
    assert [r.values["text"] for r in found.records] == ["a", "b"]
    assert [r.file for r in found.records] == [str(a), str(b)]
    assert found.label == "set" and found.kind == "mixed"
    assert found.notes == ("set: 2 other entries of the folder were not read (README.md, deeper)",)
    listing = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in (a, b))
    assert found.sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_a_folder_of_texts_alone_is_read(tmp_path):
    write(tmp_path, "b.txt", "B")
    write(tmp_path, "a.md", "A")
    assert [r.values["text"] for r in read_records(str(tmp_path)).records] == ["A", "B"]


def test_bad_files_of_a_folder_are_reported_together(tmp_path):
    write(tmp_path, "a.jsonl", "x\n")
    write(tmp_path, "b.jsonl", '{"a": 1}\n{\n')
    error = refused(tmp_path, "E371")
    assert [(os.path.basename(e.where.file), e.where.line) for e in (error, *error.others)] == [
        ("a.jsonl", 1),
        ("b.jsonl", 2),
    ]


def test_a_folder_without_anything_to_read_is_refused(tmp_path):
    refused(tmp_path, "E370")
    write(tmp_path, "model.bin", "x")
    refused(tmp_path, "E370")
    write(tmp_path, "a.jsonl.gz", "x")
    assert "gunzip" in refused(tmp_path, "E370").help


def test_the_size_limit_holds_for_a_folder_as_a_whole(tmp_path):
    for name in "abc":
        write(tmp_path, f"{name}.txt", "x" * 100)
    assert len(read_records(str(tmp_path), limit_bytes=300).records) == 3
    refused(tmp_path, "E373", limit_bytes=299)


# --- parquet and datasets --------------------------------------------------------------------------

ROWS = [{"question": f"q{i}", "answer": f"a{i}", "n": i, "tags": ["x"] * (i % 3)} for i in range(2500)]


def test_parquet_rows_are_records(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), file, row_group_size=700)
    found = read_records(str(file))
    assert [r.values for r in found.records] == ROWS
    assert [r.line for r in found.records] == list(range(1, 2501))
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() and found.kind == "parquet"
    refused(file, "E373", limit_bytes=file.stat().st_size)  # it fits packed, not unpacked
    file.write_bytes(file.read_bytes()[:-9])
    refused(file, "E371")
    refused(write(tmp_path, "b.parquet", b"PAR1xxxxPAR1"), "E371")
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), file)
    refused(file, "E372")


def test_without_pyarrow_the_way_to_get_it_is_named(tmp_path, monkeypatch):
    import importlib.util as util

    file = write(tmp_path, "a.parquet", b"PAR1")
    known = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == "pyarrow" else known(name, *rest)
    )
    assert "pip install pyarrow" in refused(file, "E512", EnvironmentFault).help


IN_CACHE = """
import sys
import datasets
from datasets import Dataset, DatasetDict
rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(7)]
# what load_dataset("org/Tiny-Sums", "main") leaves behind, made without the network
from datasets.builder import GeneratorBasedBuilder
class TinySums(GeneratorBasedBuilder):
    VERSION = datasets.Version("0.0.0")
    BUILDER_CONFIGS = [datasets.BuilderConfig(name=n) for n in sys.argv[1:]]
    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string")}))
    def _split_generators(self, manager):
        return [datasets.SplitGenerator("test", {"n": 3}), datasets.SplitGenerator("train", {"n": 7})]
    def _generate_examples(self, n):
        yield from enumerate(rows[:n])
for name in sys.argv[1:]:
    TinySums(dataset_name="Tiny-Sums", repo_id="org/Tiny-Sums", config_name=name, hash="0" * 40).download_and_prepare()
"""
READ = """
import json, sys
from surgeon.data.records import read_records
from surgeon.errors import SurgeonError
answers = []
for source, split in json.loads(sys.argv[1]):
    try:
        found = read_records(source, split=split)
        answers.append([found.label, found.kind, found.sha256, [r.values for r in found.records], list(found.notes)])
    except SurgeonError as error:
        answers.append([error.code, error.message, error.help])
print("ANSWERS" + json.dumps(answers))
"""
DAMAGE = """
import pathlib, sys
for info in pathlib.Path(sys.argv[1]).rglob("main/*/*/dataset_info.json"):
    info.write_text("{")
"""


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_read_from_the_local_cache(tmp_path):
    """In processes of their own: the datasets library fixes its cache folder when it is imported."""
    pytest.importorskip("datasets")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", IN_CACHE, "main", "socratic"], env=environment, check=True, capture_output=True
    )
    wanted = [["org/Tiny-Sums:main", None], ["org/Tiny-Sums:main:test", None], ["org/Tiny-Sums:main", "train[:2]"], ["org/Tiny-Sums", None],
              ["org/Tiny-Sums:main", "validation"], ["org/Other", None], ["org/Tiny-Sums:absent", None], ["org/Tiny-Sums:main:test", "train"]]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(wanted)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    whole, test, two, ambiguous, no_split, absent, no_config, twice = json.loads(
        done.stdout.partition("ANSWERS")[2]
    )
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(7)]
    canonical = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    assert whole == [
        "org/Tiny-Sums:main",
        "dataset",
        hashlib.sha256(canonical.encode()).hexdigest(),
        rows,
        ['org/Tiny-Sums:main: split "train"'],
    ]
    assert test[3] == rows[:3] and two[3] == rows[:2]
    assert (
        ambiguous[0] == "E379"
        and "org/Tiny-Sums:main" in ambiguous[2]
        and "org/Tiny-Sums:socratic" in ambiguous[2]
    )
    assert no_split[0] == "E379" and "test, train" in no_split[2]
    assert absent[0] == "E521" and "load_dataset('org/Other'" in absent[2]
    assert no_config[0] == "E521" and "load_dataset('org/Tiny-Sums', 'absent'" in no_config[2]
    assert twice[0] == "E222"
    assert str(tmp_path) not in done.stderr  # the library is not to tell its paths
    subprocess.run([sys.executable, "-c", DAMAGE, str(tmp_path)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(wanted[:1])],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.partition("ANSWERS")[2])[0][0] == "E379"


@pytest.mark.slow
def test_folders_of_save_to_disk_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS[:5])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([3, 1])}).save_to_disk(str(tmp_path / "both"))
    assert [r.values for r in read_records(str(tmp_path / "one")).records] == ROWS[:5]
    assert [r.values for r in read_records(str(tmp_path / "both"), split="test").records] == [
        ROWS[3],
        ROWS[1],
    ]
    assert len(read_records(str(tmp_path / "both")).records) == 5
    refused(tmp_path / "both", "E379", split="dev")
    refused(tmp_path / "one", "E373", limit_bytes=50)


# --- sources of the command line -------------------------------------------------------------------


def test_domains_are_taken_from_name_equals_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "odd=name.txt", "x")
    given = [
        "code=a.jsonl",
        "b.jsonl",
        "long math=c.jsonl",
        "odd=name.txt",
        "./x=y.jsonl",
        "math=org/set:main:train",
    ]
    assert parse_sources(given) == [("code", "a.jsonl"), (None, "b.jsonl"), ("long math", "c.jsonl"), (None, "odd=name.txt"),
                                    (None, "./x=y.jsonl"), ("math", "org/set:main:train")]  # fmt: skip


@pytest.mark.parametrize("given", [["=a.jsonl"], ["code="], [""], ["a.jsonl", "a.jsonl"], ["?=a.jsonl"]])
def test_a_source_that_names_nothing_is_refused(given):
    with pytest.raises(UsageError) as caught:
        parse_sources(given)
    assert caught.value.code == "E222"


def test_reading_records_loads_no_heavy_library():
    code = "import sys, surgeon.data.records, surgeon.data.strict_lines, surgeon.data.tables; print('numpy' in sys.modules, 'pyarrow' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["False", "False"]
