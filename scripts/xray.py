"""Looks inside a model while it reads a text: one HTML page to learn from.

    python scripts/xray.py --weight full_sft --prompt "What is 7+5?"            # writes out/xray/full_sft_512.html
    python scripts/xray.py --weight lora_identity --prompt "Who are you?"       # also what the adapter changed
    python scripts/xray.py --weight pretrain --prompt "从前有一座山" --max_new_tokens 0 --output page.html

The page shows the tokens, the probabilities of the next token at each position, the guess after every layer (logit
lens), the attention of every head, the residual stream, the experts, and what an adapter (LoRA) changed. It is one file
that needs no network.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass

from common.console import check_writable, run, say
from common.files import ROOT
from common.options import Options, option, parse


@dataclass(frozen=True)
class XrayConfig(Options):
    """Options of the X-ray"""

    weight: str = option(
        "full_sft",
        "a name in save_dir or out/, a file or a directory; an adapter (LoRA) too",
        aliases=("model_path", "model_name_or_path", "lora_name", "lora_path"),
    )
    prompt: str = option("", "the text that the model reads: a message to it, or for a pretrained model a beginning")
    system: str = option("", "system prompt")
    max_new_tokens: int = option(24, "tokens that the model adds, always the likeliest", within="[0, 512]")
    output: str | None = option(None, "the page (default: xray/<name>.html in save_dir)", path=True)
    save_dir: str = option(str(ROOT / "out"), "where names are looked up", aliases=("out_dir",), path=True)
    tokenizer_path: str | None = option(None, "directory of the tokenizer (default: the weights know)", path=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.prompt.strip():
            found.append('--prompt: give a text to read, for instance --prompt "What is 7+5?"')
        return found


def main():
    config = parse(XrayConfig, description=__doc__)
    if config.output:
        check_writable(config.output, "--output", is_file=True)

    from evaluation.models import open_models
    from evaluation.page import write_page
    from evaluation.xray import xray

    places = dict(tokenizer_path=config.tokenizer_path, device=config.device, dtype="float32")  # exact, for the eye
    (contender,) = open_models([config.weight], config.save_dir, **places)
    figures = xray(contender, config.prompt, system=config.system, max_new_tokens=config.max_new_tokens)
    path = Path(config.output or Path(config.save_dir) / "xray" / f"{contender.name.replace('/', '_')}.html")
    write_page(path, "xray", f"X-ray of {contender.name}", figures)
    said = contender.tokenizer.decode(figures["ids"][figures["prompt_tokens"] :])
    if said:
        say(said)
    say(f"{path}: {len(figures['ids'])} tokens, {path.stat().st_size / 1e6:.2g} MB; open it in a browser")


if __name__ == "__main__":
    run(main)
