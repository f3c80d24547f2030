"""One answer at a time on a CPU: bf16, int8 and int4 weights against `transformers` in bf16 and llama.cpp in q8_0.

    python benchmarks/decode.py                                        # `small` with random weights
    python benchmarks/decode.py --weight out/full_sft_512.pth --threads 2 --rounds 5
    python benchmarks/decode.py --preset nano --new 16 --rounds 1      # to see that it runs

All sides have the same weights and prompts, decode greedily, and write exactly --new tokens. Rounds are interleaved.
The rates are those after the first token. llama.cpp is timed by itself, if the package xllamacpp is there. What guesses
(--prompt_lookup_num_tokens) gain depends on the text: random weights repeat themselves, and say nothing about it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.serving import VOCABULARY, BenchConfig, build, engine_seconds, prompts, their_seconds, theirs
from common.options import option, parse


@dataclass(frozen=True)
class DecodeConfig(BenchConfig):
    """Options of this script"""

    threads: int = option(0, "threads of each side (0: torch's default)", within="[0, inf)")
    guess: int = option(8, "tokens that are guessed ahead", within="[1, inf)")
    long: int = option(512, "tokens of the long prompt", within="[64, inf)")
    llama: str | None = option(None, "used by this script itself: be llama.cpp's server of this file")


def serve_llama(path: Path, threads: int) -> None:
    """Prints the address of llama.cpp's server, and serves until the input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port, params.verbosity = 1024, 1, 0, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


def llama_cpp(model, folder: Path, threads: int):
    """-> a function (prompt, new) -> tokens per second, or None without the package. In a process of its own: in this
    one its threads would make torch's sleep after each operation."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    from model.interop.gguf import write_gguf
    from tokenizer.text import Tokenizer

    path = folder / "model.gguf"
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    write_gguf(path, model.config, state, Tokenizer.load(), dtype="q8_0")
    command = [sys.executable, str(Path(__file__).resolve()), "--llama", str(path), "--threads", str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    address = next(line.strip() for line in process.stdout if line.startswith("http"))

    def rate(prompt: list[int], new: int) -> float:
        body = dict(prompt=prompt, n_predict=new, temperature=0, ignore_eos=True, cache_prompt=False)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + "/completion", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["timings"]["predicted_per_second"]

    return rate


def first_token(engine, prompt: list[int]) -> tuple[float, int]:
    """-> (seconds, tokens that had to be read)"""
    from inference.engine import Request
    from inference.sampling import Sampling

    begin = time.perf_counter()
    sequence = engine.submit(Request(prompt, Sampling(temperature=0), 1))
    while engine.busy:
        engine.step()
    return time.perf_counter() - begin, len(prompt) - sequence.cached_tokens


def guesses(model, prompt: list[int], new: int, ahead: int) -> tuple[float, float]:
    """-> (tokens per second after the first, share of them that were guessed)"""
    from inference.engine import Engine, Request
    from inference.sampling import Sampling

    engine = Engine(model, 1, 1024, prompt_lookup_num_tokens=ahead)
    sequence = engine.submit(Request(prompt, Sampling(temperature=0), new))
    while engine.busy:
        engine.step()
    return (new - 1) / (time.perf_counter() - sequence.first_token), sequence.guessed / new


def main() -> None:
    config = parse(DecodeConfig, description=__doc__)
    if config.llama:
        return serve_llama(Path(config.llama), config.threads)
    import torch

    from benchmarks.common import machine, spread
    from inference.engine import Engine
    from model.quant_cpu import quantize_for_cpu

    if config.threads:
        torch.set_num_threads(config.threads)
    model, new = build(config), config.new
    models = {str(model.compute_dtype).removeprefix("torch."): model}
    for kind in ("int8", "int4"):
        models[kind] = copy.deepcopy(model)
        print(quantize_for_cpu(models[kind], kind))
    vocab = min(model.config.vocab_size, VOCABULARY)
    (asked,), (long,) = prompts(1, config.prompt, vocab), prompts(1, config.long, vocab)
    repeated = prompts(1, 64, vocab)[0] * 3
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        other, llama = theirs(model, Path(folder)), llama_cpp(model, Path(folder), torch.get_num_threads())
        for turn in range(config.rounds + 1):
            note = lambda name, value: figures.setdefault(name, []).append(value) if turn else None  # noqa: B023
            their_first = their_seconds(other, [asked], 1)
            their_rate = (new - 1) / (their_seconds(other, [asked], new) - their_first)
            their_long = their_seconds(other, [long], 1)
            note("one stream: transformers, tokens/s", their_rate)
            for name, ours in models.items():
                _, rate = engine_seconds(Engine(ours, 1, 1024), [asked], new)
                note(f"one stream: {name}, tokens/s", rate)
                note(f"one stream: {name} / transformers", rate / their_rate)
                engine = Engine(ours, 1, 2048)
                seconds, _ = first_token(engine, long)
                note(f"first token of {config.long}: {name}, s", seconds)
                note(f"first token of {config.long}: {name} / transformers", seconds / their_long)
                again, read = first_token(engine, long + asked)
                note(f"second turn, {config.prompt} tokens more: {name}, s", again)
                note(f"second turn: {name}, tokens read", read)
                plain, _ = guesses(ours, repeated, new, 0)
                ahead, share = guesses(ours, repeated, new, config.guess)
                note(f"guesses: {name}, with / without", ahead / plain)
                note(f"guesses: {name}, share of tokens guessed", share)
            if llama is not None:
                rate = llama(asked, new)
                note("one stream: llama.cpp q8_0, tokens/s", rate)
                if turn:
                    note("one stream: int8 / llama.cpp q8_0", figures["one stream: int8, tokens/s"][-1] / rate)
    print(f"{machine()}; {config.weight or config.preset}, {config.prompt} + {new} tokens")
    for name, values in sorted(figures.items()):
        print(f"{name:58} {spread(values)}")


if __name__ == "__main__":
    main()
