"""What comes from files is shown and never obeyed: an ESC in a row's key reached the terminal through an error line."""

import json

import pytest

from common.console import UserError, printable, run
from tests.helpers.runs import run_script

# sets the window's title, starts 8-bit CSI, deletes, reverses the direction of writing, half a surrogate pair
EVIL = "\x1b]0;owned\x07\x9b2J\x7f\u202egpj.exe\ud800"
SHOWN = "␛]0;owned␇\ufffd2J\ufffd\ufffdgpj.exe\ufffd"


def test_what_could_steer_a_terminal_is_shown_as_something_harmless():
    assert printable(EVIL) == SHOWN
    assert printable("a\tb\nc") == "a\tb\nc" and printable("a\tb\nc", one_line=True) == "a\tb␊c"
    text = "你好, naïve שלום 👩‍👩‍👧 ﷽"
    assert printable(text) == text, "letters of all scripts and joiners stay"


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    """A key with a line break could print a second, forged error line."""

    def main():
        raise UserError(f"a.jsonl:1: {EVIL}\nerror: all is well")

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == f"error: a.jsonl:1: {SHOWN}␊error: all is well\n"


SCRIPTS = {
    "scripts/check_data.py": None,
    "trainer/train_pretrain.py": "--save_dir",
    "scripts/prepare_data.py": "--save_path",
}


@pytest.mark.parametrize("script, place", SCRIPTS.items())
def test_a_files_name_and_keys_do_not_steer(script, place, tmp_path):
    file = tmp_path / "a\x1b[31m\u202eb.jsonl"
    file.write_text(json.dumps({"x\x1b[2J\u202e": 1, "\x9b5m": 2}) + "\n", encoding="utf-8")
    status, out, err = run_script(script, "--data_path", file, *([place, tmp_path / "out"] if place else []))
    assert status and "␛[31m" in out + err
    assert printable(out + err) == out + err


def test_options_are_quoted_safely_too(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text('"\\e[2Jx": 1\nddp: "\\e"\nepochs: "\\e[1m"\n', encoding="utf-8")
    status, out, err = run_script("trainer/train_pretrain.py", "--config", file)
    assert status == 2 and err.count("␛[") == 2 and printable(out + err) == out + err
