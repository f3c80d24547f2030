"""The key/value cache: what a model has read, so that each new token costs one position instead of all of them.

Letters: B rows, T new positions, S all cached positions, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.console import UserError
from model.attention import AttentionMask, build_mask
from model.config import ModelConfig
from model.rope import count_positions


class KVCache:
    """Keys and values of all past positions, in memory that is allocated once (model.cost.cache_bytes says how much).

    Rows of different length are padded on the left. The padding is a document of its own (number 0), so no token sees
    it. On CPUs the cache is fp32: attention of one query over bf16 keys is several times slower there. Layers with a
    sliding window keep all positions too, so that the cache can be set back to any length.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        if torch.device(device).type == "cpu":
            dtype = torch.float32
        shape = (config.num_hidden_layers, rows, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.documents: Tensor | None = None  # (B, S), only where rows are padded
        self.length = 0  # positions filled; set it back to forget what came after

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def extend(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Makes room for tokens (B, T) -> their positions (B or 1, T).

        documents (B, T) None: the tokens continue the document that each row ends with.
        """
        past, T = self.length, tokens.shape[1]
        if past + T > self.capacity:
            raise UserError(f"{past + T} tokens do not fit into a cache of {self.capacity}")
        self.length, self.new = past + T, T
        if documents is None and self.documents is not None:
            documents = self.documents[:, -1:].expand(-1, T)
        if documents is None:
            self.positions = torch.arange(past + T, device=tokens.device)[None]
        else:
            before = self.documents[:, :past] if self.documents is not None else documents[:, :0]
            self.documents = torch.cat((before, documents), dim=1)
            self.positions = count_positions(self.documents)
        return self.positions[:, past:]

    def mask(self, window: int | None) -> AttentionMask:
        return build_mask(self.new, self.positions, self.documents, self.keys, "sdpa", None, window)

    def keep(self, rows: Tensor) -> None:
        """Only these rows (n,) stay, in this order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.documents = None if self.documents is None else self.documents[rows]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, K, D) of the newest positions -> those of all positions (B, S, K, D)."""
        past = self.length - k.shape[1]
        self.keys[layer, :, past : self.length] = k
        self.values[layer, :, past : self.length] = v
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]
