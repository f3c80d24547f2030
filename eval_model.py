"""Talk to a model, let it answer a list of prompts, or measure it. A weights file says itself what it is.

    python eval_model.py --model_mode 1                            # chat with the newest full_sft_*.pth in out/
    python eval_model.py --model_mode 0 --prompt "Once upon"       # one answer: how the pretrained model goes on
    python eval_model.py --weight out/reason_512.pth < prompts.txt # a prompt a line
    python eval_model.py --lora_name lora_medical                  # with an adapter, on the weights it belongs to
    python eval_model.py --benchmark tiny_world                    # the built-in exam: 600 questions, seconds on a CPU
    python eval_model.py --eval_data val.jsonl --metrics ppl,bleu  # on a file of yours, with error bars

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

from common.console import UserError, printable, run
from common.files import ROOT
from common.options import option, parse
from inference.options import DeviceOptions, LowBitOptions, SamplingOptions

if TYPE_CHECKING:  # torch is imported after the command line is checked: --help is instant
    from inference.sampling import Sampling
    from inference.session import Session
    from model.adapter import AdapterFile
    from model.checkpoint import Checkpoint
    from model.transformer import CausalLM
    from tokenizer.text import Tokenizer

MODES = ("pretrain", "full_sft", "rlhf", "reason")
COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "/system <text> sets the system prompt, /system alone removes it",
    "/help": "this list; Ctrl-C stops an answer, Ctrl-D leaves",
    "/exit": "leave",
}


def compares(_value: object) -> dict:
    """For options of another script."""
    raise UserError("python scripts/compare_models.py compares models, with the same flags")


@dataclass(frozen=True)
class EvalConfig(DeviceOptions, LowBitOptions, SamplingOptions):
    """Options of this script"""

    needless: ClassVar[dict[str, str]] = {
        "stream": "answers are always streamed",
        "show_speed": "the speed is always shown in a conversation",
        "load": "a file says itself what it holds",
        "interactive": "without --prompt it is a conversation",
        "trust_remote_code": "no code of a model's repository is ever run",
        **dict.fromkeys(("history_cnt", "historys"), "the conversation is kept as far as it fits; /reset forgets it"),
    }
    translated: ClassVar[dict[str, Callable]] = dict.fromkeys(("base_model", "finetuned_model"), compares)

    model_mode: int | None = option(
        None,
        "0 pretrain completes text; 1 full_sft, 2 rlhf, 3 reason chat (default: 1 or "
        "what the named weights were trained for)",
        within="[0, 3]",
    )
    weight: str | None = option(
        None,
        "a name in save_dir or out/, a file or a directory (default: the mode's name)",
        aliases=("model_path", "model_name_or_path", "from_weight"),
    )
    lora_name: str | None = option(None, "an adapter in lora/ there, on the weights it was trained on")
    lora_path: str | None = option(None, "an adapter's file, or peft's directory", path=True)
    merge_lora: bool = option(False, "add the adapter to the weights first: faster")
    save_dir: str = option(str(ROOT / "out"), "where names are looked up", aliases=("out_dir",), path=True)
    hidden_size: int | None = option(None, "only picks among weights, which know their architecture", within="[1, inf)")
    num_hidden_layers: int | None = option(None, "as hidden_size", within="[1, inf)")
    use_moe: bool | None = option(None, "as hidden_size")
    tokenizer_path: str | None = option(None, "directory of the tokenizer (default: the weights know)", path=True)
    prompt: str = option("", "answer this and exit")
    prompts_file: str | None = option(None, "answer these: .txt with one a line, .jsonl or .json", path=True)
    eval_data: tuple[str, ...] = option(
        (), "measure the model on these files", path=True, aliases=("test_data", "test_file", "eval_file")
    )
    metrics: tuple[str, ...] = option(
        (), "ppl, bpb, bleu, rouge, exact, f1, number, choice, letter, ... (default: what the files allow)"
    )
    data_limit: int = option(0, "use only the first N rows of each file", aliases=("max_samples",), within="[0, inf)")
    window: int = option(512, "tokens of a document that are read together", within="[2, inf)")
    against: str | None = option(None, "an earlier --json: print the change, with error bars", path=True)
    benchmark: str | None = option(None, "score the model on an exam", choices=("tiny_world",))
    question_seed: int = option(0, "another one draws other exam questions", within="[0, inf)")
    json: str | None = option(None, "write figures and answers to this file", path=True, aliases=("output_file",))
    png: str | None = option(None, "draw the figures of --eval_data into this file", path=True)
    web: bool = option(False, "talk in the browser: starts scripts/serve_openai_api.py, which gets all flags")
    system: str = option("", "system prompt")
    enable_thinking: bool | None = option(None, "let the model think first, or keep it from it")
    max_new_tokens: int | None = option(
        None,
        "longest answer (default: 1024; of --eval_data 256)",
        aliases=("max_length", "max_seq_len"),
        within="[1, inf)",
    )
    temperature: float | None = option(
        None, "0 always takes the likeliest token (default: 0.85; of --eval_data 0)", within="[0, inf)"
    )
    seed: int | None = option(None, "makes answers repeatable", within="[0, inf)")

    def problems(self) -> list[str]:
        found = super().problems()
        tasks = [f"--{name}" for name in ("prompt", "prompts_file", "benchmark", "eval_data") if getattr(self, name)]
        if len(tasks) > 1:
            found.append(f"{' and '.join(tasks)}: each is a task of its own; give one of them")
        if self.lora_name and self.lora_path:
            found.append("--lora_name and --lora_path: both name an adapter; give one of them")
        if self.merge_lora and not (self.lora_name or self.lora_path):
            found.append("--merge_lora: needs --lora_name or --lora_path")
        if self.model_mode == 0 and (self.system or self.enable_thinking is not None):
            what = "system" if self.system else "enable_thinking"
            found.append(f"--{what}: --model_mode 0 continues a text, without turns; chat with --model_mode 1")
        if self.metrics:
            from evaluation.metrics import chosen

            chosen(self.metrics)
        idle = [] if self.eval_data else ["metrics", "png", "against", "data_limit"]
        idle += [] if self.benchmark else ["question_seed"]
        idle += [] if self.eval_data or self.benchmark else ["json"]
        takes = {"json": "--eval_data or --benchmark takes", "question_seed": "only --benchmark takes"}
        found += [f"--{name}: {takes.get(name, 'only --eval_data takes')} it" for name in idle if getattr(self, name)]
        return found


# ---- weights and their tokenizer


def load(config: EvalConfig, screen: Screen) -> tuple[CausalLM, Tokenizer, Checkpoint]:
    from model.checkpoint import check_stated, find_tokenizer
    from model.lora import merge
    from model.precision import pick_device, pick_dtype, prepare_for_inference
    from model.quant import choose_bits

    checkpoint, adapter = find_checkpoint(config)
    check_stated(checkpoint, **{k: getattr(config, k) for k in ("hidden_size", "num_hidden_layers", "use_moe")})
    tokenizer = find_tokenizer(checkpoint, config.tokenizer_path)
    device = pick_device(config.device)
    dtype, remark = pick_dtype(config.dtype, device)
    bits = choose_bits(config.load_in_4bit, config.load_in_8bit, adapter.bits if adapter else None)
    if adapter and config.merge_lora and not bits:
        model = checkpoint.build()  # merged in fp32, before the weights are rounded to the compute dtype
    else:
        model = checkpoint.build(dtype, bits, device)
    if adapter:
        model = adapter.apply(model)
        if config.merge_lora:
            merge(model)
        merged = ", merged" if config.merge_lora else ""
        kept = f" in {bits} bits" + (", as it was trained" if bits == adapter.bits else "") if bits else ""
        screen.note(f"{adapter.path}: rank {adapter.settings.rank}{merged}, on its base {checkpoint.path}{kept}")
        checkpoint.lineage = adapter.lineage or checkpoint.lineage
    model = prepare_for_inference(model, dtype).to(device)
    screen.note("\n".join(filter(None, (checkpoint.describe(model), remark))))
    return model, tokenizer, checkpoint


def find_checkpoint(config: EvalConfig) -> tuple[Checkpoint, AdapterFile | None]:
    """The weights, and the adapter that is put on them. An adapter's weights are those it was trained on, whatever
    --model_mode says; with another --weight it is an error."""
    from model.adapter import find_base, load_adapter
    from model.checkpoint import find_weights, load_weights

    folders, pick = (Path(config.save_dir), ROOT / "out"), dict(hidden_size=config.hidden_size, moe=config.use_moe)
    name = config.weight or MODES[1 if config.model_mode is None else config.model_mode]
    if not (config.lora_name or config.lora_path):
        return load_weights(find_weights(name, *folders, **pick)), None
    own = [folder / (config.lora_name or "") for folder in folders]  # where scripts/lora_quickstart.py writes
    places = [folder / "lora" for folder in (*folders, *own)]
    adapter = load_adapter(config.lora_path or find_weights(config.lora_name, *places, **pick))
    named = find_weights(name, *folders, **pick) if config.weight or not adapter.knows_base else None
    base = find_base(adapter, named, *folders)
    base.tokenizer = base.tokenizer or adapter.tokenizer  # a base of MiniMind's does not tell
    return base, adapter


# ---- a conversation


@dataclass
class Conversation:
    """The messages so far, and how they become a prompt. `session` (inference/session.py) computes the answers."""

    session: Session
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int = 1024
    completes: bool = False  # continues a text instead of answering a message
    system: str = ""
    enable_thinking: bool | None = None
    turns: list[dict] = field(default_factory=list)

    def answer(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yields (piece of text, whether it is a thought). Also an interrupted answer is kept in the history."""
        limit = self.session.model.config.max_position_embeddings
        while len(ids := self.encode(text)) > limit - min(self.max_new_tokens, limit // 4) and self.turns:
            del self.turns[:2]  # forget the oldest question and its answer
        if len(ids) >= limit:
            raise UserError(f"a prompt of {len(ids)} tokens fills the model's {limit} positions: shorten it")
        return self._stream(text, ids, min(self.max_new_tokens, limit - len(ids)))

    def encode(self, text: str) -> list[int]:
        if self.completes:  # as in pretraining, where a document follows the end of another
            return [self.tokenizer.end_of_text, *self.tokenizer.encode(text)]
        from tokenizer.chat import encode_chat

        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns, {"role": "user", "content": text}]
        prompt = dict(add_generation_prompt=True, enable_thinking=self.enable_thinking)
        return encode_chat(self.tokenizer, messages, **prompt).ids

    def _stream(self, text: str, ids: list[int], room: int) -> Iterator[tuple[str, bool]]:
        opens, closes = (self.tokenizer.control.get(tag) for tag in ("<think>", "</think>"))
        begun = thinking = next((token == opens for token in reversed(ids) if token in (opens, closes)), False)
        stream, said = self.tokenizer.stream(), []
        reply = self.session.reply(ids, self.sampling, max_new_tokens=room, stop=self.tokenizer.stop_ids)
        try:
            for token in reply:
                said.append(token)
                thought = thinking or token == opens
                thinking = thought and token != closes
                yield stream.push(token), thought
            yield stream.flush(), thinking
        finally:
            if said and not self.completes:
                content = ("<think>\n" if begun else "") + self.tokenizer.decode(said)
                self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": content}]


@dataclass(frozen=True)
class Screen:
    """Where this script prints: answers to `out`, remarks to `notes`."""

    out: TextIO
    notes: TextIO

    def write(self, text: str, dim: bool = False) -> None:
        self._print(text, dim, self.out)

    def note(self, text: str) -> None:
        self._print(text, True, self.notes)
        self._print("\n", False, self.notes)

    @staticmethod
    def _print(text: str, dim: bool, out: TextIO) -> None:
        text = printable(text)
        dim = dim and text and out.isatty() and not os.environ.get("NO_COLOR")
        out.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
        out.flush()


def show(talk: Conversation, text: str, screen: Screen) -> None:
    """Prints one answer as it is made. Ctrl-C raises KeyboardInterrupt after the history is completed."""
    with closing(talk.answer(text)) as pieces:
        for piece, thought in pieces:
            screen.write(piece, dim=thought)


def chat(talk: Conversation, lines: Iterable[str], screen: Screen) -> None:
    """Answers line after line. Ctrl-C stops the answer, not the conversation."""
    for line in map(str.strip, lines):
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return
        if word in COMMANDS or re.fullmatch(r"/[a-z]+", line):
            screen.note(run_command(talk, word, rest.strip()))
        elif line:
            ended = ""
            try:
                show(talk, line, screen)
            except KeyboardInterrupt:
                ended = "(stopped) "
            except ValueError as error:  # a text that cannot be encoded, or is too long
                screen.note(f"error: {error}")
                continue
            screen.write("\n")
            screen.note(ended + talk.session.speed)


def run_command(talk: Conversation, word: str, rest: str) -> str:
    """Runs a /command -> a remark to print."""
    if word == "/reset":
        talk.turns.clear()
        return "the conversation begins anew"
    if word == "/system":
        talk.system = rest
        return f"system prompt: {rest}" if rest else "no system prompt"
    unknown = "" if word == "/help" else f"there is no {word}\n"
    return unknown + "\n".join(f"{name:<9}{meaning}" for name, meaning in COMMANDS.items())


def typed() -> Iterator[str]:
    """Lines typed at the prompt, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() arrow keys and a history)
    while True:
        try:
            yield input(">>> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


# ---- without a terminal


def read_lines(file: Iterable[str]) -> Iterator[str]:
    """The prompts on standard input."""
    try:
        yield from filter(None, map(str.strip, file))
    except UnicodeDecodeError:
        raise UserError("standard input: not UTF-8; save it as UTF-8") from None


def answer_all(talk: Conversation, prompts: Iterable[str], screen: Screen) -> None:
    """Answers each prompt on its own, without the ones before. Never waits for input."""
    answered = False
    for prompt in prompts:
        talk.turns.clear()
        screen.write(f"> {prompt}\n")
        show(talk, prompt, screen)
        screen.write("\n\n")
        answered = True
    if not answered:
        raise UserError("there is no prompt to answer; give --prompt or --prompts_file, or run it in a terminal")


# ---- main


def main(argv: list[str] | None = None) -> None:
    config = parse(EvalConfig, argv, description=__doc__)
    if config.web:
        from scripts.serve_openai_api import main as serve

        return serve(argv)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    for stream in (sys.stdin, sys.stdout):  # pipes are UTF-8; at a terminal, bytes that are no character are replaced
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**{"errors": "replace"} if stream.isatty() else {"encoding": "utf-8"})
    screen, prompts = Screen(sys.stdout, sys.stderr), None
    if config.prompts_file:  # read before the model is loaded, so that a mistake in it shows at once
        from dataset.read.questions import read_questions

        prompts = [question.asked for question in read_questions(config.prompts_file)]
    elif not interactive:
        prompts = read_lines(sys.stdin or ())
    model, tokenizer, checkpoint = load(config, screen)
    stages = [entry.get("stage") for entry in checkpoint.lineage]
    completes = config.model_mode == 0 or config.model_mode is None and stages[-1:] == ["pretrain"]
    if config.benchmark or config.eval_data:
        from evaluation.run import evaluate

        return evaluate(model, tokenizer, checkpoint, config, completes, screen.write)
    from inference.session import Session

    sampling = config.sampling(config.seed)
    said = dict(completes=completes, system=config.system, enable_thinking=config.enable_thinking)
    talk = Conversation(Session(model), tokenizer, sampling, config.max_new_tokens or 1024, **said)
    if config.prompt:
        show(talk, config.prompt, screen)
        screen.write("\n")
    elif prompts is not None:
        answer_all(talk, prompts, screen)
    else:
        screen.note(("each line is continued; " if completes else "") + "/help lists the commands, Ctrl-D leaves")
        chat(talk, typed(), screen)


if __name__ == "__main__":
    run(main)
