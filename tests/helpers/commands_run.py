"""Runs commands one after another, for tests/test_readme.py:

    python tests/helpers/commands_run.py COMMANDS.json

Scripts run in this process: importing torch anew takes longer than most of them need.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.helpers.runs import run_script


def run(launcher: str, *words: str) -> tuple[int, str, str]:
    """`python ...` or `torchrun ...` -> exit status, output, errors. A server is stopped as soon as it serves."""
    if "serve_openai_api.py" in words[0] or "--web" in words:
        server = subprocess.Popen(
            [sys.executable, *words, *([] if "--web" in words else ["--port", "0"])],
            env={**os.environ, "BROWSER": "true"},  # opens nothing
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert server.stderr
        said = ""
        for line in server.stderr:
            said += line
            if "serving" in line:
                server.terminate()
        return server.wait(60), "", said
    if launcher == "python":
        return run_script(*words, typed="你好\n")
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        status, out, err = run(*words)
        if status:
            sys.exit(f"{shlex.join(words)}: exit status {status}\n{out}\n{err}")
        print(shlex.join(words))
