"""The engine against `transformers`, and the server against the engine: tokens per second and time to the first token.

    python benchmarks/serving.py                             # `small` with random weights
    python benchmarks/serving.py --weight full_sft --streams 16 --rounds 5
    python benchmarks/serving.py --preset nano --new 16 --rounds 1        # to see that it runs

Both sides have the same weights, prompts, greedy decoding, and end after exactly --new tokens. Rounds are interleaved,
each with other prompts, so that nothing is known from the round before. Servers and clients are processes of their own:
beside the threads of another engine, torch is twice as slow on a CPU (serve/runner.py, `apart`).
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.options import Options, option, parse
from common.values import SEEDS

VOCABULARY = 6400  # prompts are made of these ids
CROWD = 32  # clients whose first tokens are waited for; with fewer places the last would wait for whole answers


@dataclass(frozen=True)
class BenchConfig(Options):
    """Options of this script"""

    weight: str | None = option(None, "weights to measure; default: random ones of --preset")
    preset: str = option("small", "the model's size without --weight", choices=("nano", "small", "base", "moe"))
    prompt: int = option(64, "tokens of a prompt", within="[1, inf)")
    new: int = option(128, "tokens of an answer", within="[2, inf)")
    streams: int = option(16, "answers at the same time", within="[1, inf)")
    rounds: int = option(3, "times each side is measured", within="[1, inf)")
    places: int = option(0, "used by this script itself: be a server with so many places", within="[0, inf)")
    clients: str | None = option(None, "used by this script itself: be the clients of this server")
    seed: int = option(0, "of the prompts", within=SEEDS)


def build(config: BenchConfig):
    import torch

    from common.files import ROOT
    from model.checkpoint import find_weights, load_weights
    from model.config import ModelConfig
    from model.precision import pick_device, pick_dtype, prepare_for_inference
    from model.transformer import CausalLM

    device = pick_device()
    dtype, _ = pick_dtype("auto", device)
    torch.manual_seed(0)
    if config.weight:
        model = load_weights(find_weights(config.weight, ROOT / "out")).build()
    else:
        model = CausalLM(ModelConfig.preset(config.preset))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    return prepare_for_inference(model, dtype).to(device)


def prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(f"{count} {seed}")
    return [[rng.randrange(16, vocab) for _ in range(length)] for _ in range(count)]


def engine_seconds(engine, asked: list[list[int]], new: int) -> tuple[float, float]:
    """-> (seconds, tokens per second from the first token on)"""
    from inference.engine import Request
    from inference.sampling import Sampling

    begin = time.perf_counter()
    sequences = [engine.submit(Request(prompt, Sampling(temperature=0), new)) for prompt in asked]
    while engine.busy:
        engine.step()
    end = time.perf_counter()
    first = max(sequence.first_token for sequence in sequences)
    return end - begin, len(asked) * (new - 1) / max(end - first, 1e-9)


def theirs(model, folder: Path):
    """The same model in transformers."""
    import transformers

    from model.checkpoint import Checkpoint
    from model.export import save_hf
    from tokenizer.text import SHIPPED

    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    save_hf(folder, Checkpoint(folder, state, model.config), SHIPPED, stop_ids={2})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.compute_dtype).eval()


def their_seconds(other, asked: list[list[int]], new: int) -> float:
    import torch

    ids = torch.tensor(asked)
    begin = time.perf_counter()
    with torch.inference_mode():
        other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    return time.perf_counter() - begin


# ---- the server's clients, in a process of their own


async def be_clients(url: str, asked: list[list[int]], new: int) -> None:
    """Prints seconds for all, and the time to each first token, as JSON. They only read: on a machine of few cores a
    client that takes every piece apart would slow the server down."""
    address = urlsplit(url)
    firsts: list[float] = []

    async def one(prompt: list[int]) -> None:
        begin = time.perf_counter()
        body = json.dumps({"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status
        await reader.readuntil(b"data: ")
        firsts.append(time.perf_counter() - begin)
        rest = await reader.read()
        assert b"data: [DONE]" in rest, rest[-200:]
        writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(one(prompt) for prompt in asked))
    print(json.dumps({"seconds": time.perf_counter() - begin, "first": sorted(firsts)}))


def serve(config: BenchConfig) -> None:
    """Prints its URL, and serves until it is killed."""
    import uvicorn

    from inference.engine import Engine
    from inference.sampling import Sampling
    from serve.app import build_app
    from serve.guard import PatientProtocol, Rules, guarded
    from serve.models import Served
    from serve.runner import apart
    from serve.server import Limits
    from tokenizer.text import Tokenizer

    class Endless(Tokenizer):  # so that every answer has all its tokens
        stop_ids = frozenset()

    engine = apart(lambda: Engine(build(config), config.places, max(1024, config.prompt + config.new)))
    served = Served("model", engine, Endless.load(), None, 0)
    app = guarded(build_app({"model": served}, Limits(max_waiting=1000), Sampling(temperature=0)), Rules())
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    settings = uvicorn.Config(app, http=PatientProtocol, ws="none", log_level="warning")
    uvicorn.Server(settings).run(sockets=[listener])


def again(config: BenchConfig, *flags: object) -> list[str]:
    """The command that runs this script with other flags."""
    same = ["--preset", config.preset, "--prompt", config.prompt, "--new", config.new]
    same += ["--weight", config.weight] if config.weight else []
    return [sys.executable, str(Path(__file__).resolve()), *map(str, same), *map(str, flags)]


@contextmanager
def server(config: BenchConfig, places: int) -> Iterator[str]:
    process = subprocess.Popen(again(config, "--places", places), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def ask_server(config: BenchConfig, url: str, count: int, seed: int) -> dict:
    command = again(config, "--clients", url, "--streams", count, "--seed", seed)
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    config = parse(BenchConfig, description=__doc__)
    if config.clients:
        asked = prompts(config.streams, config.prompt, VOCABULARY, config.seed)
        return asyncio.run(be_clients(config.clients, asked, config.new))
    if config.places:
        return serve(config)
    import tempfile

    from benchmarks.common import machine, show
    from inference.engine import Engine

    model = build(config)
    vocab = min(model.config.vocab_size, VOCABULARY)
    rows = config.streams
    capacity = max(1024, config.prompt + config.new)
    figures: dict[str, list[float]] = {}
    note = lambda name, value: figures.setdefault(name, []).append(value)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(config, rows) as url,
        server(config, CROWD) as crowd_url,
    ):
        other = theirs(model, Path(folder))
        kept = {count: Engine(model, count, capacity) for count in (1, rows)}  # a server keeps its engine too
        for turn in range(config.rounds + 1):
            for count, engine in kept.items():
                asked = prompts(count, config.prompt, vocab, turn)
                seconds, rate = engine_seconds(engine, asked, config.new)
                other_seconds = their_seconds(other, asked, config.new)
                if turn:  # the first round warms up
                    note(f"{count:3} streams: engine, tokens/s in all", count * config.new / seconds)
                    note(f"{count:3} streams: engine, tokens/s after the first", rate)
                    note(f"{count:3} streams: transformers, tokens/s in all", count * config.new / other_seconds)
                    note(f"{count:3} streams: engine / transformers", other_seconds / seconds)
            found = ask_server(config, url, rows, turn)["seconds"]
            if turn:  # the last of the two above was that of `rows` streams
                note(f"server with {rows} clients, time against the engine alone", found / seconds)
                one = figures["  1 streams: engine, tokens/s in all"][-1]
                note(f"{rows} streams / 1 stream, engine", rows * config.new / seconds / one)
            (long,) = prompts(1, 512, vocab, turn)
            first, _ = engine_seconds(kept[1], [long], 1)
            other_first = their_seconds(other, [long], 1)
            crowd = ask_server(config, crowd_url, CROWD, turn)
            if turn:
                note("first token of 512: engine, s", first)
                note("first token of 512: engine / transformers", first / other_first)
                at_once = f"{CROWD} clients with --max_num_seqs {CROWD}"
                note(f"{at_once}: 95 % have their first token after, s", crowd["first"][int(0.95 * CROWD)])
                note(f"{at_once}: median first token, s", statistics.median(crowd["first"]))
    print(f"{machine()}; {config.weight or config.preset}, {config.prompt} + {config.new} tokens")
    for name, values in figures.items():
        show(name, values)


if __name__ == "__main__":
    main()
