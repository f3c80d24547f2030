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

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from common.console import UserError, run
from common.files import ROOT
from common.options import option, parse
from common.values import SEEDS
from inference.conversation import Conversation
from inference.options import MODES, EngineOptions, LowBitOptions, SamplingOptions
from inference.terminal import Screen, answer_all, chat, read_lines, show, typed
from inference.tools import TOOLS

if TYPE_CHECKING:  # torch is imported after the command line is checked: --help is instant
    from model.adapter import AdapterFile
    from model.checkpoint import Checkpoint
    from model.transformer import CausalLM
    from tokenizer.text import Tokenizer


def compares(_value: object) -> dict:
    """For options of another script."""
    raise UserError("python scripts/compare_models.py compares models, with the same flags")


@dataclass(frozen=True)
class EvalConfig(LowBitOptions, SamplingOptions, EngineOptions):
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
    prompts_file: str | None = option(
        None, "answer these: .txt with one a line; .jsonl or .json, also with earlier turns", path=True
    )
    eval_data: tuple[str, ...] = option(
        (), "measure the model on these files", path=True, aliases=("test_data", "test_file", "eval_file")
    )
    metrics: tuple[str, ...] = option(
        (), "ppl, bpb, bleu, rouge, exact, f1, number, choice, letter, ... (default: what the files allow)"
    )
    data_limit: int = option(0, "use only the first N rows of each file", aliases=("max_samples",), within="[0, inf)")
    num_fewshot: int = option(
        0, "show N solved questions of the dev file before each one of multiple choice", within="[0, inf)"
    )
    window: int = option(512, "tokens of a document that are read together", within="[2, inf)")
    against: str | None = option(None, "an earlier --json: print the change, with error bars", path=True)
    benchmark: str | None = option(None, "score the model on an exam", choices=("tiny_world",))
    question_seed: int = option(0, "another one draws other exam questions", within=SEEDS)
    world_seed: int = option(0, "the exam is about this world: --seed of dataset/tiny_world", within=SEEDS)
    json: str | None = option(None, "write figures and answers to this file", path=True, aliases=("output_file",))
    png: str | None = option(None, "draw the figures of --eval_data into this file", path=True)
    web: bool = option(False, "talk in the browser: starts scripts/serve_openai_api.py with these flags; it has more")
    system: str = option("", "system prompt")
    tools: str | None = option(None, "let the model call tools: a calculator and the date", choices=("demo",))
    enable_thinking: bool | None = option(
        None, "true: the model reasons first; false: it answers at once (default: up to the model)"
    )
    max_new_tokens: int | None = option(
        None,
        "longest answer (default: 1024; of --eval_data 256)",
        aliases=("max_length", "max_seq_len"),
        within="[1, inf)",
    )
    temperature: float | None = option(
        None, "0 always takes the likeliest token (default: 0.85; of --eval_data 0)", within="[0, inf)"
    )
    seed: int | None = option(None, "makes answers repeatable", within=SEEDS)

    def problems(self) -> list[str]:
        found = super().problems()
        tasks = [f"--{name}" for name in ("prompt", "prompts_file", "benchmark", "eval_data") if getattr(self, name)]
        if len(tasks) > 1:
            found.append(f"{' and '.join(tasks)}: each is a task of its own; give one of them")
        if self.lora_name and self.lora_path:
            found.append("--lora_name and --lora_path: both name an adapter; give one of them")
        if self.merge_lora and not (self.lora_name or self.lora_path):
            found.append("--merge_lora: needs --lora_name or --lora_path")
        chats = dict(system=self.system, tools=self.tools, enable_thinking=self.enable_thinking is not None)
        if self.model_mode == 0 and (what := next(filter(chats.get, chats), None)):
            found.append(f"--{what}: --model_mode 0 continues a text, without turns; chat with --model_mode 1")
        drawn = dict(temperature=self.temperature, max_new_tokens=self.max_new_tokens)
        if self.benchmark and (what := next(filter((chats | drawn).get, chats | drawn), None)):
            found.append(f"--{what}: the exam is always asked in the same way, without it; leave it out")
        if self.metrics:
            from evaluation.metrics import chosen

            chosen(self.metrics)
        if self.eval_data:  # before a model is loaded
            from dataset.read.jsonl import require_file

            for path in self.eval_data:
                require_file(path)
        idle = [] if self.eval_data else ["metrics", "png", "against", "data_limit", "num_fewshot", "window"]
        idle += [] if self.benchmark else ["question_seed", "world_seed"]
        idle += [] if self.eval_data or self.benchmark else ["json"]
        exam = dict.fromkeys(("question_seed", "world_seed"), "only --benchmark takes")
        takes = exam | {"json": "--eval_data or --benchmark takes"}
        idle = [name for name in idle if getattr(self, name) != getattr(EvalConfig, name)]
        found += [f"--{name}: {takes.get(name, 'only --eval_data takes')} it" for name in idle]
        return found


# ---- weights and their tokenizer


def load(config: EvalConfig, screen: Screen) -> tuple[CausalLM, Tokenizer, Checkpoint]:
    from model.checkpoint import check_stated, find_tokenizer
    from model.lora import merge
    from model.precision import pick_device, pick_dtype, prepare_for_inference
    from model.quant import choose_bits
    from model.quant_cpu import quantize_for_cpu

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
        on = f"{checkpoint.path}{adapter.kept(bits)}"
        screen.note(f"{adapter.path}: rank {adapter.settings.rank}{merged}, on its base {on}")
        checkpoint.lineage = adapter.lineage or checkpoint.lineage
    model = prepare_for_inference(model, dtype).to(device)
    packed = quantize_for_cpu(model, config.quantize) if config.quantize else ""
    screen.note("\n".join(filter(None, (checkpoint.describe(model), packed, remark))))
    if adapter:
        checkpoint.path = adapter.path  # results are of the adapter, not of its base
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
    return find_base(adapter, named, *folders), adapter


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

        prompts = [(question.messages, question.tools) for question in read_questions(config.prompts_file)]
    elif not interactive:
        prompts = ((messages, None) for messages in read_lines(sys.stdin or ()))
    model, tokenizer, checkpoint = load(config, screen)
    stages = [entry.get("stage") for entry in checkpoint.lineage]
    completes = config.model_mode == 0 or config.model_mode is None and stages[-1:] == ["pretrain"]
    if config.benchmark or config.eval_data:
        from evaluation.run import evaluate

        return evaluate(model, tokenizer, checkpoint, config, completes, screen.write)
    from inference.session import Session

    sampling = config.sampling(config.seed)
    said = dict(completes=completes, system=config.system, enable_thinking=config.enable_thinking)
    said |= dict(tools=TOOLS if config.tools else None)
    session = Session(model, config.prompt_lookup_num_tokens)
    talk = Conversation(session, tokenizer, sampling, config.max_new_tokens or 1024, **said)
    if config.prompt:
        show(talk, config.prompt, screen)
        screen.write("\n")
    elif prompts is not None:
        answer_all(talk, prompts, screen)
    else:
        hint = "/help lists the commands, Ctrl-D leaves; --web talks in the browser"
        screen.note(("each line is continued; " if completes else "") + hint)
        chat(talk, typed(), screen)


if __name__ == "__main__":
    run(main, smaller="keep the weights in fewer bits (--load_in_4bit)")
