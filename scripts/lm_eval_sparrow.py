"""Runs lm-evaluation-harness on a model of ours: the public benchmarks, with the harness's own prompts and numbers.

    pip install lm-eval
    python scripts/lm_eval_sparrow.py --model_args weight=full_sft --tasks arc_easy,ceval-valid --limit 100
    python scripts/lm_eval_sparrow.py --model_args weight=out/rlhf_512.pth --tasks gsm8k --apply_chat_template

`--model sparrow` is filled in; every other option is the harness's. It downloads the data of its tasks, which
`python scripts/lm_eval_sparrow.py ls tasks` lists.
--model_args: weight (a name in out/, a file or a directory), lora_path, tokenizer_path, dtype, max_length.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.console import run


def main() -> None:
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(__doc__)
        return
    from evaluation.harness import register

    register()
    from lm_eval.__main__ import cli_evaluate

    if not any(word.split("=")[0] == "--model" for word in sys.argv) and sys.argv[1] not in ("ls", "validate"):
        sys.argv += ["--model", "sparrow"]
    cli_evaluate()


if __name__ == "__main__":
    run(main)
