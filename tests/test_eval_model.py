"""eval_model.py as people and scripts use it: nothing blocks, nothing is lost, no model text steers the terminal."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_model
from common.console import printable, run
from common.files import ROOT
from common.options import parse
from dataset.tiny_world import exam
from eval_model import Conversation, Screen, chat
from evaluation import benchmark
from inference.generate import generate
from inference.sampling import Sampling
from inference.tools import ROUNDS, TOOLS
from model.checkpoint import load_weights, save_weights
from model.config import ModelConfig
from model.export import save_hf
from model.precision import prepare_for_inference
from model.quant_cpu import quantize_for_cpu
from model.transformer import CausalLM
from tests.helpers.models import small_model
from tests.helpers.tokenizers import BEGINS, llama_like
from tokenizer.chat import encode_chat
from tokenizer.text import Tokenizer

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2).eval()


@pytest.fixture(scope="module")
def out(tmp_path_factory, model, tokenizer):
    """A save_dir as training leaves it."""
    folder = tmp_path_factory.mktemp("out")
    known = dict(path="tokenizer", hash=tokenizer.hash)
    pretrained = [dict(stage="pretrain")]
    save_weights(folder / "pretrain_32.pth", model, tokenizer=known, lineage=pretrained)
    save_weights(folder / "full_sft_32.pth", model, tokenizer=known, lineage=[*pretrained, dict(stage="full_sft")])
    return folder


@pytest.fixture
def say(out, capsys, monkeypatch):
    """Runs the script in this process: say("--prompt", "hi") -> (exit status, standard output, standard error)."""

    def say(*argv, stdin=None):
        flags = [*"--temperature 0 --dtype float32 --save_dir".split(), str(out), *map(str, argv)]
        if "--benchmark" not in argv:
            flags[:0] = ["--max_new_tokens", "8"]
        piped = io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii") if isinstance(stdin, bytes) else None
        monkeypatch.setattr(sys, "stdin", piped)
        status = 0
        try:
            run(lambda: eval_model.main(flags))
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return say


def expected(model, tokenizer, prompt, mode=1, before=(), tools=None):
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if mode:
        messages = [*before, {"role": "user", "content": prompt}]
        ids = encode_chat(tokenizer, messages, tools, add_generation_prompt=True).ids
    (reply,) = generate(model, [ids], GREEDY, max_new_tokens=8, stop=tokenizer.stop_ids)
    return printable(tokenizer.decode(reply))


# ---- without a terminal: MiniMind's eval_model.py called input(), so every script and CI job that ran it hung


@pytest.mark.parametrize("mode", [0, 1])
def test_one_prompt_one_answer_on_standard_output(say, model, tokenizer, mode):
    status, answer, remarks = say("--model_mode", mode, "--prompt", "你好")
    assert (status, answer) == (0, expected(model, tokenizer, "你好", mode) + "\n")
    assert f"{('pretrain', 'full_sft')[mode]}_32.pth" in remarks and "2 layers of 32" in remarks
    assert "pretrain -> full_sft" in remarks or mode == 0


def test_a_list_on_standard_input(say, model, tokenizer):
    status, answers, _ = say(stdin="你好\r\n\n  how are you \n".encode())  # the console's code page was ascii
    both = [f"> {prompt}\n{expected(model, tokenizer, prompt)}\n\n" for prompt in ("你好", "how are you")]
    assert (status, answers) == (0, "".join(both))


@pytest.mark.parametrize("stdin", [None, b"", b"\n \n"])
def test_nothing_to_answer_ends_at_once(say, stdin):
    status, answers, remarks = say(stdin=stdin)
    assert (status, answers) == (2, "") and "error: there is no prompt to answer; give --prompt" in remarks


def test_prompts_from_a_file(say, tmp_path, model, tokenizer):
    (tmp_path / "list.txt").write_text("\ufeff你好\nHow?\n", encoding="utf-8")
    rows = [{"prompt": "你好"}, {"prompt": "two\nlines", "id": 7}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, prompts in (("list.txt", ["你好", "How?"]), ("list.jsonl", ["你好", "two\nlines"])):
        status, answers, _ = say("--prompts_file", tmp_path / name)
        assert (status, answers) == (0, "".join(f"> {p}\n{expected(model, tokenizer, p)}\n\n" for p in prompts))


def test_prompts_come_with_what_was_said_before(say, tmp_path, model, tokenizer):
    """Only the last message was given to the model, without a word: the system prompt and earlier turns were lost."""
    before = [
        dict(role="system", content="Be brief."),
        dict(role="user", content="你好"),
        dict(role="assistant", content="早"),
    ]
    rows = [{"messages": [*before, dict(role="user", content="How?")]}, {"prompt": "你好"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, answers, _ = say("--prompts_file", tmp_path / "list.jsonl", "--system", "Be kind.")
    kind = [dict(role="system", content="Be kind.")]
    said = [expected(model, tokenizer, "How?", before=before), expected(model, tokenizer, "你好", before=kind)]
    assert (status, answers) == (0, f"> How?\n{said[0]}\n\n> 你好\n{said[1]}\n\n")


def test_prompts_come_with_their_tools(say, tmp_path, model, tokenizer):
    """They were left out, without a word. A row's own take the place of --tools."""
    tools = [dict(type="function", function=dict(name="weather", parameters=dict(type="object", properties={})))]
    rows = [{"messages": [dict(role="user", content="How?")], "tools": tools}, {"prompt": "你好"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for flags, usual in (([], None), (["--tools", "demo"], TOOLS)):
        said = [expected(model, tokenizer, "How?", tools=tools), expected(model, tokenizer, "你好", tools=usual)]
        status, answers, _ = say("--prompts_file", tmp_path / "list.jsonl", *flags)
        assert (status, answers) == (0, f"> How?\n{said[0]}\n\n> 你好\n{said[1]}\n\n")
    assert said[0] != expected(model, tokenizer, "How?")


def test_a_prompt_that_is_too_long_does_not_end_the_others(say, tmp_path, model, tokenizer):
    """Nothing after it was answered."""
    rows = [{"prompt": "a " * 40_000}, {"prompt": "你好"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, answers, remarks = say("--prompts_file", tmp_path / "list.jsonl")
    assert status == 2 and answers.endswith(f"> 你好\n{expected(model, tokenizer, '你好')}\n\n")
    assert "not answered: a prompt of" in remarks and "error: prompts that were not answered: 1" in remarks


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'{"prompt": "a"}\n{"prompt" "b"}\n', "list.jsonl:2: broken JSON at column 11"),
        (b'{"ask": "a"}\n', "list.jsonl:1: no question in this row, it has ask; expected one of instruction, prompt"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "list.jsonl:1: this row asks nothing"),
        ("早上好\n".encode("gbk"), "list.jsonl:1: not UTF-8 at byte 1; it looks like gbk"),
    ],
)
def test_a_bad_prompts_file_is_named_with_its_line(say, tmp_path, content, complaint):
    (tmp_path / "list.jsonl").write_bytes(content)
    status, answers, remarks = say("--prompts_file", tmp_path / "list.jsonl")
    assert (status, answers) == (2, "") and complaint in remarks and remarks.count("\n") == 1


def test_sampling_repeats_with_its_seed_only(say):
    hot = ("--temperature", "2", "--top_p", "1", "--prompt", "a")
    first, again, other = (say(*hot, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_the_help_does_not_wait_for_torch(root):
    script = "import sys, eval_model\ntry: eval_model.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.endswith("False\n") and "--max_new_tokens" in done.stdout


def test_the_web_page_is_the_servers_which_gets_the_same_flags(monkeypatch):
    from scripts import serve_openai_api

    got = []
    monkeypatch.setattr(serve_openai_api, "main", got.append)
    flags = ["--web", "--weight", "reason", "--temperature", "0.5", "--lora_path", "a.pth"]
    eval_model.main(flags)
    assert got == [flags]
    config = serve_openai_api.parse(serve_openai_api.ServeConfig, flags, description="")
    assert (config.web, config.weight, config.lora_name) == (True, ("reason",), ("a.pth",))


def test_as_a_program_from_another_folder(root, out, model, tokenizer):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}  # as bare as a container's
    flags = "--temperature 0 --max_new_tokens 8 --dtype float32 --weight full_sft_32.pth".split()
    done = subprocess.run(
        [sys.executable, root / "eval_model.py", *flags],
        cwd=out,
        env=environment,
        input="你好\n".encode(),
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.decode() == f"> 你好\n{expected(model, tokenizer, '你好')}\n\n" and done.returncode == 0


# ---- weights and their tokenizer


def test_the_mode_follows_the_weights(say, model, tokenizer):
    """Named without a mode, weights do what they were trained for last."""
    assert say("--weight", "pretrain", "--prompt", "a")[1] == expected(model, tokenizer, "a", mode=0) + "\n"
    assert say("--weight", "pretrain", "--prompt", "a", "--model_mode", 1)[1] == expected(model, tokenizer, "a") + "\n"


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--weight", "nosuch"], "no weights called 'nosuch' (nosuch_"),
        (["--weight", "there/full_sft_32.pth"], "no such file or directory"),
        (["--hidden_size", "512"], "full_sft_512.pth"),
        (["--weight", "OUT/full_sft_32.pth", "--hidden_size", "64"], "full_sft_32.pth: --hidden_size 64 (it has 32)"),
        (["--weight", "OUT/full_sft_32.pth", "--use_moe"], "--use_moe True (it has False)"),
        (["--tempratur", "1"], "did you mean temperature?"),
        (["--temperature", "-1"], "--temperature -1: must be at least 0"),
        (["--prompt", "a", "--benchmark", "tiny_world"], "give one of them"),
        (["--json", "x.json"], "--json: --eval_data or --benchmark takes it"),
        (["--device", "warp"], "--device warp"),
        (["--prompt", "a " * 40_000], "fills the model's 32768 positions"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(say, out, argv, complaint):
    argv = [word.replace("OUT", str(out)) for word in argv]
    status, answers, remarks = say(*argv, *(() if "--prompt" in argv else ("--prompt", "a")))
    assert (status, answers) == (2, "")
    assert complaint in remarks and sum("error: " in line for line in remarks.splitlines()) == 1


def test_a_wrong_tokenizer_is_refused_with_both_named(say, model, tokenizer, tmp_path):
    """MiniMind loads whatever lies in ./model: with another tokenizer of the same size every answer is noise."""
    save_weights(tmp_path / "full_sft_32.pth", model, tokenizer=dict(path="gone", hash="0123456789abcdef"), lineage=[])
    for flags in ([], ["--tokenizer_path", tokenizer.path]):
        status, _, remarks = say("--weight", tmp_path / "full_sft_32.pth", "--prompt", "a", *flags)
        assert status == 2 and "0123456789ab" in remarks and tokenizer.hash[:12] in remarks


def test_a_bare_state_dict_needs_a_tokenizer_of_its_size(say, model, tokenizer, tmp_path):
    file = tmp_path / "full_sft_32.pth"
    torch.save(model.state_dict(), file)
    status, _, remarks = say("--weight", file, "--prompt", "a")
    assert status == 2 and "--tokenizer_path" in remarks
    assert say("--weight", file, "--prompt", "a", "--tokenizer_path", tokenizer.path)[0] == 0
    for rows in (6000, 7000):
        torch.save(CausalLM(ModelConfig(vocab_size=rows, hidden_size=32, num_hidden_layers=1)).state_dict(), file)
        shutil.copytree(tokenizer.path, tmp_path / "tokenizer", dirs_exist_ok=True)  # may be another model's
        status, _, remarks = say("--weight", file, "--prompt", "a")
        assert status == 2 and f"{rows:,} token embeddings" in remarks and "6,400" in remarks


def test_embeddings_may_have_many_rows_without_a_token(say, model, tokenizer, tmp_path):
    """Rounded up to a multiple of 128, 323 tokens have 384 rows. The message was "give its own with --tokenizer_path",
    also to who had given it."""
    file, folder = tmp_path / "full_sft_32.pth", tmp_path / "hf"
    rows = torch.zeros(600, 32)
    state = {name: torch.cat([own, rows]) if len(own) == 6400 else own for name, own in model.state_dict().items()}
    torch.save(state, file)
    save_hf(folder, load_weights(file), tokenizer.path, tokenizer.stop_ids)
    for flags in (["--weight", file, "--tokenizer_path", tokenizer.path], ["--weight", folder]):
        status, answer, remarks = say(*flags, "--prompt", "a", "--temperature", 0, "--max_new_tokens", 5)
        assert status == 0, remarks
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder / "tokenizer" / name)
    status, _, remarks = say("--weight", folder, "--prompt", "a")
    assert status == 2 and "7,000 token embeddings" in remarks  # not beside the weights: perhaps not theirs


class Malice:
    def __reduce__(self):
        return os.mkdir, ("ran_from_a_weights_file",)


def test_a_damaged_or_malicious_file_is_refused(say, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (out / "full_sft_32.pth").read_bytes()
    for size in (1, 100, len(whole) // 2):
        (tmp_path / "cut_32.pth").write_bytes(whole[:size])
        status, _, remarks = say("--weight", "cut_32.pth", "--prompt", "a")
        assert status == 2 and "cut_32.pth" in remarks and remarks.count("\n") == 1
        assert "miniz" not in remarks  # half a page of what may have been the cause
    (tmp_path / "small.gguf").write_bytes(b"GGUF\x03" + bytes(100))
    status, _, remarks = say("--weight", "small.gguf", "--prompt", "a")
    assert status == 2 and "small.gguf: GGUF files are only written, not read" in remarks  # it was called damaged
    torch.save({"model.embed_tokens.weight": Malice()}, tmp_path / "bad_32.pth")
    status, _, remarks = say("--weight", "bad_32.pth", "--prompt", "a")
    assert status == 2 and "refused" in remarks and not (tmp_path / "ran_from_a_weights_file").exists()


# ---- the conversation: lines from an iterator, a screen into a string


class Scripted:
    """A session whose model says what it is told to."""

    def __init__(self, *replies, limit=1000):
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=limit))
        self.replies, self.prompts, self.speed = list(replies), [], "speed"

    def reply(self, ids, *_, **__):
        self.prompts.append(ids)
        try:
            yield from self.replies.pop(0)
        finally:
            self.left = True


class Window(io.StringIO):
    """Takes what is written; `interrupt`: Ctrl-C is pressed once this text is seen."""

    def __init__(self, interrupt=None, terminal=False):
        super().__init__()
        self.interrupt, self.terminal = interrupt, terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        super().write(text)
        if self.interrupt and self.interrupt in self.getvalue():
            self.interrupt = None
            raise KeyboardInterrupt


def talk_with(tokenizer, session, lines, window=None, **options):
    talk, window = Conversation(session, tokenizer, GREEDY, **options), window or Window()
    chat(talk, iter(lines), Screen(window, window))
    return talk, window.getvalue()


def test_the_history_and_the_commands(tokenizer):
    session = Scripted(*map(tokenizer.encode, ["one", "two", "three", "four"]))
    lines = ["a", "/system be brief", "b", "", "/system", "c", "/reset", "d", "/rest", "/help", "/exit", "never asked"]
    talk, text = talk_with(tokenizer, session, lines)
    prompts = [tokenizer.decode(ids) for ids in session.prompts]
    user, said = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"
    begin = "<|im_start|>assistant\n"
    a, b = user.format("a") + said.format("one"), user.format("b") + said.format("two")
    assert prompts == [
        user.format("a") + begin,
        "<|im_start|>system\nbe brief<|im_end|>\n" + a + user.format("b") + begin,
        a + b + user.format("c") + begin,
        user.format("d") + begin,
    ]
    assert [turn["content"] for turn in talk.turns] == ["d", "four"]
    assert "there is no /rest\n" in text and "/system <text>" in text and "never asked" not in text


def test_a_text_for_llama_begins_with_its_bos_and_keeps_its_blank(tmp_path):
    """It began with </s>, and "the cat" went on with "sat"."""
    llama = llama_like(tmp_path, "the", "cat", "sat")
    session = Scripted(llama.encode("sat"), llama.encode("the cat"))
    talk = Conversation(session, llama, GREEDY, completes=True)
    assert "".join(piece for piece, _ in talk.answer("the cat")) == " sat"
    assert session.prompts == [[BEGINS, *llama.encode("the cat")]]
    assert "".join(piece for piece, _ in talk.answer("")) == "the cat", "nothing stands before it"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(tokenizer):
    session = Scripted(tokenizer.encode("one two three four"), tokenizer.encode("fine"))
    talk, text = talk_with(tokenizer, session, ["count", "go on"], Window(interrupt="two"))
    assert [turn["content"] for turn in talk.turns] == ["count", "one two", "go on", "fine"]
    assert "(stopped) speed" in text and "three" not in text and text.endswith("fine\nspeed\n")


def test_ctrl_c_before_the_first_token_leaves_no_trace(tokenizer):
    class Slow(Scripted):
        def reply(self, ids, *_, **__):
            raise KeyboardInterrupt
            yield

    talk, text = talk_with(tokenizer, Slow(), ["count"])
    assert talk.turns == [] and "(stopped)" in text


def test_an_interrupted_answer_is_in_the_history_before_anybody_sees_the_interrupt(tokenizer):
    """Whoever holds the exception holds the generators' frames: they are closed, not left to the garbage collector."""
    talk, window = Conversation(Scripted(tokenizer.encode("one two three")), tokenizer, GREEDY), Window(interrupt="two")
    with pytest.raises(KeyboardInterrupt) as held:
        eval_model.show(talk, "count", Screen(window, window))
    assert held.tb and talk.session.left and talk.turns[1]["content"] == "one two"


@pytest.mark.parametrize("leaving", [EOFError, KeyboardInterrupt])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(monkeypatch, leaving):
    def pressed(_):
        raise leaving

    monkeypatch.setattr("builtins.input", pressed)
    assert list(eval_model.typed()) == []


def test_what_cannot_be_asked_is_said_and_the_conversation_goes_on(tokenizer):
    talk, text = talk_with(tokenizer, Scripted(tokenizer.encode("fine")), ["half \ud83d", "hello"])
    assert "error: the text holds a lone surrogate" in text and text.endswith("fine\nspeed\n")


def test_the_oldest_turns_are_forgotten_when_the_positions_end(tokenizer):
    replies = [tokenizer.encode(f"reply {i}") for i in range(12)]
    talk, _ = talk_with(tokenizer, session := Scripted(*replies, limit=100), [f"question {i}" for i in range(12)])
    assert all(len(ids) <= 75 for ids in session.prompts)
    kept = [turn["content"] for turn in talk.turns]
    assert kept[-2:] == ["question 11", "reply 11"] and kept[0].startswith("question") and 4 <= len(kept) < 24


def test_a_model_cannot_steer_the_terminal(tokenizer):
    """Title changes, colours, clipboard writes and reversed text: FastChat's terminal obeyed them (issue 88)."""
    evil = "\x1b]0;title\x07\x1b[31mred\x1b[0m\r\x9b2J\u202etxt.exe\u202c\tgood\n好"
    _, text = talk_with(tokenizer, Scripted(tokenizer.encode(evil)), ["hi"])
    assert text == "␛]0;title␇␛[31mred␛[0m␍\ufffd2J\ufffdtxt.exe\ufffd\tgood\n好\nspeed\n"


def test_thoughts_are_dim_on_a_terminal_and_plain_in_a_file(tokenizer):
    tag = tokenizer.control
    reply = [tag["<think>"], *tokenizer.encode("hm"), tag["</think>"], *tokenizer.encode("42")]
    dim = lambda text: f"\x1b[2m{text}\x1b[0m"
    for terminal in (True, False):
        _, text = talk_with(tokenizer, Scripted(list(reply)), ["q"], Window(terminal=terminal))
        pieces = [tokenizer.decode([i]) for i in reply]
        thought = "".join(map(dim if terminal else str, pieces[: pieces.index("</think>") + 1]))
        assert text == thought + "42\n" + (dim("speed") if terminal else "speed") + "\n"
    # The template may open the thought itself; the history then still has a whole think block.
    talk, text = talk_with(tokenizer, Scripted(reply[1:]), ["q"], Window(terminal=True), enable_thinking=True)
    assert text.startswith(dim("h")) and dim("</think>") + "42" in text
    assert talk.turns[1]["content"] == "<think>\nhm</think>42"


def test_the_stream_joined_is_the_decoded_reply(tokenizer):
    """Characters of two to four bytes, a family of joined emoji, and a broken byte at the end."""
    ids = tokenizer.encode("naïve 麻雀 🐦 👩‍👩‍👧 𝒳") + tokenizer.encode("🐦")[:-1]
    talk = Conversation(Scripted(ids), tokenizer, GREEDY)
    pieces = [piece for piece, _ in talk.answer("q")]
    assert "".join(pieces) == tokenizer.decode(ids) and all("\ufffd" not in piece for piece in pieces[:-1])


# ---- tools


def called(tokenizer, name, arguments):
    """The ids of a call, as a model that was trained on them writes it."""
    body = json.dumps({"name": name, "arguments": arguments})
    tags = [tokenizer.control[tag] for tag in ("<tool_call>", "</tool_call>")]
    return [tags[0], *tokenizer.encode(f"\n{body}\n"), tags[1]]


def test_tools_are_called_and_their_results_answered(tokenizer):
    call = called(tokenizer, "calculator", {"expression": "6 * 7"})
    session = Scripted(call, tokenizer.encode("It is 42."), tokenizer.encode("fine"))
    talk, text = talk_with(tokenizer, session, ["What is 6 * 7?", "thanks"], tools=TOOLS)
    assert "[calculator] 42\nIt is 42.\n" in text
    second = tokenizer.decode(session.prompts[1])
    assert '"name": "calculator"' in second.partition("user\n")[0], "the tools are described in the system turn"
    assert second.endswith("<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call><|im_end|>' in second
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    elsewhere = copy.deepcopy(TOOLS)  # of a prompt: described, and nobody here can run them
    _, text = talk_with(tokenizer, Scripted(call), ["What is 6 * 7?"], tools=elsewhere)
    assert "<tool_call>" in text and "[calculator]" not in text
    # without --tools the same answer is text, and nothing is called
    _, text = talk_with(tokenizer, Scripted(call), ["What is 6 * 7?"])
    assert "[calculator]" not in text and "<tool_call>" in text


def test_a_model_that_only_calls_tools_is_stopped(tokenizer):
    call = called(tokenizer, "evil\x1b[31m", {"a": "\u202e"})
    session = Scripted(*[list(call) for _ in range(9)])
    talk, text = talk_with(tokenizer, session, ["go"], tools=TOOLS)
    assert len(session.prompts) == ROUNDS + 1 and text.count("error: there is no tool") == ROUNDS
    assert f"(it may call tools {ROUNDS} times)" in text and "\x1b" not in text and "\u202e" not in text


def test_with_tools_the_oldest_question_goes_with_all_that_belongs_to_it(tokenizer):
    call = called(tokenizer, "date", {})
    replies = [reply for i in range(4) for reply in (list(call), tokenizer.encode(f"reply {i}"))]
    session = Scripted(*replies, limit=420)
    talk, _ = talk_with(tokenizer, session, [f"question {i}" for i in range(4)], tools=TOOLS)
    roles = [turn["role"] for turn in talk.turns]
    assert roles == ["user", "assistant", "tool", "assistant"] * (len(roles) // 4) and 4 <= len(roles) < 16
    assert talk.turns[-1]["content"] == "reply 3"


# ---- the exam


def test_the_exam_report(say, monkeypatch, tmp_path):
    """Right answers to everything about sums and nothing else: 2 x 40 of 600 questions, about the world asked for."""
    questions, other_world = exam.draw_questions(3, 5), exam.draw_questions(0, 5)
    assert len({q.prompt for q in questions if q.kind == "fact"} & {q.prompt for q in other_world}) < 100
    known = {q.prompt: q.answer for q in questions if q.kind == "sum"}
    monkeypatch.setattr(benchmark, "answer", lambda model, tokenizer, prompts: [known.get(p, "?") for p in prompts])
    monkeypatch.setattr(exam, "nearest_row_baseline", lambda asked, _: exam.scores(asked, ["?"] * 600))
    worlds = []
    monkeypatch.setattr(benchmark, "generate_world", lambda *words: worlds.append(words) or {"sft": None})
    flags = ["--question_seed", 5, "--world_seed", 3, "--json", tmp_path / "figures.json"]
    status, table, _ = say("--benchmark", "tiny_world", *flags)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert status == 0 and "13.3% of all questions" in table and "most frequent" in table
    assert figures["later"] == {"steps": 0, "identity": 0, "manner": 0} and "identity 0.0%" in table
    assert figures["score"] == 80 / 600 and len(figures["answers"]) == 840
    assert (figures["world_seed"], figures["question_seed"]) == (3, 5)
    [(folder, seed, files)] = worlds
    assert (seed, files) == (3, ("sft",)) and not Path(folder).exists(), "a world that is trained on stays as it is"
    assert figures["scores"]["model"]["sum zh"] == 1 and figures["scores"]["model"]["fact en"] == 0
    assert figures["lineage"][-1]["stage"] == "full_sft"


def test_weights_in_int8_and_guessed_tokens(say, model, tokenizer):
    quick = ["--quantize", "int8", "--prompt_lookup_num_tokens", 4, "--prompt", "你好", "--device", "cpu"]
    status, answer, remarks = say(*quick)
    packed = prepare_for_inference(copy.deepcopy(model), torch.float32)
    said = quantize_for_cpu(packed, "int8")
    assert (status, answer) == (0, expected(packed, tokenizer, "你好") + "\n") and said in remarks
    status, _, remarks = say(*quick, "--load_in_4bit")
    assert status == 2 and "--quantize: keeps the weights in other 4 or 8 bits" in remarks


def test_in_bf16_it_is_the_model_that_was_trained(out):
    """Norms, routers and RoPE's frequencies are fp32 in training; rounding those put tokens 500 apart at 0.8 rad."""
    config = parse(eval_model.EvalConfig, ["--save_dir", str(out), "--dtype", "bfloat16", "--device", "cpu"])
    model, *_ = eval_model.load(config, eval_model.Screen(io.StringIO(), io.StringIO()))
    exact = load_weights(out / "full_sft_32.pth").build()
    assert torch.equal(model.rope_frequencies, exact.rope_frequencies)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.down_proj.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    exact.compute_dtype = torch.bfloat16  # fp32 weights, cast as they are used
    tokens = torch.arange(200).view(2, 100)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, exact(tokens).logits)


@pytest.mark.parametrize(
    "flags, complaint",
    (
        (["--lora_path", "nothere"], "nothere: no such file or directory"),
        (["--weight", "Qwen/Qwen2-0.5B"], "Qwen/Qwen2-0.5B: no such file or directory; as a model on a hub: HF_H"),
        (["--weight", "pretrain", "--use_moe", "true"], "no weights called 'pretrain' (pretrain_<hidden>_moe.pth)"),
        pytest.param(
            ["--weight", "full_dist"],
            "trainer/train_distillation.py makes them; of others, downloaded ones",
            marks=pytest.mark.skipif(any(ROOT.glob("out/full_dist_*")), reason="some have been made here"),
        ),
        (["--model_mode", "0", "--system", "be brief"], "--system: --model_mode 0 continues a text"),
        (["--benchmark", "tiny_world", "--system", "be brief"], "--system: the exam is always asked in the same way"),
        (
            ["--benchmark", "tiny_world", "--temperature", "1"],
            "--temperature: the exam is always asked in the same",
        ),
        (["--benchmark", "tiny_world", "--max_length", "9"], "--max_new_tokens: the exam is always asked in the same"),
        (["--base_model", "x"], "--base_model x: python scripts/compare_models.py compares models"),
        (["--prompts_file", "nothere.json"], "nothere.json: no such file"),
    ),
)
def test_what_is_not_there_ends_in_one_line(say, flags, complaint):
    status, out, err = say(*flags, *([] if {"--prompts_file", "--benchmark"} & {*flags} else ["--prompt", "hi"]))
    assert status == 2 and not out and err.startswith("error: ") and complaint in err and err.count("\n") == 1, err


def test_a_folder_with_an_adapter_names_the_flag_that_takes_it(say, tmp_path):
    """`--model_path DIR` after LoRA into DIR: there was no word about --lora_path."""
    (tmp_path / "lora_model").mkdir()
    (tmp_path / "lora_model/adapter_config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "lora_model", tmp_path / "final_model"):
        status, _, err = say("--weight", path, "--prompt", "hi")
        assert status == 2
        assert f"{tmp_path / 'lora_model'} is an adapter, which eval_model.py takes as --lora_path" in err


def test_minimind_s_flags_pass_with_a_note(say):
    status, _, err = say("--stream", "1", "--history_cnt", "4", "--prompt", "hi", "--weight", "full_sft")
    assert status == 0 and "note: --stream: answers are always streamed" in err and "/reset forgets it" in err
