"""Options shared by the scripts that let a model speak: eval_model.py, compare_models.py and serve_openai_api.py.

Nothing here imports torch at once: `--help` reads this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.options import Options, option

if TYPE_CHECKING:
    from inference.sampling import Sampling

MODES = ("pretrain", "full_sft", "rlhf", "reason")  # what --model_mode means: names of weights
TEMPERATURE = 0.85


@dataclass(frozen=True)
class DeviceOptions(Options):
    """Where and in which precision the model computes"""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = option(
        "auto",
        "precision of the weights",
        choices=("auto", "float32", "bfloat16", "float16"),
        aliases=("bf16=bfloat16|float32", "fp16=float16|float32", "torch_dtype"),
    )
    quantize: str | None = option(
        None,
        "keep the weights in int8 or int4: faster on CPUs, for a few answers at a time",
        choices=("int8", "int4"),
    )


@dataclass(frozen=True)
class LowBitOptions(DeviceOptions):
    """Weights in 4 or 8 bits, as for training an adapter: less memory on any device"""

    load_in_4bit: bool | None = option(
        None, "keep the weights in 4 bits (default: if the adapter was trained beside such)", aliases=("use_4bit",)
    )
    load_in_8bit: bool | None = option(None, "the same in 8 bits", aliases=("use_8bit",))

    def problems(self) -> list[str]:
        found = super().problems()
        if self.load_in_4bit and self.load_in_8bit:
            found.append("--load_in_4bit and --load_in_8bit: weights are kept in one of them; give one")
        if self.quantize and (self.load_in_4bit or self.load_in_8bit):
            found.append("--quantize: keeps the weights in other 4 or 8 bits than --load_in_...; give one of them")
        return found


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How the next token is drawn"""

    temperature: float | None = option(TEMPERATURE, "0 always takes the likeliest token", within="[0, inf)")
    top_p: float = option(0.85, "draw from the likeliest tokens with this total probability", within="(0, 1]")
    top_k: int = option(0, "draw from the K likeliest tokens (0: all)", within="[0, 10000000]")
    min_p: float = option(0.0, "drop tokens below this share of the likeliest one's probability", within="[0, 1)")
    repetition_penalty: float = option(1.0, "above 1: fewer repetitions", within="[0.01, 100]")

    def sampling(self, seed: int | None = None) -> Sampling:
        from inference.sampling import Sampling

        temperature = TEMPERATURE if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_p, self.top_k, self.repetition_penalty, seed, self.min_p)


@dataclass(frozen=True)
class EngineOptions(Options):
    """How answers are generated (inference/engine.py)"""

    prompt_lookup_num_tokens: int = option(
        0,
        "guess up to N tokens ahead where the text repeats itself: the same answers, in fewer steps (0: off)",
        within="[0, 64]",
    )
