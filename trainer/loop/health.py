"""Whether what the model says is healthy, a few prompts at each validation: --health_prompts.

A loss does not show that answers stop ending, begin to repeat themselves, or come in another language. The figures are
those of inference/health.py, logged as health_<name>.
"""

from __future__ import annotations

import torch

from common.console import UserError, note, ran_out_of_memory
from dataset.kinds import KINDS
from dataset.read.questions import read_questions, references_of
from inference.answers import answers
from inference.health import health
from model.transformer import CausalLM
from tokenizer.text import Tokenizer

PROMPTS, TOKENS = 16, 64  # the first so many of the file; the longest answer


class HealthCheck:
    """Called with the model after a validation, by every rank. Greedy, so that no random number is drawn: a resumed run
    stays bit-identical. Rank 0 alone answers, and the others have no figures. So has a model whose logits are not
    finite: training says itself whether it goes on, and the other ranks would wait for one that has ended. Nor does a
    lack of memory for the answers end the training, which may have enough."""

    def __init__(self, path: str | None, kind: str, tokenizer: Tokenizer, main: bool):
        """kind: of the data that is trained on. A model that learns from documents continues the prompts."""
        self.tokenizer = tokenizer
        try:
            questions = read_questions(path, PROMPTS) if path and main else []
        except UserError as error:
            raise UserError(f"--health_prompts {error}") from None
        self.asked = [question.asked for question in questions]
        self.prompts = self.asked if KINDS[kind].stream else [question.messages for question in questions]
        self.references = references_of(questions)

    def __call__(self, model: CausalLM) -> dict[str, float]:
        if not self.prompts:
            return {}
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # each token is a shape of its own
                said = answers(model, self.tokenizer, self.prompts, max_new_tokens=TOKENS)
        except (UserError, RuntimeError, MemoryError) as error:
            if not isinstance(error, UserError) and not ran_out_of_memory(error):
                raise
            reason = error if isinstance(error, UserError) else "no memory is left for the answers; give fewer prompts"
            note(f"warning: --health_prompts: {reason}")
            return {}
        finally:
            model.train()
        figures = health(said, self.asked, self.references)
        return {f"health_{name}": value for name, value in figures.items() if name != "answers"}
