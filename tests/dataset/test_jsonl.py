"""JSONL files: which rows they hold, what a broken one is called, and when the index is made anew."""

import csv
import errno
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import temporary_name
from dataset.read import jsonl
from dataset.read import text as plain_text
from dataset.read.jsonl import Head, Jsonl
from dataset.read.parse import parse_row
from dataset.read.row_errors import RowErrors
from dataset.read.text import TextFile
from dataset.tokens import cache
from dataset.tokens.cache import Mapped, get_or_build


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def test_a_row_is_a_line_that_is_not_blank_and_knows_its_number(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"n": 1}\n\n  \t\n{"n": 2}\r\n\r\n  {"n": 3}')
    rows = Jsonl(file)
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert [rows.line(i) for i in range(3)] == [1, 4, 6]
    assert rows.where(2) == f"{file}:6"


def test_a_byte_order_mark_may_stand_at_the_start(tmp_path):
    assert Jsonl(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n'))[0] == {"n": 1}
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no rows"):
        Jsonl(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf\n\n"))


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.sampled_from([b"{}", b"", b" ", b"\t", b' {"a": 1}', b"x" * 9]), max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 12),
)
def test_the_index_agrees_with_splitting_the_file_wherever_a_block_ends(lines, newline, last, block):
    data = newline.join(lines) + (newline if last else b"")

    class File(io.BytesIO):  # gives `block` bytes at a time
        def readinto(self, buffer):
            piece = self.read(block)
            buffer[: len(piece)] = piece
            return len(piece)

    out = io.BytesIO(), io.BytesIO()
    rows, digest = jsonl.index_lines(File(data), *out)
    assert digest == hashlib.sha256(data).hexdigest()
    starts, numbers = (np.frombuffer(own.getvalue(), np.int64) for own in out)
    expected = [(n, line.strip()) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    found = [data[a:b].split(b"\n")[0].strip() for a, b in zip(starts[:-1], starts[1:])]
    assert list(zip(numbers.tolist(), found)) == expected and rows == len(expected)
    assert starts[-1] == len(data)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b'{"text": "a}', "broken JSON at column 10: Unterminated string; it is cut off, or goes on in the next line"),
        (
            b'{"data": [{"text": "a"},',
            "broken JSON at column 25: Expecting value; it is cut off, or goes on in the next",
        ),
        (b"# Sparrow", "it begins with '# Sparrow', and a row is an object {...}; plain text"),
        (b"question,answer", "it begins with 'question,answer'"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON at column 15: Extra data"),
        (b"{'text': 'a'}", "broken JSON at column 2"),
        (b'{"text": "a\x00b"}', "a NUL character at column 12"),
        (b"\x00\x00\x00\x00", "a NUL character at column 1; was the file cut off"),
        ('{"text": "麻雀"}'.encode("gbk"), "not UTF-8 at byte 11; it looks like gbk: convert with `iconv"),
        ('{"text": "麻雀"}'.encode("utf-16-le"), "it is no text, or UTF-16 without its mark"),
        (b"\xff\xff\xff\xff\x10\x00\x00\x00", "not UTF-8 at byte 1; it is no text, or"),  # an Arrow file
        ('{"text": "麻雀"}'.encode("utf-16"), "not UTF-8 at byte 1; it looks like UTF-16 text"),
        (b"\x1f\x8b\x08\x00", "it looks like a gzip file"),
        (b'{"text": "\xff\xff\xff"}', "not UTF-8 at byte 11; save the file as UTF-8"),
        (b'["text"]', "a row must be an object {...}, this is list"),
        (b'"text"', "a row must be an object {...}, this is str"),
        (b"null", "a row must be an object {...}, this is NoneType"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path, data, reason):
    file = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + data + b"\n")
    with pytest.raises(ValueError) as error:
        Jsonl(file)[1]
    assert str(error.value).startswith(f"{file}:3: ") and reason in str(error.value)


def test_a_pair_of_surrogates_and_a_long_line_are_fine():
    assert parse_row(b'{"text": "\\ud83d\\ude00"}') == {"text": "😀"}
    assert len(parse_row(b'{"text": "' + b"a" * 5_000_000 + b'"}')["text"]) == 5_000_000


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.parquet", b"PAR1\x15\x04", "is a Parquet file, and JSONL in UTF-8 is needed; convert it: python -c"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "is a gzip file, .*: gunzip -k .*a.jsonl.gz$"),
        (
            "a.jsonl",
            '{"text": "麻雀"}'.encode("utf-16"),
            "is UTF-16 text, .*: iconv -f utf-16 .*a.jsonl > .*a.utf8.jsonl$",
        ),
        ("a b.jsonl", "{}".encode("utf-16"), "iconv -f utf-16 -t utf-8 '.*a b.jsonl' > '.*a b.utf8.jsonl'$"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "is a zstd file, .*: unzstd .*a.jsonl.zst$"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00", "is an xz file, .*: unxz -k .*a.jsonl.xz$"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, .*: git lfs pull$"),
    ],
)
def test_a_file_of_another_format_says_what_makes_text_of_it(tmp_path, name, data, reason):
    """A .parquet file was called broken JSON."""
    with pytest.raises(ValueError, match=reason):
        Jsonl(write(tmp_path / name, data))
    assert os.listdir(tmp_path) == [name], "decided at its head"


@pytest.mark.parametrize("suffix, between", [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_the_command_for_tables_works(tmp_path, suffix, between):
    """A .csv file was called broken JSON."""
    rows = [{"问题": 'Say "麻雀", please', "回答": "麻雀\n" + "x" * 200_000}, {"问题": "1+1?", "回答": "2"}]
    with open(tmp_path / f"我 a{suffix}", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter=between)
        table.writeheader()
        table.writerows(rows)
    with pytest.raises(ValueError, match="is a table, and JSONL is needed; convert it: ") as error:
        Jsonl(tmp_path / f"我 a{suffix}")
    command = str(error.value).partition("convert it: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert list(Jsonl(tmp_path / "我 a.jsonl")) == rows
    (tmp_path / "我 a.jsonl").write_text('{"text": "mine"}', encoding="utf-8")
    assert subprocess.run(f"{sys.executable} {command}", shell=True, capture_output=True).returncode
    assert list(Jsonl(tmp_path / "我 a.jsonl")) == [{"text": "mine"}], "what was there before stays"


def test_rows_in_a_file_that_is_called_csv_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeff{"text": "a"}\n', encoding="utf-8")
    assert list(Jsonl(tmp_path / "a.csv")) == [{"text": "a"}]


def test_the_command_for_parquet_works(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [{"messages": [{"role": "user", "content": 'Say "麻雀".\n'}], "n": n} for n in range(3)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        Jsonl(tmp_path / "a.parquet")
    command = str(error.value).partition("convert it: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    found = Jsonl(tmp_path / "a.jsonl")
    assert [found[i] for i in range(len(found))] == rows


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no rows, the file is empty"):
        Jsonl(write(tmp_path / "a.jsonl", b""))


def test_a_message_of_pythons_does_not_end_in_the_air(tmp_path):
    """Python's text goes on with a place, which ours has named already: "Unterminated string starting at"."""
    for row, reason in ((b'{"text": "a', "Unterminated string"), (b'{"text": "a\x01"}', "Invalid control character")):
        with pytest.raises(ValueError, match=rf":1: broken JSON at column \d+: {reason}(;|$)"):
            Jsonl(write(tmp_path / "a.jsonl", row))[0]


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "pretrain_hq.jsonl", b"{}")
    with pytest.raises(FileNotFoundError, match=r"no such file; did you mean .*pretrain_hq\.jsonl\?"):
        Jsonl(tmp_path / "pretrian_hq.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no such file$"):  # .jsonl alone is no likeness
        Jsonl(write(tmp_path / "val.jsonl", b"{}").with_name("new.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        Jsonl(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(IsADirectoryError, match="name the files in it"):
        Jsonl(tmp_path)


# ---- .json arrays


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.text(), st.lists(st.floats(-9, 9))))),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([1, 2, 3, 7, 1 << 20]),
)
def test_an_array_gives_its_elements_whatever_their_layout(tmp_path_factory, elements, indent, window):
    with pytest.MonkeyPatch.context() as patch:  # wherever the window ends, more is read before there is an error
        patch.setattr(jsonl, "WINDOW", window)
        _check_array(tmp_path_factory, elements, indent)


def _check_array(tmp_path_factory, elements, indent):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(elements, indent=indent, ensure_ascii=False), encoding="utf-8")
    out = io.BytesIO(), io.BytesIO()
    count = jsonl.array_to_jsonl(path, path.with_suffix(".jsonl"), *out)
    starts, lines = (np.frombuffer(own.getvalue(), np.int64) for own in out)
    written = path.with_suffix(".jsonl").read_bytes()
    assert [json.loads(written[a:b]) for a, b in zip(starts, starts[1:])] == elements
    assert len(lines) == len(elements) == count


def test_an_array_is_rewritten_once_and_errors_keep_its_line_numbers(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text('[\n {"n": 1},\n {"n": "麻雀"}\n,\n 7\n]\n', encoding="utf-8")
    assert [Jsonl(file)[0], Jsonl(file)[1]] == [{"n": 1}, {"n": "麻雀"}]
    monkeypatch.setattr(jsonl, "array_to_jsonl", None)  # may not be called again
    assert Jsonl(file).where(1) == f"{file}:3"
    with pytest.raises(ValueError, match=r"a\.json:5: a row must be an object"):
        Jsonl(file)[2]


@pytest.mark.parametrize(
    "text, line", [('[{"n": 1},\n{"n": }]', 2), ('[{"n": 1}\n\n{"n": 2}]', 3), ('[{"n": 1},', 1), ("[", 1)]
)
def test_a_broken_array_is_named_by_line(tmp_path, text, line):
    with pytest.raises(ValueError, match=rf"a\.json:{line}: broken JSON"):
        Jsonl(write(tmp_path / "a.json", text.encode()))
    assert os.listdir(tmp_path) == ["a.json"], "what is refused leaves no cache"


def test_a_syntax_error_in_an_array_is_found_where_it_stands(tmp_path, monkeypatch):
    """All of the file was read before, as if more text could make it right."""
    monkeypatch.setattr(jsonl, "WINDOW", 64)
    monkeypatch.setattr(jsonl, "hash_file", None)  # may not be called
    read = []
    more = jsonl._ArrayReader.more
    monkeypatch.setattr(jsonl._ArrayReader, "more", lambda self: read.append(1) or more(self))
    file = write(tmp_path / "a.json", b'[{"n": 1},\n{"n": 1 "m": 2},\n' + b'{"n": 1},\n' * 10_000 + b'{"n": 1}]')
    with pytest.raises(ValueError, match=r"a\.json:2: broken JSON: Expecting ',' delimiter"):
        Jsonl(file)
    assert len(read) == 1


def test_a_pretty_printed_array_is_not_indexed_by_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "index_lines", None)  # may not be called
    file = write(tmp_path / "a.json", json.dumps([{"n": i} for i in range(5)], indent=2).encode())
    assert len(Jsonl(file)) == 5 and Jsonl(file).content == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_a_file_holds_decides_not_its_name(tmp_path):
    """Many data sets keep JSONL in a .json file."""
    assert len(Jsonl(write(tmp_path / "a.json", b'{"n": 1}\n{"n": 2}\n'))) == 2
    assert len(Jsonl(write(tmp_path / "b.jsonl", b'\n[{"n": 1}, {"n": 2}]'))) == 2


# ---- the cache


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", b'{"n": 1}\n')
    scans = []
    index_lines = jsonl.index_lines
    monkeypatch.setattr(jsonl, "index_lines", lambda *given: scans.append(1) or index_lines(*given))
    assert Jsonl(file)[0] == Jsonl(file)[0] == {"n": 1} and len(scans) == 1
    state = os.stat(file)
    write(file, b'{"n": 2}\n')
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time: the ends tell
    assert Jsonl(file)[0] == {"n": 2} and len(scans) == 2
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert Jsonl(file)[0] == {"n": 2} and len(scans) == 3
    write(file, b'{"n": 2}\n{"n": 3}\n')
    assert len(Jsonl(file)) == 2 and len(scans) == 4
    assert len(list((tmp_path / ".cache").iterdir())) == 1, "what belonged to earlier contents is gone, and every lock"


def test_cache_dir_is_used_and_a_read_only_folder_left_alone(tmp_path, monkeypatch):
    data, home = tmp_path / "data", tmp_path / "home"
    data.mkdir()
    file = write(data / "a.jsonl", b"{}")
    Jsonl(file, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and os.listdir(data) == ["a.jsonl"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    data.chmod(0o555)
    try:
        Jsonl(file)
        assert os.listdir(data) == ["a.jsonl"] and (home / "sparrow").is_dir()
    finally:
        data.chmod(0o755)


def test_a_build_that_fails_leaves_nothing_and_a_damaged_entry_is_built_again(tmp_path):
    def build(folder):
        (folder / "big").write_bytes(b"12345678")
        return {"source": "s", "content": "c"}

    def killed(folder):
        build(folder)
        raise KeyboardInterrupt

    root = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        get_or_build(root, "a-tokens-1", killed)
    assert not (tmp_path / "cache").exists(), "nor the cache's folder, which was made for it"
    root.mkdir()
    temporary_name(root / "a-tokens-1").mkdir()  # what a process leaves that was killed for good
    folder, _ = get_or_build(root, "a-tokens-1", build)
    assert sorted(os.listdir(root)) == ["a-tokens-1"]
    damages = [lambda: (folder / "big").write_bytes(b"123"), lambda: (folder / "facts.json").unlink()]
    for other in ("[]", "7", '{"files": []}', '{"files": {}}', '{"source": "s", "content": "c", "files": {"big": []}}'):
        damages.append(functools.partial((folder / "facts.json").write_text, other))  # JSON, but not what is written
    for damage in damages:
        damage()
        assert cache.entries(root) == []
        assert (get_or_build(root, "a-tokens-1", build)[0] / "big").read_bytes() == b"12345678"
    assert get_or_build(root, "a-tokens-1", None)[1]["content"] == "c"


def test_one_builds_and_the_others_wait(tmp_path, capfd):
    builds = []

    def build(folder):
        builds.append(folder)
        time.sleep(0.2)
        (folder / "x").write_bytes(b"x")
        return {"source": "s", "content": "c"}

    threads = [threading.Thread(target=get_or_build, args=(tmp_path, "a-tokens-1", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(builds) == 1 and "waiting for the process that is building it" in capfd.readouterr().err


def test_who_is_interrupted_while_waiting_leaves_the_builder_its_lock(tmp_path, monkeypatch):
    """It removed the lock file, and whoever came next built the same entry beside the first one."""
    from filelock import FileLock

    acquire, ends = FileLock.acquire, threading.Event()

    def interrupted(self, timeout=None):
        if timeout is None:
            raise KeyboardInterrupt
        return acquire(self, timeout)

    def build(folder):
        ends.wait(10)
        return {"source": "s", "content": "c"}

    monkeypatch.setattr(FileLock, "acquire", interrupted)
    builder = threading.Thread(target=get_or_build, args=(tmp_path, "a-tokens-1", build))
    builder.start()
    while not list(tmp_path.glob(".*")):
        time.sleep(0.01)  # until it builds
    with pytest.raises(KeyboardInterrupt):
        get_or_build(tmp_path, "a-tokens-1", None)
    assert (tmp_path / "a-tokens-1.lock").exists()
    ends.set()
    builder.join(10)
    assert os.listdir(tmp_path) == ["a-tokens-1"]


@pytest.mark.skipif(os.name != "posix", reason="asks whether a process lives")
def test_without_locks_what_another_process_is_building_is_left_alone(tmp_path, monkeypatch):
    """On drives without locks two processes build the same entry at the same time. Cleaning up after killed processes
    must not remove the half-built folder of one that lives: here our parent's."""
    from filelock import FileLock

    def refuse(self, timeout=None):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    ours = temporary_name(tmp_path / "a-tokens-1").name
    theirs = tmp_path / ours.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")
    theirs.mkdir()
    get_or_build(tmp_path, "a-tokens-1", lambda folder: {"source": "s", "content": "c"})
    assert sorted(os.listdir(tmp_path)) == [theirs.name, "a-tokens-1"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status") or not hasattr(cache.mmap, "MADV_DONTNEED"), reason="Linux")
def test_reading_a_large_file_does_not_take_its_size_in_memory(tmp_path):
    def mapped_mib():
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssFile")) / 1024

    np.arange(12 << 20, dtype=np.int64).tofile(tmp_path / "big")  # 96 MiB
    numbers, before, most = Mapped(tmp_path / "big", np.int64), mapped_mib(), 0.0
    for start in range(0, len(numbers), 1 << 16):
        part = numbers[start : start + (1 << 16)]
        most = max(most, mapped_mib() - before) if start % (1 << 20) == 0 else most
        assert part[0] == start and part[-1] == start + 65535, "a view outlives the pages it was made from"
    assert most < 64


def test_a_mapped_file_takes_a_descriptor_only_once_it_is_read(tmp_path):
    np.arange(5).tofile(tmp_path / "a")
    np.empty(0).tofile(tmp_path / "empty")
    lazy, empty = Mapped(tmp_path / "a", np.int64), Mapped(tmp_path / "empty", np.int64)
    assert len(lazy) == 5 and lazy._map is None
    lazy.will_read(-3, 99)  # a hint, whatever it says
    empty.will_read(0, 1)
    assert lazy[2:4].tolist() == [2, 3] and lazy._map is not None and not len(empty.array)


def test_an_entry_remembers_the_day_it_was_last_used(tmp_path):
    def build(folder):
        return {"source": "s", "content": "c"}

    facts = get_or_build(tmp_path, "a-tokens-1", build)[0] / "facts.json"
    for age, expected in ((3600, 3600), (40 * 86400, 0)):
        then = time.time() - age
        os.utime(facts, (then, then))
        get_or_build(tmp_path, "a-tokens-1", build)
        assert abs(time.time() - facts.stat().st_mtime - expected) < 60


def test_where_the_cache_is_is_said_once_and_asking_makes_nothing(tmp_path, capfd):
    assert cache.cache_root(tmp_path / "a.jsonl") == tmp_path / ".cache" and not (tmp_path / ".cache").exists()
    file = write(tmp_path / "a.jsonl", b'{"n": 1}\n')
    Jsonl(file), Jsonl(file), Jsonl(write(tmp_path / "b.jsonl", b'{"n": 1}\n'))
    assert capfd.readouterr().err.count(f"kept in {tmp_path / '.cache'} (--cache_dir names another place)") == 1


# ---- the head


def test_the_head_of_a_file_is_read_without_the_rest(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf\n{"n": 1}\n\n{"n": 2}\r\n' + b'{"n": 3}\n' * 200)
    head = Head(file)
    assert len(head) == 100 and [head[i]["n"] for i in range(3)] == [1, 2, 3] and head.line(1) == 4
    monkeypatch.setattr(jsonl, "HEAD_BYTES", 20)
    assert len(Head(file)) == 3
    array = Head(write(tmp_path / "a.json", json.dumps([{"n": i} for i in range(9)], indent=1).encode()))
    assert [array[i]["n"] for i in range(len(array))][:2] == [0, 1] and array.where(1) == f"{tmp_path / 'a.json'}:5"
    monkeypatch.setattr(jsonl, "LONGEST", 50)
    assert not len(Head(write(tmp_path / "b.jsonl", b"x" * 100))), "a line of gigabytes is not read to look at it"


def test_a_file_that_the_check_refuses_is_not_read_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "index_lines", None)  # may not be called

    def refuse(head):
        raise ValueError(head.where(0))

    for name, data in (("a.jsonl", b'{"n": 1}\n'), ("a.json", b'[{"n": 1}]')):
        with pytest.raises(ValueError, match=rf"{name}:1"):
            Jsonl(write(tmp_path / name, data), check=refuse)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl"]


# ---- bad rows


def test_skipped_rows_are_counted_and_written_down(tmp_path):
    file = write(tmp_path / "a.jsonl", b"")
    with RowErrors(file, tmp_path, rows=250, on_bad_row="skip") as errors:
        errors.add(7, "broken JSON", b'{"a')
        errors.add(9, "not UTF-8", b"\xff")
    assert errors.count == 2
    rejects = [json.loads(line) for line in errors.target.read_text(encoding="utf-8").splitlines()]
    assert errors.target.name == "a.jsonl.rejects.jsonl"
    assert rejects == [
        {"line": 7, "reason": "broken JSON", "row": '{"a'},
        {"line": 9, "reason": "not UTF-8", "row": "\ufffd"},
    ]


@pytest.mark.parametrize("rows, allowed", [(5, 1), (199, 1), (200, 2), (2900, 29), (10_000, 100)])
def test_more_than_one_percent_is_too_many_to_skip_but_one_never_is(tmp_path, rows, allowed):
    file = write(tmp_path / "a.jsonl", b"")
    with pytest.raises(ValueError, match=f"more than {allowed} bad rows"):
        with RowErrors(file, tmp_path, rows, "skip") as errors:
            for line in range(allowed + 1):
                assert errors.count == line
                errors.add(line, "broken", b"")
    assert os.listdir(tmp_path) == ["a.jsonl"], "no half list of rejects"


def test_a_bad_row_stops_unless_told_otherwise(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl:7: broken \(--on_bad_row skip leaves such rows out\)"):
        with RowErrors(tmp_path / "a.jsonl", tmp_path, 1000, "error") as errors:
            errors.add(7, "broken", b"")


# ---- plain text


def test_a_text_file_is_hashed_once_and_its_parts_begin_with_lines(tmp_path, monkeypatch):
    """Every process of every start read all of it."""
    monkeypatch.setattr(TextFile, "PART", 25)
    monkeypatch.setattr(plain_text, "BLOCK", 7)
    lines = [f"line {i}\n" for i in range(1, 20)]
    file = write(tmp_path / "a.txt", "".join(lines).encode())
    source = TextFile(file)
    assert source.content == hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(TextFile, "_build", None)  # may not be called again
    again, text = TextFile(file), []
    assert again.content == source.content and len(again.parts(40, 1)) == 3 and len(again.parts(1000, 1)) == 1
    for part in again.parts(40, 1):
        for chunk in again.chunks(10, part):
            assert chunk.rows[0].decode().startswith(lines[int(chunk.lines[0]) - 1][:5])
            text.append(chunk.rows[0].decode())
    assert "".join(text) == "".join(lines)


def test_a_text_file_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt:1: not UTF-8 at byte 1; it looks like gbk"):
        TextFile(write(tmp_path / "a.txt", "麻雀\n".encode("gbk")))
    assert os.listdir(tmp_path) == ["a.txt"]


@settings(deadline=None)
@given(st.text(alphabet="ab\n麻雀😀", min_size=1), st.integers(8, 20))
def test_a_text_file_comes_in_whole_characters_cut_at_line_ends(tmp_path_factory, text, size):
    file = write(tmp_path_factory.mktemp("text") / "a.txt", text.encode())
    chunks = list(TextFile(file).chunks(size))
    assert "".join(chunk.rows[0].decode() for chunk in chunks) == text
    for before, chunk in zip(chunks, chunks[1:]):
        assert before.rows[0].endswith(b"\n") or b"\n" not in before.rows[0]
        assert chunk.lines[0] == 1 + b"".join(c.rows[0] for c in chunks[: chunks.index(chunk)]).count(b"\n")


@pytest.mark.parametrize("rest", ('[{"text": "c"}]', '{"text": "c"}', "]", "x"))
def test_what_stands_after_an_array_is_not_lost_silently(rest, tmp_path):
    """`cat a.json b.json > all.json`: of 6 rows 3 were read."""
    path = tmp_path / "all.json"
    path.write_text('[{"text": "a"},\n{"text": "b"}]\n\n' + rest, encoding="utf-8")
    with pytest.raises(ValueError, match=r"all.json:4: broken JSON: something stands after the array's end"):
        Jsonl(path)
    path.write_text('[{"text": "a"},\n{"text": "b"}]\n\n', encoding="utf-8")
    assert len(Jsonl(path)) == 2


def test_a_row_over_several_lines_is_named_as_such(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{\n  "text": "a"\n}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="a row has to be on one line"):
        Jsonl(path)[0]


@pytest.mark.skipif(os.name != "posix", reason="pipes have no path")
def test_a_pipe_is_refused_by_name(tmp_path):
    """--data_path <(zcat a.jsonl.gz) ended with "File or stream is not seekable.", without file and way out."""
    os.mkfifo(tmp_path / "a.jsonl")
    for kind in (Jsonl, TextFile):
        with pytest.raises(OSError, match=r"a\.jsonl: is a pipe; .*, so write it to a file"):
            kind(tmp_path / "a.jsonl")
    with pytest.raises(OSError, match="null: is not a regular file"):
        Jsonl(os.devnull)
