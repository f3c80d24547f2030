"""The data doctor: counts that can be checked by hand, a clean copy that training takes, and no crash on any file."""

import json
import random
import sys

import pytest

import dataset.doctor.examine as doctor
from common.console import UserError
from dataset.batches.preference import PreferenceDataset
from dataset.doctor import duplicates
from dataset.doctor.duplicates import hashes_of
from dataset.doctor.examine import examine
from scripts import check_data
from tests.helpers.datasets import sft
from tests.helpers.layouts import CHATS, PAIRS
from tests.helpers.rows import chat, jsonl
from tests.helpers.tokenizers import ByteTokenizer

CUT_OFF = "; it is cut off, or goes on in the next line, and a row has to be on one"
ROOT = check_data.Path(check_data.__file__).parents[1]


def check(file, **options):
    return examine(file, ByteTokenizer(), **options).report


def run(capsys, *flags):
    """(exit status, what was printed)"""
    before, sys.argv = sys.argv, ["scripts/check_data.py", *map(str, flags)]
    try:
        check_data.main()
        status = 0
    except SystemExit as exit:
        status = exit.code
    finally:
        sys.argv = before
    return status, capsys.readouterr().out


def test_what_is_wrong_is_counted_with_its_lines(tmp_path):
    file = jsonl(
        tmp_path / "a.jsonl",
        chat("hi", "yo"),  # 1
        chat("hi", "yo"),  # 2: again
        '{"conversations": [',  # 3: cut off
        chat("hi", ""),  # 4: no answer
        chat("a", "b", "c"),  # 5: ends with the user
        {"conversations": [{"role": "user", "content": "hi"}]},  # 6: nobody answers
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " \n"}]},  # 7: blanks
        chat("q", "a", system="be"),  # 8
        {"instruction": "hi", "output": "yo"},  # 9: another layout
        chat("hi", ""),  # 10
        '{"conversations": [{"role": "user", "content": "hi"}], "conversations": []}',  # 11: a key twice
    )
    report = check(file)
    assert (report.rows, report.kind, report.layout, report.bad) == (11, "chat", "conversations", 6)
    assert [(f.what, f.count, f.lines) for f in report.errors.values()] == [
        ("broken JSON at column 20: Expecting value" + CUT_OFF, 1, [3]),
        ("conversations[1]: the assistant says nothing", 3, [4, 7, 10]),
        (
            "laid out as instruction + output, while line 1 is conversations; one layout a file "
            "(scripts/prepare_data.py joins files)",
            1,
            [9],
        ),
        ('the key "conversations" stands twice in one object', 1, [11]),
    ]
    assert dict(report.roles) == {"user": 6, "assistant": 4, "system": 1}
    assert (report.empty.count, report.empty.lines) == (1, [6])
    assert (report.duplicates.count, report.duplicates.lines) == (1, [2])
    assert {f.what: f.lines for f in report.notes.values()} == {
        "the last turn is not the assistant's and teaches nothing": [5, 6]
    }


def test_too_many_empty_rows_stop_training_and_so_the_doctor_says_it(tmp_path, capsys):
    """They are no errors, and the doctor passed files that every training refused: texts of nothing, or questions that
    nobody answers."""
    nobody = {"conversations": [{"role": "user", "content": "hi"}]}
    files = {
        "none": [nobody] * 3,
        "many": [*[chat("hi", "yo")] * 38, nobody, nobody, nobody],
        "few": [*[chat("hi", "yo")] * 39, nobody, nobody],
    }
    for name, rows in files.items():
        file = jsonl(tmp_path / f"{name}.jsonl", *rows)
        status, text = run(capsys, file)
        if name == "few":
            assert status == 0 and "stops" not in text and len(sft(file)) == 39
            continue
        assert status == 1 and "; training stops at more than 5% (--max_empty_rows)" in text
        with pytest.raises(UserError, match="have no assistant's turn"):
            sft(file)


def test_tokens_cuts_packing_and_a_length_to_choose(tmp_path):
    """A byte is a token. "[user\\nq]\\n[assistant\\n" is 20 ids, the answer of n bytes and its end n + 1: 21 + n ids.
    At 32 positions (33 ids) answers of 5 and 10 fit, of 20 is cut, of 60 is left out: its own answer does not fit."""
    file = jsonl(tmp_path / "a.jsonl", *[chat("q", "a" * n) for n in (5, 10, 20, 60)])
    found = check(file, max_seq_len=32).tokens
    assert found["exact"] and found["sampled"] == 4 and found["total"] == 26 + 31 + 41 + 81 and found["max"] == 81
    assert found["trained_share"] == pytest.approx((6 + 11 + 21 + 61) / 179)
    assert (found["cut"], found["left_out"]) == (1, 1)
    assert found["histogram"] == [[32, 2], [64, 1], [128, 1]]
    assert found["suggested_max_seq_len"] == 128  # 80 positions, in steps of 64
    assert (found["rows"], found["rows_padded"]) == (3, 3)  # 25, 30, 32 positions: no two share a row of 32
    assert check(file, max_seq_len=64).tokens["rows"] == 3  # 25 + 30, 40, and 64 that are left of the longest
    assert check(file, max_seq_len=64, batch_size=1).tokens["rows"] == 4, "packed within a step only"
    ds = sft(file, max_seq_len=32)
    assert len(ds) == 3 and "1 cut, 1 left out" in ds.summary, "as training counts it"


def test_documents_and_pairs_and_plain_text(tmp_path):
    texts = check(jsonl(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "defgh"}, {"text": " "}), max_seq_len=4)
    assert (texts.kind, texts.rows, texts.empty.lines) == ("text", 3, [3])
    assert texts.tokens["total"] == 4 + 6 and (texts.tokens["rows"], texts.tokens["rows_padded"]) == (3, 3)
    pairs = check(jsonl(tmp_path / "b.jsonl", *PAIRS.values()))  # nine layouts of one row: all but one are errors
    assert (pairs.kind, pairs.rows, pairs.bad) == ("preference", 10, 9) and pairs.tokens["sampled"] == 1
    (tmp_path / "c.txt").write_text("a plain text", encoding="utf-8")
    plain = check(tmp_path / "c.txt")
    assert (plain.kind, plain.rows, plain.tokens["total"]) == ("plain", 1, 12)


def test_pairs_are_cut_and_left_out_as_in_dpo(tmp_path):
    """Counted a side at a time, 32 % of real pairs were too long, where training left 45 % out: a pair goes with its
    longer answer, and is as long as its prompt and both."""
    pairs = [
        {"prompt": "p" * p, "chosen": "c" * c, "rejected": "r" * r}
        for p, c, r in ((5, 5, 9), (30, 5, 9), (5, 60, 3), (5, 3, 60), (9, 9, 1), (2, 2, 3))
    ]
    file = jsonl(tmp_path / "dpo.jsonl", *pairs)
    found = check(file, max_seq_len=40, batch_size=2).tokens
    ds = PreferenceDataset(file, ByteTokenizer(), max_seq_len=40)
    assert f"{found['cut']} cut, {found['left_out']} left out" in ds.summary and found["left_out"] == 2
    assert found["rows_padded"] == 2 * len(ds)
    assert found["total"] == PreferenceDataset(file, ByteTokenizer(), max_seq_len=900).lengths.sum()
    assert check(file).tokens["max_seq_len"] == 1024 and check(file).tokens["batch_size"] == 4, "as train_dpo.py has it"


def test_a_sample_is_said_to_be_one(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", *[chat("q", f"answer {i}") for i in range(2000)])
    found = check(file, sample=10_000).tokens
    assert not found["exact"] and 50 < found["sampled"] < 300
    assert check(file, sample=0).tokens["sampled"] == 2000 and check(file, sample=1).tokens["sampled"] >= 1


def test_that_only_a_sample_was_tried_in_the_chat_format_is_said(tmp_path, capsys):
    """What it refuses is found in the sample only, and the report said "errors none"."""
    same = {"prompt": "1?", "chosen": "<think>a</think>b", "rejected": "<think>\na\n</think>\nb"}
    pairs = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(2000)]
    file = jsonl(tmp_path / "a.jsonl", *pairs, same)
    status, said = run(capsys, file, "--sample_mb", 0.001)
    untried = check(file, sample=1049).untried
    assert status == 0 and 1900 < untried < 2000
    assert f"chat format not tried on {untried:,} of 2,001 rows: only on a sample; --sample_mb 0" in said, said
    status, said = run(capsys, file, "--sample_mb", 0)
    assert status == 1 and "in this tokenizer's chat format" in said and "not tried" not in said


def test_equal_rows_are_found_whatever_their_spelling_and_however_they_are_stored(tmp_path, monkeypatch):
    """The order of keys, spaces and the layout make no other row. Hashes in many files, as for a huge data set."""
    monkeypatch.setattr(duplicates, "PART", 64)  # bytes: a file for every four rows
    monkeypatch.setattr(doctor, "READ_BYTES", 100)
    again = '{"conversations":[{"content":"q3","role":"user"},{"content":"a","role":"assistant"}]}'
    rows = [chat(f"q{i}", "a") for i in range(40)]
    file = jsonl(tmp_path / "a.jsonl", *rows, again, chat("q3", "a"), chat("q9", "a"))
    report = check(file)
    assert (report.duplicates.count, report.duplicates.lines) == (3, [41, 42, 43])
    val = jsonl(
        tmp_path / "val.jsonl",
        {"instruction": "q5", "output": "a"},
        {"instruction": "new", "output": "a"},
        "broken",
        {"instruction": "q39", "output": "a"},
    )
    assert check(file, val_hashes=hashes_of(val)).overlap.lines == [6, 40]


def test_fix_writes_what_training_takes_and_says_why_the_rest_is_not_there(tmp_path, capsys):
    bad = ['{"conversations": [', chat("hi", ""), chat("hi", "yo"), {"conversations": chat("hi")["conversations"]}]
    file = jsonl(tmp_path / "a.jsonl", chat("hi", "yo"), *bad, chat("q", "a") | {"id": 7}, chat("in", "val"))
    (tmp_path / "a.jsonl").write_bytes(file.read_bytes() + '{"text": "麻雀"}'.encode("gbk") + b"\r\n")
    val = jsonl(tmp_path / "val.jsonl", chat("in", "val"))
    status, said = run(capsys, file, "--val_path", val, "--fix", "--tokenizer_path", ROOT / "tokenizer")
    assert status == 1 and f"wrote 2 rows to {tmp_path / 'a.clean.jsonl'}" in said and "3 rows cannot be read" in said
    clean = (tmp_path / "a.clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in clean] == [chat("hi", "yo"), chat("q", "a") | {"id": 7}], "as they stood"
    rejects = [json.loads(line) for line in (tmp_path / "a.jsonl.rejects.jsonl").read_text("utf-8").splitlines()]
    assert [(row["line"], row["reason"][:26]) for row in rejects] == [
        (2, "broken JSON at column 20: "),
        (3, "conversations[1]: the assi"),
        (4, "repeats an earlier row"),
        (5, "nothing to train on"),
        (7, "stands in the validation f"),
        (8, "not UTF-8 at byte 11; it l"),
    ]
    assert len(sft(tmp_path / "a.clean.jsonl")) == 2
    assert run(capsys, tmp_path / "a.clean.jsonl", "--val_path", val)[0] == 0


def test_fix_leaves_out_what_the_chat_format_refuses(tmp_path):
    """The two answers differ in blanks that the format does not keep. Of an array, many rows are in one line."""
    asked = lambda question, *answers: dict(zip(("prompt", "chosen", "rejected"), (question, *answers)))
    rows = [asked("1?", "a", "b"), asked("2?", "<think>a</think>b", "<think>\na\n</think>\nb"), asked("3?", "a", "b")]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    examination = examine(file, ByteTokenizer())
    assert examination.report.bad == 1
    assert examination.fix(tmp_path / "clean.jsonl", tmp_path / "rejects.jsonl") == (2, 1)
    assert "the same in this tokenizer's chat format" in (tmp_path / "rejects.jsonl").read_text("utf-8")
    assert len(PreferenceDataset(tmp_path / "clean.jsonl", ByteTokenizer(), max_seq_len=64)) == 2


def test_fix_never_writes_two_files_into_one(tmp_path, capsys):
    for name in ("a.jsonl", "a.json"):
        jsonl(tmp_path / name, {"text": name})
    with pytest.raises(ValueError, match=r"would be written to .*a\.clean\.jsonl"):
        run(capsys, tmp_path / "a.jsonl", tmp_path / "a.json", "--fix")
    assert not (tmp_path / "a.clean.jsonl").exists()


def test_a_text_as_validation_file_is_told_what_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"a\.txt: is one text"):
        hashes_of(tmp_path / "a.txt")


def test_a_pair_that_no_stage_trains_on_is_an_error_wherever_it_stands(tmp_path):
    pair = lambda i, **marks: {
        "chosen": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "a"} | marks],
        "rejected": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "b"}],
    }
    report = check(jsonl(tmp_path / "a.jsonl", pair(1), pair(2, weight=0)), sample=1)
    assert report.bad == 1 and not report.empty.count


def test_the_report_for_people_and_for_machines(tmp_path, capsys):
    file = jsonl(tmp_path / "a.jsonl", chat("hi", "yo"), chat("hi", "yo"), '{"broken')
    status, said = run(capsys, file)
    assert status == 1
    for line in (
        "rows        3 (chat: conversations), 0.0 MB",
        "errors      1 row cannot be read",
        "(line 3)",
        "roles       user 2, assistant 2",
        "duplicates  1 row, each like an earlier one  (line 2)",
        "suggestion  --max_seq_len 64",
    ):
        assert line in said, said
    status, said = run(capsys, file, tmp_path / "none.jsonl", "--json")
    first, second = json.loads(said)
    assert status == 1 and (first["rows"], first["bad"], first["duplicates"]["lines"]) == (3, 1, [2])
    assert first["errors"][0]["lines"] == [3] and "no such file" in second["failure"]
    assert run(capsys)[0] == 2, "no file named"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "the file is empty"),
        (b"\n \n", "no rows"),
        (b"[", "broken JSON"),
        (b'[{"text": "a"}', "broken JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1" + b"9" * 5000 + b"]", "digits"),
        (b'["a"]', "a row must be an object"),
        (b"PAR1\xff", "is a Parquet file"),
        ('[{"text": "麻雀"}]'.encode("gbk"), "it looks like gbk"),
        (b"\x00" * 99, "a NUL character at column 1"),
        (b'{"speech": "hi"}', 'no known layout in this row, it has "speech"'),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_one_line(tmp_path, capsys, data, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(data)
    status, said = run(capsys, file)
    assert status == 1 and reason in said and str(file) in said


def test_a_files_weight_is_left_aside(tmp_path, capsys):
    """`sft.jsonl:2`, as training takes it, was "no such file; did you mean sft.jsonl?"."""
    file = jsonl(tmp_path / "sft.jsonl", *(chat(f"ask {i}", f"say {i}") for i in range(5)))
    val = jsonl(tmp_path / "val.jsonl", chat("ask", "say"))
    status, said = run(capsys, f"{file}:2", "--val_path", f"{val}:0.5")
    assert status == 0 and "no such file" not in said and "rows        5 " in said


def test_a_row_of_fifty_megabytes(tmp_path):
    file = tmp_path / "a.jsonl"
    long = json.dumps(chat("q", "word " * (10 << 20)))
    file.write_text("\n".join([json.dumps(chat("hi", "yo")), long, long[:-9]]), encoding="utf-8")
    report = check(file)
    assert report.rows == 3 and report.tokens["sampled"] == 1
    assert [(f.what, f.lines) for f in report.notes.values()] == [
        ("longer than 1 MB, left out of the token counts", [2])
    ]
    assert report.bad == 1 and [f.lines for f in report.errors.values()] == [[3]]


VALUES = [
    None,
    0,
    -1.5,
    1e308,
    True,
    "",
    " ",
    "hi",
    "麻雀\u2028",
    [],
    [[]],
    {},
    "[{",
    '{"name": "f"}',
    "\x00",
    ["a"],
    {"role": "user"},
    {"from": "gpt", "value": None},
    [{"type": ["x"], "text": {}}],
    {"name": [], "arguments": 3},
    [{"role": ["user"], "content": "x"}],
    [{"from": {}, "value": []}],
    [{"human": 1, "assistant": 2}],
    '{"arguments": {"a": 1}, "name": "\\ud83d"}',
]


def mutated(draw: random.Random, row):
    """The row with values swapped, keys dropped or renamed, at any depth."""
    if draw.random() < 0.12:
        return draw.choice(VALUES)
    if isinstance(row, dict):
        keys = "role content from value tools tool_calls system history label chosen text".split()
        found = {draw.choice(keys) if draw.random() < 0.1 else k: mutated(draw, v) for k, v in row.items()}
        if draw.random() < 0.3:
            found[draw.choice(keys)] = draw.choice(VALUES)
        return found
    return [mutated(draw, value) for value in row] if isinstance(row, list) else row


def garbled(draw: random.Random, line: bytes) -> bytes:
    """The bytes with some cut, swapped, or put in."""
    data = bytearray(line)
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(data) + 1)
        pieces = [b"", b"\x00", b"\xff\xfe", b'"', b"{", b"]", b"\\u", b"\\ud800", "雀".encode("gbk"), b"\r"]
        data[at : at + draw.randrange(3)] = draw.choice([*pieces, draw.randbytes(5)])
    return bytes(data)


def test_no_line_whatever_it_holds_makes_the_doctor_crash(tmp_path, monkeypatch):
    """10,000 lines, mutated rows of every layout and plain noise. The doctor survives faults of the reader, so it is
    also asserted that there were none: training, which has the same reader, would have ended in a traceback."""
    monkeypatch.setattr(doctor, "REASONS", 10**6)  # all are listed
    draw = random.Random(0)
    calls = {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        "tools": "[{}]",
        "functions": [{"name": "f"}],
    }
    rows = [row for row, _ in CHATS.values()] + list(PAIRS.values()) + [calls, {"text": "a"}]
    rated = {"prompt": "hi", "completion": "yo", "label": True}
    for number, first in enumerate([chat("hi", "yo"), PAIRS["sharegpt"], {"text": "hi"}, rated]):
        lines = [json.dumps(first).encode()]
        for _ in range(2500):
            line = json.dumps(mutated(draw, draw.choice([*rows, first])), ensure_ascii=draw.random() < 0.5)
            line = line.encode("utf-8", "surrogatepass")
            lines.append([line, garbled(draw, line), draw.randbytes(draw.randrange(40))][draw.randrange(3)])
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(b"\n".join(lines))
        examination = examine(file, ByteTokenizer())
        report = examination.report
        assert report.rows >= 2500 * 0.9 and 500 < report.bad < report.rows
        assert not [f.what for f in report.errors.values() if f.what.startswith("cannot be read")]
        good, bad = examination.fix(tmp_path / "clean.jsonl", tmp_path / "rejects.jsonl")
        assert good + bad == report.rows and good > 0
        clean = check(tmp_path / "clean.jsonl")
        assert (clean.bad, clean.duplicates.count, clean.rows) == (0, 0, good)


def test_memory_does_not_grow_with_what_is_wrong(tmp_path):
    """Every row has another reason and is a duplicate of none: the lists stay short."""
    odd = [{chr(97 + i % 26) * (i % 40 + 1): i} for i in range(3000)]
    file = jsonl(tmp_path / "a.jsonl", chat("hi", "yo"), *[row | {"x" * 999: i} for i, row in enumerate(odd)])
    report = check(file)
    assert report.bad == 3000 and len(report.errors) <= doctor.REASONS + 1
    assert all(len(f.lines) <= doctor.SHOWN and len(f.what) <= 300 for f in report.errors.values())
    assert examine(file, ByteTokenizer()).verdicts.nbytes == 3001, "a byte a row"


def test_columns_that_are_left_aside_are_named(tmp_path, capsys):
    row = {"instruction": "Who?", "context": "Lucy.", "response": "Lucy", "category": "qa", "score": 3}
    report = check(jsonl(tmp_path / "a.jsonl", row))
    assert list(finding.what for finding in report.notes.values()) == ["columns that are not read: category, score"]
    assert "columns not read: category, score" in sft(tmp_path / "a.jsonl", max_seq_len=99).summary
    said = run(capsys, jsonl(tmp_path / "b.jsonl", row, row, row))[1]
    assert f"{'note':<{check_data.LABEL}}columns that are not read" in said, "all rows have them, not only the first"


def test_an_error_of_the_system_is_said_as_everywhere(tmp_path):
    """It was `[Errno 17] File exists: '...'`, of a cache that was a file."""
    place = tmp_path / "cache"
    place.write_text("x", encoding="utf-8")
    report = examine(jsonl(tmp_path / "a.jsonl", chat("hi", "yo")), ByteTokenizer(), cache_dir=place).report
    assert report.failure == f"{place}: Not a directory"
