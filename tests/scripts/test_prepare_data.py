"""Preparing data: what comes out is ours, joined in the ratio that was asked for, and split without a leak."""

import json
import sys

import pytest

from common.console import UserError
from dataset.read.formats import canonical
from dataset.read.mix import prepare, to_ours
from scripts import prepare_data
from tests.helpers.layouts import CHATS, ONE, PAIRS
from tests.helpers.rows import jsonl
from tests.helpers.runs import run_script


def run(*flags):
    before, sys.argv = sys.argv, ["scripts/prepare_data.py", *map(str, flags)]
    try:
        prepare_data.main()
    finally:
        sys.argv = before


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(path):
    """The questions of a file of conversations, in order."""
    return [row["conversations"][0]["content"] for row in rows(path)]


def alpaca(path, *questions):
    return jsonl(path, *[{"instruction": q, "input": "", "output": "yo"} for q in questions])


@pytest.mark.parametrize(
    "row", [*(row for row, _ in CHATS.values()), *PAIRS.values(), {"text": "麻雀"}, {"messages": ONE, "label": False}]
)
def test_what_is_written_reads_back_as_the_same_canonical_row(tmp_path, row):
    report = prepare([jsonl(tmp_path / "a.jsonl", row)], [], target=tmp_path / "out.jsonl")
    (written,) = rows(tmp_path / "out.jsonl")
    assert canonical(written) == canonical(row) and written == to_ours(canonical(row))
    assert written.keys() <= {"conversations", "tools", "chosen", "rejected", "label", "text"}
    assert report.written == 1


def test_identity_rows_are_repeated_until_the_ratio_holds(tmp_path, capsys):
    """12 task rows at 3:1 make 4 identity rows of the 3 there are: the first comes twice."""
    task = alpaca(tmp_path / "task.jsonl", *[f"q{i}" for i in range(12)])
    me = jsonl(tmp_path / "me.jsonl", *[{"prompt": f"who{i}", "completion": "me"} for i in range(3)])
    merged = tmp_path / "merged.jsonl"
    flags = f"--task_data={task} --identity_data={me} --merged_data={merged}".split()
    run(*flags, "--ratio=3")
    assert asked(merged) == [*[f"q{i}" for i in range(12)], "who0", "who1", "who2", "who0"]
    said = capsys.readouterr().out
    assert "task data: 12 rows" in said and "identity data: 3 rows, written 4 times in all (ratio 3:1)" in said
    with pytest.raises(
        ValueError, match="--ratio 1e-06: more than 10,000 identity rows for each task row; give 0.0001"
    ):
        run(*flags, "--ratio=1e-6")  # 1e-300 wrote until the disk was full
    assert f"written: 16 rows to {merged}" in said

    run(*flags)  # no ratio: one after the other, as the project that these flags are from shows it
    assert len(rows(merged)) == 15 and "written: 15 rows" in capsys.readouterr().out
    run(*flags, "--ratio=100")  # never fewer than there are
    assert len(rows(merged)) == 15
    said = capsys.readouterr().out
    assert "(ratio 4:1)" in said and "--ratio 100 asks for fewer of them than there are" in said
    status, _, error = run_script("scripts/prepare_data.py", f"--data_path={task}", "--ratio=3")
    assert status == 2 and "--ratio 3: of what? --identity_data is missing" in error


def test_the_validation_part_is_exact_seeded_and_shares_no_row(tmp_path, capsys):
    """Equal rows go to one side: a row in training and in validation would measure memory, not learning."""
    data = alpaca(tmp_path / "a.jsonl", *[f"q{i}" for i in range(100)], *[f"q{i}" for i in range(100)])
    folder = tmp_path / "out"
    run(f"--data_path={data}", f"--output_dir={folder}", "--val_fraction=0.1")
    train, val = asked(folder / "train.jsonl"), asked(folder / "val.jsonl")
    assert len(train) == 180 and len(val) == 20 and not set(train) & set(val)
    run(f"--data_path={data}", f"--output_dir={folder}", "--val_fraction=0.1")
    assert asked(folder / "val.jsonl") == val
    run(f"--data_path={data}", f"--output_dir={folder}", "--val_fraction=0.1", "--seed=1")
    assert asked(folder / "val.jsonl") != val
    capsys.readouterr()
    run(f"--data_path={data}", f"--output_dir={folder}")  # everything is in train.jsonl now
    assert f"warning: 20 rows of {folder / 'train.jsonl'} are in {folder / 'val.jsonl'} too" in capsys.readouterr().out
    alpaca(folder / "val.jsonl", "q1000")  # the user's own: it was said to be an earlier run's
    run(f"--data_path={data}", f"--output_dir={folder}")
    assert "warning" not in capsys.readouterr().out
    # a repeated identity row stays on its side, too
    run(
        f"--data_path={data}",
        f"--identity_data={alpaca(tmp_path / 'me.jsonl', *'abcdefghij')}",
        "--ratio=1",
        f"--save_path={tmp_path / 'm.jsonl'}",
        "--val_fraction=0.5",
    )
    train, val = asked(tmp_path / "m.jsonl"), asked(tmp_path / "m.val.jsonl")
    assert not set(train) & set(val) and sum(len(q) == 1 for q in train) == sum(len(q) > 1 for q in train)


def test_a_limit_counts_the_rows_of_all_task_files(tmp_path):
    a, b = alpaca(tmp_path / "a.jsonl", "a1", "a2"), alpaca(tmp_path / "b.jsonl", "b1", "b2")
    run("--data_path", a, b, "--data_limit=3", f"--save_path={tmp_path / 'o.jsonl'}")
    assert asked(tmp_path / "o.jsonl") == ["a1", "a2", "b1"]


def test_better_answers_become_conversations(tmp_path, capsys):
    pairs = jsonl(tmp_path / "a.jsonl", PAIRS["a prompt and text"])
    rated = jsonl(tmp_path / "b.jsonl", *[{"prompt": "hi", "completion": c, "label": c == "yo"} for c in ("yo", "go")])
    run("--data_path", pairs, rated, "--to=chat", f"--save_path={tmp_path / 'o.jsonl'}")
    assert rows(tmp_path / "o.jsonl") == [{"conversations": ONE}] * 2
    assert "left out: 1 answers that were labelled bad" in capsys.readouterr().out


def test_a_better_answer_that_training_would_refuse_is_a_bad_row(tmp_path):
    pairs = jsonl(tmp_path / "a.jsonl", {"prompt": "hi", "chosen": "<think>cut off", "rejected": "yo"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*begins with <think>, which never ends"):
        prepare([pairs], [], target=tmp_path / "o.jsonl", to="chat")
    prepare([pairs], [], target=tmp_path / "o.jsonl")  # as pairs they can be trained on


def test_a_mapping_and_the_flags_of_a_preprocessing_script(tmp_path, capsys):
    (tmp_path / "columns.yaml").write_text("columns: {instruction: q, output: a}", encoding="utf-8")
    data = tmp_path / "mine.json"
    data.write_text(json.dumps([{"q": "hi " * 100, "a": "yo"}], indent=2), encoding="utf-8")
    run(
        f"--dataset_name={data}",
        f"--data_mapping={tmp_path / 'columns.yaml'}",
        "--max_length=64",
        f"--output_dir={tmp_path / 'processed'}",
        f"--tokenizer_name={prepare_data.ROOT / 'tokenizer'}",
    )
    assert asked(tmp_path / "processed" / "train.jsonl") == ["hi " * 100]
    assert "tokenised: 1 examples, 65 tokens; too long: 1 cut" in capsys.readouterr().out


def test_mistakes_leave_what_was_there(tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text("kept", encoding="utf-8")
    good, text = alpaca(tmp_path / "a.jsonl", "q"), jsonl(tmp_path / "t.jsonl", {"text": "a"})
    bad = jsonl(tmp_path / "bad.jsonl", {"instruction": "hi", "output": "yo"}, '{"instruction": "hi", "outp')
    for files, reason in (
        ([good, text], "files of different kinds cannot be joined: .*a.jsonl holds chat, .*t.jsonl holds text"),
        ([bad], r"bad.jsonl:2: broken JSON at column 23: Unterminated string"),
        ([out], "o.jsonl:1: broken JSON"),
        ([], "--data_path: no file given"),
        ([tmp_path / "a.txt"], "plain text needs no preparing"),
    ):
        with pytest.raises(ValueError, match=reason):
            prepare(files, [], target=out)
    with pytest.raises(ValueError, match="would overwrite"):
        prepare([good], [], target=good)
    with pytest.raises(ValueError, match="a.jsonl: would overwrite"):
        prepare([good], [], target=out, val_target=good, val_fraction=0.5)
    with pytest.raises(ValueError, match="text rows .* cannot become chat"):
        prepare([text], [], target=out, to="chat")
    with pytest.raises(ValueError, match="--val_fraction 0.5: 1 rows are too few to split"):
        prepare([good], [], target=out, val_target=tmp_path / "v.jsonl", val_fraction=0.5)
    assert out.read_text(encoding="utf-8") == "kept"
    assert not [p for p in tmp_path.iterdir() if ".tmp" in p.name], "no half file"


def test_a_validation_file_can_be_converted_into_its_own_folder(tmp_path):
    val = alpaca(tmp_path / "val.jsonl", "q")
    run("--data_path", val, "--output_dir", tmp_path)  # no validation part is written
    assert asked(tmp_path / "train.jsonl") == ["q"]


def test_bad_rows_are_skipped_counted_and_kept_aside(tmp_path, capsys):
    good = [{"prompt": f"q{i}", "completion": "yo"} for i in range(300)]
    data = jsonl(tmp_path / "a.jsonl", *good[:200], '{"prompt": "q', *good[200:], {"prompt": 1, "completion": "yo"})
    run(f"--data_path={data}", "--on_bad_row=skip", f"--save_path={tmp_path / 'o.jsonl'}")
    assert len(rows(tmp_path / "o.jsonl")) == 300 and "left out: 2 bad rows" in capsys.readouterr().out
    assert [(r["line"], r["row"][:12]) for r in rows(tmp_path / "a.jsonl.rejects.jsonl")] == [
        (201, '{"prompt": "'),
        (302, '{"prompt": 1'),
    ]


@pytest.mark.parametrize("name", ("all.json", "all.txt", "all.jsonl.gz"))
def test_a_name_that_promises_another_format_is_refused(name, tmp_path):
    """.json is one array everywhere else; and all.txt became a folder."""
    status, _, error = run_script(
        "scripts/prepare_data.py", "--data_path", alpaca(tmp_path / "a.jsonl", "q"), "--save_path", tmp_path / name
    )
    assert status == 2 and f"--save_path {tmp_path / name}: what is written is .jsonl" in error
    assert not (tmp_path / name).exists()
