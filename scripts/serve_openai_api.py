"""Serve models over HTTP with OpenAI's API: any client of it can talk to them.

    python scripts/serve_openai_api.py                                    # the newest full_sft_*.pth in out/
    python scripts/serve_openai_api.py --weight full_sft reason           # two; a request's `model` chooses
    python scripts/serve_openai_api.py --lora_name lora_identity med=out/lora/lora_medical_512.pth
    python scripts/serve_openai_api.py --host 0.0.0.0 --api_key KEY       # for other machines; a key is required

The chat page is at http://127.0.0.1:8998/ then; --web opens it. At /runs are the curves of what is being trained;
that page also works before there are any weights. What was trained anew meanwhile is loaded without a restart, by a
button of the chat page or POST /reload.

    curl http://127.0.0.1:8998/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "full_sft", "messages": [{"role": "user", "content": "hello"}]}'
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.console import UserError, note, run
from common.files import ROOT
from common.options import option, parse
from inference.options import MODES, EngineOptions, LowBitOptions, SamplingOptions

if TYPE_CHECKING:
    from serve.models import Served

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeConfig(LowBitOptions, SamplingOptions, EngineOptions):
    """Options of this script"""

    needless: ClassVar[dict[str, str]] = {
        "load_from": "a file says itself what it holds",
        "load": "a file says itself what it holds",
        "tools": "the chat page has them under Settings",
        "inference_rope_scaling": "the weights say whether their positions are stretched",
    }

    weight: tuple[str, ...] = option(
        (),
        "models, each [NAME=]WHAT: a name in save_dir or out/, a file or a directory (default: full_sft)",
        aliases=("model_path", "model_name_or_path", "from_weight"),
    )
    model_mode: int | None = option(None, "without --weight: 0 pretrain, 1 full_sft, 2 rlhf, 3 reason", within="[0, 3]")
    lora_name: tuple[str, ...] = option(
        (), "adapters, each [NAME=]WHAT, on the weights they were trained on", aliases=("lora_path", "lora_weight")
    )
    save_dir: str = option("out", "where weights are looked for by name, then in out/", aliases=("out_dir",), path=True)
    tokenizer_path: str | None = option(None, "where the tokenizer is, if it is not found", path=True)
    hidden_size: int | None = option(None, "choose among weights of the same name")
    num_hidden_layers: int | None = option(None, "must be that of the weights")
    use_moe: bool | None = option(None, "choose among weights of the same name")

    web: bool = option(False, "open the chat page in the browser")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all, which needs a key")
    port: int = option(8998, "port to listen on; 0: a free one", within="[0, 65535]")
    api_key: str | None = option(None, "what clients must send as their key (also: SPARROW_API_KEY)")
    allowed_hosts: tuple[str, ...] = option((), "names besides localhost that clients may call this server by")
    cors_origins: tuple[str, ...] = option((), "pages of other servers that may ask, as https://example.org; *: all")

    max_num_seqs: int = option(16, "answers of a model made at the same time", within="[1, 1024]")
    max_seq_len: int = option(
        8192, "tokens of prompt and answer together", aliases=("max_model_len", "max_length"), within="[2, inf)"
    )
    max_new_tokens: int = option(1024, "longest answer where a request does not say", within="[1, inf)")
    max_waiting: int = option(64, "requests of a model that may wait; one more gets status 429", within="[0, inf)")
    request_seconds: float = option(300.0, "an answer that takes longer is ended as it is", within="(0, inf)")
    max_body_mb: float = option(2.0, "largest request", within="(0, inf)")
    drain_seconds: float = option(30.0, "time that running answers have when the server is stopped", within="[0, inf)")

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("SPARROW_API_KEY") or None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.weight and self.model_mode is not None:
            found.append("--model_mode: chooses weights, as --weight does; give one of them")
        if self.host not in LOOPBACK and not self.key:
            found.append(
                f"--host {self.host}: other machines could use this server; give a key with --api_key or "
                "SPARROW_API_KEY, or leave the host out"
            )
        if self.key is not None and (not self.key.isascii() or not self.key.isprintable() or " " in self.key):
            found.append("--api_key: must be printable ASCII without spaces, since it is sent in a header")
        return found


def hosts(config: ServeConfig) -> tuple[str, ...]:
    """The names that a request's Host header may have; empty: any. A key keeps out what the name would: pages of other
    servers do not know it."""
    if config.host not in LOOPBACK and not config.allowed_hosts:
        return ()
    return (*LOOPBACK, config.host, *config.allowed_hosts)


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def can_show() -> bool:
    """Whether a browser has a screen to appear on; one for terminals would take this one."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.environ.get("BROWSER")
    return bool(display) or sys.platform in ("win32", "darwin")


def read_models(config: ServeConfig, folders: tuple[Path, ...]) -> tuple[dict[str, Served], list[str]]:
    """What is served, and remarks to print: see `load_table`."""
    from serve.models import load_table

    names = config.weight
    if not names and (config.model_mode is not None or not config.lora_name):
        names = (MODES[1 if config.model_mode is None else config.model_mode],)
    return load_table(
        list(names),
        [name for name in config.lora_name if name != "None"],  # MiniMind's way to say: no adapter
        folders,
        rows=config.max_num_seqs,
        max_seq_len=config.max_seq_len,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        prompt_lookup_num_tokens=config.prompt_lookup_num_tokens,
        four=config.load_in_4bit,
        eight=config.load_in_8bit,
        tokenizer_path=config.tokenizer_path,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        use_moe=config.use_moe,
    )


def main(argv: list[str] | None = None) -> None:
    config = parse(ServeConfig, argv, description=__doc__)
    try:
        import fastapi  # noqa: F401 (only whether it is there)
        import uvicorn
    except ImportError as error:
        raise UserError(f"the server needs {error.name}; pip install fastapi uvicorn") from None
    from model.checkpoint import NoWeights
    from serve.app import build_app
    from serve.guard import PatientProtocol, Rules, guarded
    from serve.runner import apart
    from serve.runs import Runs
    from serve.server import Limits

    listener = socket.create_server((config.host, config.port), family=family(config.host), backlog=2048)
    folders = (Path(config.save_dir), ROOT / "out")
    runs = Runs([folder / "runs" for folder in folders])
    load = partial(apart, partial(read_models, config, folders))
    try:
        table, remarks = load()
    except NoWeights as error:  # the first model is still being trained: that can be watched
        if config.weight or config.lora_name or not runs.overview():
            raise
        until = "until there are, and Load is pressed on the chat page, only the runs are shown"
        table, remarks = {}, [f"{error}; {until}"]
    for remark in remarks:
        note(remark)
    limits = Limits(config.max_new_tokens, config.max_waiting, config.request_seconds)
    app = build_app(table, limits, config.sampling(), runs, load)
    rules = Rules(
        hosts(config),
        config.cors_origins,
        config.key,
        int(config.max_body_mb * 2**20),
        total_seconds=2 * config.request_seconds + 60,
    )
    settings = uvicorn.Config(
        guarded(app, rules),
        http=PatientProtocol,
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(config.drain_seconds),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when it has drained
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # all addresses are not one to go to
    url = f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
    page = f"{url}/" if table else f"{url}/runs"
    pages = f"the chat page is {page}; runs are at {url}/runs" if table else f"the page is {page}"
    note(f"serving {', '.join(table) or 'no model'} at {url}/v1; {pages}; Ctrl-C stops")
    if config.web and can_show():  # in a thread: some browsers return only when they are left
        threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
    elif config.web:
        note(f"there is no display here to open a browser on; open {page} in one that reaches this machine")
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    smaller = "lower --max_num_seqs or --max_seq_len, keep the weights in fewer bits (--load_in_4bit)"
    run(main, smaller)
