"""Our models in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), if it is installed.

    register()                                      # then `lm_eval --model sparrow --model_args weight=full_sft ...`
    lm = register()(weight="out/full_sft_512.pth")  # or an object, for lm_eval.simple_evaluate(model=lm, ...)

Its tasks give text. Without a chat template none of it becomes a control token; after --apply_chat_template the names
of control tokens in it do, since the harness hands the template over as text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.console import UserError
from common.files import ROOT
from evaluation.likelihood import log_likelihoods
from inference.answers import answers_to_ids
from inference.sampling import Sampling
from model.adapter import find_base, load_adapter
from model.checkpoint import find_tokenizer, find_weights, load_weights
from model.precision import pick_device, pick_dtype, prepare_for_inference
from model.transformer import CausalLM
from tokenizer.chat import Encoded, encode_chat
from tokenizer.text import Tokenizer

INSTALL = "lm-evaluation-harness is not installed: pip install lm-eval"


def open_for_harness(
    weight: str, lora_path: str | None, tokenizer_path: str | None, device: str, dtype: str
) -> tuple[CausalLM, Tokenizer]:
    """weight: a name in out/, a file or a directory; with lora_path, the adapter's base, or "" for the one it knows."""
    if not (weight or lora_path):
        raise UserError("--model_args weight=...: name the weights, such as full_sft or a file")
    adapter = load_adapter(lora_path) if lora_path else None
    file = find_weights(weight, ROOT / "out") if weight else None
    checkpoint = find_base(adapter, file, ROOT / "out") if adapter else load_weights(file)
    model = adapter.merge_into(checkpoint) if adapter else checkpoint.build()
    where = pick_device(device)
    tokenizer = find_tokenizer(checkpoint, tokenizer_path)
    return prepare_for_inference(model, pick_dtype(dtype, where)[0]).to(where), tokenizer


def register() -> type:
    """Makes "sparrow" known to lm-evaluation-harness -> its class. UserError if the harness is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error})") from None
    if "sparrow" in MODEL_REGISTRY:
        return MODEL_REGISTRY["sparrow"]

    @register_model("sparrow")
    class SparrowLM(TemplateLM):
        """--model_args weight=...,lora_path=...,tokenizer_path=...,dtype=..., max_length=...; greedy."""

        backend = "causal"
        tokenizer_name = "sparrow"

        def __init__(
            self,
            weight: str = "",
            lora_path: str | None = None,
            tokenizer_path: str | None = None,
            dtype: str = "auto",
            device: str | None = None,
            max_length: int | None = None,
            **ignored: Any,  # batch_size and the like: the harness always passes them
        ):
            super().__init__()
            if not device or device.startswith("cuda") and not torch.cuda.is_available():
                device = "auto"  # the harness says cuda:0 where nobody has said anything
            opened = open_for_harness(weight, lora_path, tokenizer_path, device, dtype)
            self.model, self.text = opened
            self.limit = int(max_length or self.model.config.max_position_embeddings)
            self.templated = False

        @property
        def eot_token_id(self) -> int:
            return self.text.end_of_text

        @property
        def prefix_token_id(self) -> int:
            start = self.text.start_of_text
            return start[0] if len(start) == 1 else self.text.end_of_text  # the harness has room for one

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return encode_with_control(self.text, string) if self.templated else self.text.encode(string)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return self.text.chat_template or "ChatML"

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            self.templated = True
            if not add_generation_prompt:  # the last message is the beginning of an answer that goes on
                *before, last = chat_history
                ids = encode_chat(self.text, before, add_generation_prompt=True).ids
                return self.text.decode(ids) + last["content"]
            return self.text.decode(encode_chat(self.text, chat_history, add_generation_prompt=True).ids)

        def _loglikelihood_tokens(self, requests: Sequence, **options: Any) -> list[tuple[float, bool]]:
            rows = []
            for _, context, continuation in requests:
                ids = (context + continuation)[-(self.limit + 1) :]  # too long: the beginning is cut, as hf does
                rows.append(Encoded(ids, [i >= len(ids) - len(continuation) for i in range(len(ids))]))
            marked = log_likelihoods(self.model, rows, criterion=loss_marked_if_not_greedy, progress="lm_eval")
            return [(-float(abs(own).sum()), bool((own <= 0).all())) for own in marked]

        def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.limit, context_len=1
                )
                pairs = [(("", ""), *map(list, make_disjoint_window(window))) for window in windows]
                totals.append(sum(logp for logp, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
            found = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for n, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(n)
            for numbers in groups.values():
                options = dict(requests[numbers[0]].args[1])
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                most = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
                temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
                sampling = Sampling(temperature, top_p=float(options.get("top_p") or 1), seed=0)
                room = self.limit - most
                if room < 1:
                    raise UserError(f"max_gen_toks {most} leaves none of {self.limit} positions for the question")
                prompts = [self.tok_encode(requests[n].args[0])[-room:] for n in numbers]
                said = answers_to_ids(self.model, self.text, prompts, max_new_tokens=most, sampling=sampling)
                for n, answer in zip(numbers, said):
                    text = self.text.decode(answer.ids, skip_control=True)
                    found[n] = text[
                        : min((at for word in until if word and (at := text.find(word)) >= 0), default=None)
                    ]
            return found

    return SparrowLM


def encode_with_control(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text in which the names of control tokens stand for them, as in the output of a chat template."""
    names = "|".join(map(re.escape, sorted(tokenizer.control, key=len, reverse=True)))
    ids: list[int] = []
    for piece in re.split(f"({names})", text):
        ids += [tokenizer.control[piece]] if piece in tokenizer.control else tokenizer.encode(piece) if piece else []
    return ids


def loss_marked_if_not_greedy(logits: Tensor, targets: Tensor, rows: slice) -> Tensor:
    """logits (n, V), targets (n,) -> (n,): cross-entropy, negative where the target is not the likeliest token. There
    the cross-entropy is above 0, so no sign is lost."""
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return torch.where(logits.argmax(-1) == targets, loss, -loss)
