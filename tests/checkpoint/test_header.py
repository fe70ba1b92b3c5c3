"""Faults B1-B7 and B10: whatever a weight file says, it is parsed or refused by name, cheaply."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time

import forge
import kit
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgeon.checkpoint import header as module
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.header import printable, read_header
from surgeon.errors import InputError

CODES = {"E301", "E303", "E304", "E306", "E307"}


def refusal(tmp_path, content: bytes, name: str = "x.safetensors") -> InputError:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(file)
    error = caught.value
    assert error.exit_code == 3 and error.code in CODES
    assert name in error.message and error.where.file == str(file)
    assert error.help
    assert len(str(error)) < 1000
    return error


def one(dtype="F32", shape=(2,), offsets=None, name="w", **fields):
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets or [0, 8], **fields}
    return json.dumps({name: entry}).encode()


GOOD = forge.weight_file({"a": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.ones(4, "<f8")})


def test_B1_a_well_formed_file_is_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    found = read_header(tmp_path / "x.safetensors")
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F64", (4,), 32),
    }
    assert found.metadata == {"format": "pt"}


def test_B1_cut_anywhere_or_extended(tmp_path):
    for length in range(len(GOOD)):
        error = refusal(tmp_path, GOOD[:length])
        assert error.code == "E303", (length, str(error))
        assert "fetch" in error.help
    for extra in (b"\0", b"\0" * 8, b"x" * 5000):
        error = refusal(tmp_path, GOOD + extra)
        assert error.code == "E303" and f"{len(extra):,} bytes after" in error.message


def test_B1_sizes_are_named(tmp_path):
    error = refusal(tmp_path, GOOD[:-10])
    assert "truncated" in error.message and "56" in error.message and "46" in error.message


def test_B1_git_lfs_pointer_has_its_own_sentence(tmp_path):
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    error = refusal(tmp_path, text)
    assert "Git LFS" in error.message and "git lfs pull" in error.help


def test_B1_a_file_that_was_never_finished(tmp_path):
    error = refusal(tmp_path, bytes(8) + GOOD[8:])
    assert "never finished" in error.message


@pytest.mark.parametrize(
    "length", [2**63, 2**64 - 1, 2**63 - 1, 100_000_001, 10**9, len(GOOD), len(GOOD) - 7]
)
def test_B2_header_lengths_that_cannot_be(tmp_path, length):
    with kit.time_limit(5):
        refusal(tmp_path, forge.raw_file(GOOD[8:], b"", length))


def test_B2_the_limit_is_checked_before_anything_is_read(tmp_path):
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with kit.time_limit(2), pytest.raises(InputError, match="exceeds the format's limit"):
        read_header(file)


BOMBS = {
    "empty tensors": lambda n: b"{" + b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(n)) + b"}",
    "metadata": lambda n: b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(n)) + b"}}",
    "empty lists": lambda n: b'{"a":[' + b",".join([b"[]"] * n) + b"]}",
    "empty objects": lambda n: b'{"a":[' + b",".join([b"{}"] * n) + b"]}",
    "numbers": lambda n: b'{"a":[' + b",".join([b"1"] * n) + b"]}",
    "deep": lambda n: b'{"a":' + b"[" * n + b"]" * n + b"}",
    "deep objects": lambda n: b'{"a":' * n + b"1" + b"}" * n,
    "digits": lambda n: b'{"a":' + b"9" * n + b"}",
    "one long name": lambda n: b'{"' + b"a" * n + b'":1}',
    "twins of a long name": lambda n: b'{"%s":1,"%s":1}' % (b"a" * n, b"a" * n),
}  # fmt: skip
_MEASURED = """
import sys, resource, time
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from surgeon.checkpoint.header import read_header
from surgeon.errors import InputError
begin = time.process_time()
try:
    found = read_header(sys.argv[1])
    print("accepted", len(found.tensors), time.process_time() - begin)
except InputError as error:
    print("refused", error.code, time.process_time() - begin)
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_B3_bombs_cost_little(tmp_path, kind):
    """30 MB of header, under 1 GiB of address space and a few seconds of processor time."""
    unit = len(BOMBS[kind](1001)) - len(BOMBS[kind](1))
    count = 60_000 if kind == "empty tensors" else 30_000_000 * 1000 // unit
    text = BOMBS[kind](count)
    file = tmp_path / "x.safetensors"
    file.write_bytes(forge.raw_file(text))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(file)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(kit.REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    verdict, _, seconds = done.stdout.split()
    assert verdict == ("accepted" if kind == "empty tensors" else "refused"), done.stdout
    assert float(seconds) < 8, done.stdout


def test_B3_limits_on_names_and_counts(tmp_path, monkeypatch):
    assert "1,025 characters" in refusal(tmp_path, forge.raw_file(one(name="n" * 1025), bytes(8))).message
    monkeypatch.setattr(module, "MAX_TENSORS", 3)
    text = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(6)}
    assert "more than 3 tensors" in refusal(tmp_path, forge.raw_file(text)).message


@pytest.mark.parametrize(
    "other",
    ['{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', '{"dtype":"I32","shape":[2],"data_offsets":[0,8]}'],
)
def test_B4_duplicate_names_even_identical_ones(tmp_path, other):
    text = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":' + other + "}"
    assert '"w" occurs twice' in refusal(tmp_path, forge.raw_file(text, bytes(8))).message


def test_B4_duplicates_inside_entries_and_metadata(tmp_path):
    for text in (
        '{"__metadata__":{"a":"1","a":"1"}}',
        '{"__metadata__":{},"__metadata__":{}}',
        '{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"\\u0077":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    ):
        assert "occurs twice" in refusal(tmp_path, forge.raw_file(text, bytes(8))).message


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets", "size"),
    [
        ("F32", [2], [0, 7], 7), ("F32", [2], [0, 9], 9), ("F32", [2], [8, 0], 8), ("F32", [2], [-8, 0], 8),
        ("F32", [-2], [0, 8], 8), ("F32", [-1, -2], [0, 8], 8), ("F32", [2**62, 4], [0, 0], 0), ("F32", [2**63], [0, 8], 8),
        ("F32", [2**32, 2**32], [0, 0], 0), ("F32", [True, 2], [0, 8], 8), ("F32", [2.0], [0, 8], 8), ("F32", ["2"], [0, 8], 8),
        ("F32", None, [0, 8], 8), ("F32", {}, [0, 8], 8), ("F32", [2], [0, 8, 8], 8), ("F32", [2], [0], 8), ("F32", [2], "0,8", 8),
        ("F32", [2], [0.0, 8], 8), ("F32", [2], [False, 8], 8), ("F4", [3], [0, 2], 2), ("F6_E2M3", [3], [0, 2], 2),
        ("F32", [1] * 65, [0, 4], 4), ("F32", [2], [8, 16], 16), ("F32", [2], [0, 2**63], 8),
    ],
)  # fmt: skip
def test_B5_sizes_that_do_not_fit(tmp_path, dtype, shape, offsets, size):
    text = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})
    error = refusal(tmp_path, forge.raw_file(text, bytes(size)))
    assert error.where.tensor == "w" or error.code == "E303"


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(0, 8), (4, 12)], "overlap"),
        ([(0, 8), (0, 8)], "overlap"),
        ([(0, 8), (12, 20)], "hole of 4"),
        ([(4, 12)], "hole of 4"),
        ([(0, 8), (8, 16), (12, 20)], "overlap"),
    ],
)
def test_B5_overlaps_and_holes(tmp_path, spans, reason):
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]}
        for i, (a, b) in enumerate(spans)
    }
    assert reason in refusal(tmp_path, forge.raw_file(entries, bytes(max(b for _, b in spans)))).message


def test_B5_empty_and_scalar_tensors_are_fine(tmp_path):
    entries = {
        "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "late": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
    }
    (tmp_path / "x.safetensors").write_bytes(forge.raw_file(entries, bytes(4)))
    assert len(read_header(tmp_path / "x.safetensors").tensors) == 3


def tiles(spans: list[tuple[int, int]], size: int) -> bool:
    """The independent definition: every byte of [0, size) belongs to exactly one span."""
    counts = [0] * size
    for begin, end in spans:
        if not 0 <= begin <= end <= size:
            return False
        for place in range(begin, end):
            counts[place] += 1
    inside = all(
        not (begin == end and 0 < begin < size and _strictly_inside(begin, spans)) for begin, end in spans
    )
    return all(count == 1 for count in counts) and inside


def _strictly_inside(place: int, spans) -> bool:
    return any(begin < place < end for begin, end in spans)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5), st.integers(0, 12))
def test_B5_accepts_exactly_the_tilings(tmp_path_factory, spans, size):
    file = tmp_path_factory.getbasetemp() / "tiling.safetensors"
    entries = {
        f"t{i}": {"dtype": "U8", "shape": [max(0, b - a)], "data_offsets": [a, b]}
        for i, (a, b) in enumerate(spans)
    }
    file.write_bytes(forge.raw_file(entries, bytes(size)))
    try:
        read_header(file)
        accepted = True
    except InputError:
        accepted = False
    assert accepted == tiles(spans, size)


@pytest.mark.parametrize("code", ["F128", "f32", "BF32", "", "F8", "INT4", "E\x1b[2J", "Q4_K"])
def test_B6_unknown_types_are_named_with_the_known_ones(tmp_path, code):
    error = refusal(tmp_path, forge.raw_file(one(dtype=code), bytes(8)))
    assert error.code == "E307" and error.where.tensor == "w" and "BF16" in error.help
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("code", sorted(forge.WIDTH))
def test_B6_every_known_type_opens(tmp_path, code):
    count = 8
    size = count * forge.WIDTH[code] // 8
    file = tmp_path / "x.safetensors"
    file.write_bytes(forge.raw_file(one(dtype=code, shape=[count], offsets=[0, size]), bytes(size)))
    found = open_path(file)
    assert found.tensors["w"].nbytes == size
    if code in {"F4", "F6_E2M3", "F6_E3M2"}:
        with pytest.raises(InputError) as caught:
            found.read("w", 0, count)
        assert caught.value.code == "E307"
    else:
        assert len(found.read("w", 0, count)) == count
    assert len(found.read_bytes("w", 0, size)) == size


@pytest.mark.parametrize(
    "text",
    [
        one(extra=1), b" " + one(), b"\n" + one(), one() + b"x", b"[]", b"1", b'""', b"null", b"{", b"{}}", b"\xff\xfe{}",
        b'{"w":1}', b'{"w":null}', b'{"w":{}}', b'{"__metadata__":{"a":1}}', b'{"__metadata__":[]}', b'{"__metadata__":null}',
        b'{"__metadata__":{"a":NaN}}', b'{"w":Infinity}', one() + b"\0", b"{'w':1}", b'{"w":1,}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_B7_malformed_headers(tmp_path, text):
    assert refusal(tmp_path, forge.raw_file(text, bytes(8))).code == "E304"


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", "a\x1b[31mb", "\x7f", "\ud800"]
)
def test_B7_G7_names_like_paths_or_control_sequences(tmp_path, name):
    error = refusal(tmp_path, forge.raw_file(one(name=name), bytes(8)))
    assert error.code == "E304"
    assert str(error).isprintable()


def test_B7_trailing_blanks_are_fine(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(forge.raw_file(one() + b"   \n ", bytes(8)))
    assert read_header(tmp_path / "x.safetensors").tensors["w"].nbytes == 8


def test_G7_control_characters_in_messages(tmp_path):
    keys = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "\x1b]0;title\x07": 1}
    assert str(refusal(tmp_path, forge.raw_file({"w": keys}, bytes(8)))).isprintable()
    twins = b'{"a\\u001b[2J":1,"a\\u001b[2J":1}'
    assert str(refusal(tmp_path, forge.raw_file(twins))).isprintable()
    assert printable("a\x1b[31m\u202eb\u200b") == "a\\x1b[31m\\u202eb\\u200b"


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device", "loop", "dangling", "proc", "absent"])
def test_B10_what_is_no_regular_file_is_refused_without_blocking(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.safetensors"
    holder = None
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        holder = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(tmp_path)
        holder.bind("x.safetensors")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "absent")
    elif kind == "proc":
        path.symlink_to("/proc/self/environ")
    try:
        with kit.time_limit(3), pytest.raises(InputError) as caught:
            read_header(path)
    finally:
        if holder is not None:
            holder.close()
    assert caught.value.code in {"E301", "E303", "E306"}


# --- any bytes ----------------------------------------------------------------------------------


def parse_or_name(file, content: bytes) -> bool:
    """Parse, or fail with a named error that can be shown; in bounded time."""
    file.write_bytes(content)
    begin = time.perf_counter()
    try:
        found = read_header(file)
    except InputError as error:
        assert error.code in CODES and str(error).isprintable() and len(str(error)) < 1000
        accepted = False
    else:
        accepted = True
        for info in found.tensors.values():
            assert 0 <= info.offset <= info.offset + info.nbytes <= len(content)
            assert math.prod(info.shape) * forge.WIDTH[info.dtype] == info.nbytes * 8
    assert time.perf_counter() - begin < 5
    return accepted


def agree(file, content: bytes) -> None:
    """What both we and the official reader accept means the same; what it refuses, we refuse."""
    import safetensors

    accepted = parse_or_name(file, content)
    try:
        official = dict(safetensors.deserialize(content))
    except Exception:
        # -0 is the one number that Python's json reads as an integer and the official reader does not.
        assert not accepted or b"-0" in content
        return
    if not accepted:
        return
    ours = read_header(file).tensors
    assert {n: (t.dtype, list(t.shape), t.nbytes) for n, t in ours.items()} == {
        n: (t["dtype"], t["shape"], len(t["data"])) for n, t in official.items()
    }
    for name, info in ours.items():
        assert content[info.offset : info.offset + info.nbytes] == bytes(official[name]["data"])


QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(content=forge.damaged_files() | st.binary(max_size=200))
def test_B5_B7_any_bytes_parse_or_are_named(tmp_path_factory, content):
    parse_or_name(tmp_path_factory.getbasetemp() / "any.safetensors", content)


@QUICK
@given(content=forge.damaged_files() | forge.tensor_tables().map(forge.weight_file))
def test_B5_B7_agreement_with_the_official_reader(tmp_path_factory, content):
    agree(tmp_path_factory.getbasetemp() / "both.safetensors", content)


@pytest.mark.slow
@LONG
@given(content=forge.damaged_files() | st.binary(max_size=400) | forge.tensor_tables().map(forge.weight_file))
def test_B5_B7_long_fuzzing(tmp_path_factory, content):
    agree(tmp_path_factory.getbasetemp() / "long.safetensors", content)
