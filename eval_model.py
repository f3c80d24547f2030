"""Talk to a model, let it answer a list of prompts, or measure it. A weights file says itself what it is.

    python eval_model.py --model_mode 1                            # chat with the newest full_sft_*.pth in out/
    python eval_model.py --model_mode 0 --prompt "Once upon"       # one answer: how the pretrained model goes on
    python eval_model.py --weight out/reason_512.pth < prompts.txt # a prompt a line
    python eval_model.py --lora_name lora_medical                  # with an adapter, on the weights it belongs to
    python eval_model.py --benchmark tiny_world                    # the built-in exam: 600 questions, seconds on a CPU

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

from common.console import UserError, printable, run
from common.files import ROOT
from common.options import Options, option, parse

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


@dataclass(frozen=True)
class EvalConfig(Options):
    """Options of this script"""

    needless: ClassVar[dict[str, str]] = {
        "stream": "answers are always streamed",
        "show_speed": "the speed is always shown in a conversation",
        "load": "a file says itself what it holds",
        "interactive": "without --prompt it is a conversation",
        "trust_remote_code": "no code of a model's repository is ever run",
        **dict.fromkeys(("history_cnt", "historys"), "the conversation is kept as far as it fits; /reset forgets it"),
    }
    missing: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("base_model", "finetuned_model"), "comparing two models side by side is"),
        "metrics": "BLEU, ROUGE and the like are",
    }

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
    prompts_file: str | None = option(
        None, 'answer a prompt a line, or the "prompt" of each line of a .jsonl', path=True
    )
    benchmark: str | None = option(None, "score the model on an exam", choices=("tiny_world",))
    question_seed: int = option(0, "another one draws other exam questions", within="[0, inf)")
    json: str | None = option(None, "write the benchmark's figures and replies to this file", path=True)
    system: str = option("", "system prompt")
    enable_thinking: bool | None = option(None, "let the model think first, or keep it from it")
    max_new_tokens: int = option(1024, "longest answer", aliases=("max_length", "max_seq_len"), within="[1, inf)")
    temperature: float = option(0.85, "0 always takes the likeliest token", within="[0, inf)")
    top_p: float = option(0.85, "draw from the likeliest tokens with this total probability", within="(0, 1]")
    top_k: int = option(0, "draw from the K likeliest tokens (0: all)", within="[0, inf)")
    repetition_penalty: float = option(1.0, "above 1: fewer repetitions", within="(0, inf)")
    seed: int | None = option(None, "makes answers repeatable", within="[0, inf)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = option(
        "auto",
        "precision of the weights",
        choices=("auto", "float32", "bfloat16", "float16"),
        aliases=("bf16=bfloat16|float32", "fp16=float16|float32", "torch_dtype"),
    )

    def problems(self) -> list[str]:
        found = super().problems()
        tasks = [f"--{name}" for name in ("prompt", "prompts_file", "benchmark") if getattr(self, name)]
        if len(tasks) > 1:
            found.append(f"{' and '.join(tasks)}: each is a task of its own; give one of them")
        if self.lora_name and self.lora_path:
            found.append("--lora_name and --lora_path: both name an adapter; give one of them")
        if self.merge_lora and not (self.lora_name or self.lora_path):
            found.append("--merge_lora: needs --lora_name or --lora_path")
        if self.model_mode == 0 and (self.system or self.enable_thinking is not None):
            what = "system" if self.system else "enable_thinking"
            found.append(f"--{what}: --model_mode 0 continues a text, without turns; chat with --model_mode 1")
        if (self.prompts_file or "").endswith(".json"):
            found.append(f'--prompts_file {self.prompts_file}: a prompt a line, or a .jsonl of rows with "prompt"')
        if self.benchmark is None and (self.json or self.question_seed):
            found.append(f"--{'json' if self.json else 'question_seed'}: only --benchmark takes it")
        return found


# ---- weights and their tokenizer


def load(config: EvalConfig, screen: Screen) -> tuple[CausalLM, Tokenizer, Checkpoint]:
    from model.checkpoint import check_stated, find_tokenizer
    from model.lora import merge
    from model.precision import pick_device, pick_dtype, prepare_for_inference

    checkpoint, adapter = find_checkpoint(config)
    check_stated(checkpoint, **{k: getattr(config, k) for k in ("hidden_size", "num_hidden_layers", "use_moe")})
    tokenizer = find_tokenizer(checkpoint, config.tokenizer_path)
    device = pick_device(config.device)
    dtype, remark = pick_dtype(config.dtype, device)
    if adapter and config.merge_lora:
        model = checkpoint.build()  # merged in fp32, before the weights are rounded to the compute dtype
    else:
        model = checkpoint.build(dtype, device=device)
    if adapter:
        model = adapter.apply(model)
        if config.merge_lora:
            merge(model)
        merged = ", merged" if config.merge_lora else ""
        screen.note(f"{adapter.path}: rank {adapter.settings.rank}{merged}, on its base {checkpoint.path}")
        checkpoint.lineage = adapter.lineage or checkpoint.lineage
    model = prepare_for_inference(model, dtype).to(device)
    screen.note("\n".join(filter(None, (describe(checkpoint, model), remark))))
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


def describe(checkpoint: Checkpoint, model: CausalLM) -> str:
    shape, weight = checkpoint.config, model.model.embed_tokens.weight
    stages = " -> ".join(entry.get("stage", "?") for entry in checkpoint.lineage) or "of unknown training"
    experts = f", {shape.num_experts} experts" if shape.num_experts else ""
    return (
        f"{checkpoint.path}: {model.num_parameters() / 1e6:.1f}M parameters ({shape.num_hidden_layers} layers of "
        f"{shape.hidden_size}{experts}); {stages}; {str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    )


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


def read_prompts(file: Iterable[str], name: str) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if line := line.strip():
                yield _prompt_of(line, f"{name}:{number}") if name.endswith(".jsonl") else line
    except UnicodeDecodeError:
        after = f" after line {number}" if number else ""
        raise UserError(f"{name}: not UTF-8{after}; save it as UTF-8") from None


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: expected {{"prompt": "..."}}, found {line:.60}')
    return row["prompt"]


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


def measure(model: CausalLM, tokenizer: Tokenizer, checkpoint: Checkpoint, config: EvalConfig, screen: Screen) -> None:
    from evaluation.benchmark import run_benchmark

    result = run_benchmark(model, tokenizer, config.question_seed)
    screen.write(f"{result['table']}\n{result['score']:.1%} of all questions, answered in {result['seconds']} s\n")
    if config.json:
        from common.files import atomic_file

        with atomic_file(Path(config.json)) as temporary:
            content = {"weights": str(checkpoint.path), "lineage": checkpoint.lineage, **result}
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    config = parse(EvalConfig, argv, description=__doc__)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    for stream in (sys.stdin, sys.stdout):  # pipes are UTF-8; at a terminal, bytes that are no character are replaced
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**{"errors": "replace"} if stream.isatty() else {"encoding": "utf-8"})
    screen, prompts = Screen(sys.stdout, sys.stderr), None
    if config.prompts_file:  # read before the model is loaded, so that a mistake in it shows at once
        with open(config.prompts_file, encoding="utf-8-sig") as file:
            prompts = list(read_prompts(file, config.prompts_file))
    elif not interactive:
        prompts = read_prompts(sys.stdin or (), "standard input")
    model, tokenizer, checkpoint = load(config, screen)
    if config.benchmark:
        return measure(model, tokenizer, checkpoint, config, screen)
    from inference.sampling import Sampling
    from inference.session import Session

    stages = [entry.get("stage") for entry in checkpoint.lineage]
    completes = config.model_mode == 0 or config.model_mode is None and stages[-1:] == ["pretrain"]
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.repetition_penalty, config.seed)
    said = dict(completes=completes, system=config.system, enable_thinking=config.enable_thinking)
    talk = Conversation(Session(model), tokenizer, sampling, config.max_new_tokens, **said)
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
