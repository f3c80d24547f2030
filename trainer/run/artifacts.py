"""What a run writes. Most write the model's weights, LoRA its adapter; everything else about a run is the same.

<save_dir>/<name>_<hidden>[_moe].pth            Weights
<save_dir>/lora/<name>_<hidden>[_moe].pth       AdapterOnly
<output_dir>/final_model/, lora_model/          the same in Hugging Face's and peft's layout, with --output_dir
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from pathlib import Path

from common.files import keep_previous
from model.adapter import find_base, load_adapter, save_adapter
from model.checkpoint import Checkpoint, load_weights, save_weights
from model.export import copy_tokenizer, save_hf
from model.interop.peft import save_peft
from model.lora import LoRASettings, merge, remove_lora
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.stage import StageConfig


class Weights:
    """The whole model."""

    folder = ""  # below save_dir
    identity: dict = {}  # what else may not change when a run is continued

    def writes(self, path: Path, config: StageConfig) -> list[Path]:
        """Every place that is written to, `path` first."""
        exported = [Path(config.output_dir) / "final_model"] if config.output_dir else []
        return [path, path.parent / "best" / path.name, *exported]

    def save(self, path: Path, model: CausalLM, *, tokenizer: dict, lineage: list[dict]) -> None:
        save_weights(path, model, tokenizer=tokenizer, lineage=lineage)

    def finish(self, path: Path, config: StageConfig, tokenizer: Tokenizer) -> list[str]:
        """Once the run is done: what was asked for besides -> lines to print."""
        if not config.output_dir:
            return []
        try:
            folder = Path(config.output_dir) / "final_model"
            return [f"also: {save_hf(folder, load_weights(path), tokenizer.path, tokenizer.stop_ids)}"]
        except ValueError as error:  # the weights themselves are written: no reason to fail
            return [f"not written: {error}"]


@dataclass
class AdapterOnly(Weights):
    """The adapter, and which weights it belongs to."""

    settings: LoRASettings
    parent: InitVar[Checkpoint]
    peft: bool = False  # also as a directory that peft reads
    merged: str = ""  # file of full weights to write as well
    folder = "lora"
    base: dict = field(init=False)

    def __post_init__(self, parent):
        self.base = dict(path=str(Path(parent.path).resolve()), hash=parent.hash)

    @property
    def identity(self) -> dict:
        return dict(lora=self.settings.to_dict())

    def writes(self, path, config):
        return [*super().writes(path, config)[:2], *([Path(config.save_dir) / self.merged] if self.merged else [])]

    def save(self, path, model, *, tokenizer, lineage):
        save_adapter(path, model, self.settings, base=self.base, tokenizer=tokenizer, lineage=lineage)

    def finish(self, path, config, tokenizer):
        lines, adapter = [], load_adapter(path)
        if self.peft or config.output_dir:
            folder = Path(config.output_dir) / "lora_model" if config.output_dir else path.with_suffix("")
            layers = adapter.config.num_hidden_layers
            save_peft(folder, adapter.settings.to_dict(), adapter.state, self.base, layers)
            copy_tokenizer(folder, tokenizer.path)
            lines.append(f"also: {folder}, for peft")
        if self.merged:  # into the base as it was stored, not as it was kept for training
            model = adapter.apply(find_base(adapter, None, config.save_dir).build())
            merge(model)
            remove_lora(model)
            full = Path(config.save_dir) / self.merged
            lines += filter(None, [keep_previous(full)])
            save_weights(full, model, tokenizer=adapter.tokenizer, lineage=adapter.lineage)
            lines.append(f"also: {full}, with the adapter merged into the weights")
        return lines
