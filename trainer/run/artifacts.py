"""What a run writes: the model's weights, or with LoRA the adapter alone.

<save_dir>/<name>_<hidden>[_moe].pth            Weights
<save_dir>/lora/<name>_<hidden>[_moe].pth       AdapterOnly
<output_dir>/final_model/, lora_model/          the same in Hugging Face's and peft's layout, with --output_dir
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import ClassVar

from common.files import keep_previous, previous_name
from model.adapter import find_base, load_adapter, save_adapter
from model.checkpoint import Checkpoint, load_weights, save_weights, write_plain
from model.export import save_hf, write_peft
from model.lora import LoRASettings
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.stage import StageConfig


@dataclass
class Weights:
    """The whole model."""

    identity: dict = field(default_factory=dict, kw_only=True)  # what else may not change when a run is continued
    folder: ClassVar[str] = ""  # below save_dir
    keeps_all: ClassVar[bool] = False  # what an earlier run wrote there is kept; of weights, one version only

    def writes(self, path: Path, config: StageConfig) -> list[Path]:
        """All files and folders that are written or, by `keep_previous`, replaced; `path` first."""
        exported = [Path(config.output_dir) / "final_model"] if config.output_dir else []
        own = [path, path.parent / "best" / path.name]
        kept = [] if self.keeps_all else [previous_name(file) for file in own if file.exists()]
        return [*own, *kept, *exported]

    def save(
        self, path: Path, model: CausalLM, *, tokenizer: dict, lineage: list[dict], write: Callable = write_plain
    ) -> None:
        """write: what takes the place of `write_plain`, to do it later."""
        save_weights(path, model, tokenizer=tokenizer, lineage=lineage, write=write)

    def finish(self, path: Path, config: StageConfig, tokenizer: Tokenizer) -> list[str]:
        """After the last step: writes the other formats that were asked for -> lines to print."""
        if not config.output_dir:
            return []
        try:
            folder = Path(config.output_dir) / "final_model"
            return [f"also: {save_hf(folder, load_weights(path), tokenizer.path, tokenizer.stop_ids)}"]
        except ValueError as error:  # the weights are written already: the run has not failed
            return [f"not written: {error}"]


@dataclass
class AdapterOnly(Weights):
    """The adapter, and which weights it belongs to."""

    settings: LoRASettings
    parent: InitVar[Checkpoint]
    bits: int | None = None  # of the base while the adapter is trained; None: dense
    peft: bool = False  # also as a directory that peft reads
    merged: str = ""  # file of full weights to write as well
    base: dict = field(init=False)
    folder: ClassVar[str] = "lora"
    keeps_all: ClassVar[bool] = True  # adapters are small

    def __post_init__(self, parent):
        self.base = dict(path=str(Path(parent.path).resolve()), hash=parent.hash)
        if self.bits:
            self.base["bits"] = self.bits
        self.identity = dict(lora=self.settings.to_dict(), bits=self.bits)

    def writes(self, path, config):
        merged = [Path(config.save_dir) / self.merged] if self.merged else []
        return [*super().writes(path, config)[:2], *merged, *(previous_name(file) for file in merged if file.exists())]

    def save(self, path, model, *, tokenizer, lineage, write=write_plain):
        save_adapter(path, model, self.settings, base=self.base, tokenizer=tokenizer, lineage=lineage, write=write)

    def finish(self, path, config, tokenizer):
        lines, adapter = [], load_adapter(path)
        if self.peft or config.output_dir:
            folder = Path(config.output_dir) / "lora_model" if config.output_dir else path.with_suffix("")
            lines.append(f"also: {write_peft(folder, adapter, tokenizer.path)}, for peft")
        if self.merged:
            base = find_base(adapter, None, config.save_dir)
            model = adapter.merge_into(base)
            full = Path(config.save_dir) / self.merged
            lines += filter(None, [keep_previous(full)])
            save_weights(full, model, tokenizer=adapter.tokenizer, lineage=adapter.lineage)
            lines.append(f"also: {full}, with the adapter merged into the weights")
        return lines
