"""The keys and values of many sequences, of which each grows at its own pace: the memory of inference/engine.py.

A slot is a row of one tensor that is allocated once, with room for the longest sequence. Sequences that write a token
each step lie in the first rows, so that attention reads them where they are, as one view. Pages of a few tokens, as
servers for large GPUs have them, waste less memory. But torch's attention does not read pages: they would be copied
together in every layer at every step, which on a CPU takes as long as the rest of the step. What is never touched of a
slot costs no memory on a CPU. The keys of a head lie one behind the other, as attention reads them.

A slot keeps what it holds when its sequence ends. The next one that begins with the same tokens starts from there.

Letters: B rows, T new positions, S columns, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from inference.drawn import to_device
from model.attention import AttentionMask, Segments, additive, has_flash, is_causal_works
from model.config import ModelConfig


@dataclass
class Slot:
    row: int
    ids: list[int] = field(default_factory=list)  # the tokens whose keys and values it holds, in all layers
    busy: bool = False
    used: int = 0  # the step that used it last


class Slots:
    """`rows` slots with room for `capacity` tokens each (model.cost.cache_bytes says how much memory that is). On CPUs
    they are fp32: attention of one query over bf16 keys is several times slower there. Layers with a sliding window
    keep all positions too, so that a sequence can go on from any of them."""

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        # zeros: columns behind the end of a row are read with weight 0, and 0 times NaN would be NaN
        if torch.device(device).type == "cpu":  # numpy's are pages that the system provides when they are written
            self.keys, self.values = (torch.from_numpy(np.zeros(shape, np.float32)) for _ in range(2))
        else:
            self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.slots = [Slot(row) for row in range(rows)]
        # whether torch's flash attention reads them, without masks
        self.flash = has_flash(self.keys.device, self.keys.dtype, config.head_dim)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def claim(self, prompt: Sequence[int], step: int) -> Slot:
        """A free slot that holds as much of the prompt as any slot does. Never all of it: the logits after its last
        token are needed. There must be a free one."""
        source, best, most = self.slots[0], (-1, False), len(prompt) - 1
        for slot in self.slots:
            found = common_length(slot.ids, prompt, most), not slot.busy
            if found > best:
                source, best = slot, found
            if found == (most, True):  # no other can be better
                break
        chosen, length = source, best[0]
        if source.busy or 2 * length < len(source.ids):  # more would be lost than is used: take another one
            free = [slot for slot in self.slots if not slot.busy]
            chosen = min(free, key=lambda slot: (slot is source, len(slot.ids) > 0, slot.used, slot.row))
        if chosen is not source:
            for stored in (self.keys, self.values):
                stored[:, chosen.row, :, :length] = stored[:, source.row, :, :length]
            chosen.ids = source.ids[:length]
        del chosen.ids[length:]
        chosen.busy, chosen.used = True, step
        return chosen

    def is_finite(self, slot: Slot) -> bool:
        """Whether it holds no NaN. One of any layer is one in the last layer, too. Waits for the device."""
        here = (stored[-1, slot.row, :, : len(slot.ids) + 1] for stored in (self.keys, self.values))
        return all(bool(own.isfinite().all()) for own in here)

    def wipe(self, slot: Slot, behind: int) -> None:
        """Forgets what it holds, which may be NaN, and as many tokens behind that, which were computed too many: one
        (Engine.late), or wrong guesses."""
        for stored in (self.keys, self.values):
            stored[:, slot.row, :, : len(slot.ids) + behind] = 0
        slot.ids.clear()

    def move(self, slot: Slot, row: int) -> None:
        """Swaps the slot with the one in this row."""
        other = self.slots[row]
        if other is slot:
            return
        for stored in (self.keys, self.values):
            here, there = (stored[:, s.row, :, : max(len(slot.ids), len(other.ids))] for s in (slot, other))
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
        self.slots[slot.row], self.slots[row] = other, slot
        other.row, slot.row = slot.row, row


def common_length(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many tokens two sequences begin with in common, at most `most`."""
    most, n = min(len(a), len(b), most), 0
    for size in (512, 64, 8, 1):  # slices compare fast
        while n + size <= most and a[n : n + size] == b[n : n + size]:
            n += size
    return n


class Decoding:
    """The first B slots as the model's cache for T more tokens each (model.transformer.Cache).

    There must be room for T tokens in each slot, also where the last of them only fill up the row: those are written
    behind its end, and no other token sees them.
    """

    def __init__(self, slots: Slots, rows: int, tokens: int = 1):
        self.slots, self.rows, self.tokens = slots, rows, tokens
        self.lengths = [len(slot.ids) for slot in slots.slots[:rows]]
        self.columns = max(self.lengths) + tokens  # S

    def extend(self, tokens: Tensor) -> Tensor:
        ends = to_device(self.lengths, tokens.device)[:, None]
        self.places = ends if self.tokens == 1 else ends + torch.arange(self.tokens, device=tokens.device)  # (B, T)
        self.index = torch.arange(self.rows, device=tokens.device)[:, None]  # (B, 1)
        return self.places

    def mask(self, window: int | None) -> AttentionMask:
        column, place = torch.arange(self.columns, device=self.places.device), self.places[..., None]  # (B, T, 1)
        if window is not None and window < self.columns:
            seen = (column <= place) & (column > place - window)
        elif self.tokens > 1 or min(self.lengths) + 1 < self.columns:
            seen = column <= place
        else:
            return AttentionMask("sdpa")
        return AttentionMask("sdpa", additive(seen[:, None], self.slots.keys.dtype))  # (B, 1, T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for stored, new in ((self.slots.keys, k), (self.slots.values, v)):
            here = stored[layer].transpose(1, 2)  # (rows, capacity, K, D)
            if self.rows == 1 and self.lengths:  # no index to look up: this is done often
                here[:1, self.lengths[0] : self.columns] = new
            else:
                here[self.index, self.places] = new.to(stored.dtype)
            found.append(here[: self.rows, : self.columns])
        return found[0], found[1]


class Reading:
    """Parts of several prompts in one row, as the model's cache: part i is read into slots[i], behind what is there.

    The keys are, part after part, those that were there and the new ones.
    """

    def __init__(self, slots: Slots, parts: Sequence[tuple[Slot, int]]):
        """parts: (slot, number of new tokens)."""
        self.slots = slots
        self.spans = [(slot.row, len(slot.ids), len(slot.ids) + new) for slot, new in parts]
        self.one_by_one = len(parts) == 1 or slots.keys.is_cpu  # on a GPU each piece would be a kernel, in each layer
        self.segments: Segments | None = None  # instead of a mask

    def extend(self, tokens: Tensor) -> Tensor:
        arange = lambda start, stop: torch.arange(start, stop, device=tokens.device)
        self.queries = torch.cat([arange(start, stop) for _, start, stop in self.spans])  # (T,) positions
        self.keys = torch.cat([arange(0, stop) for _, _, stop in self.spans])  # (S,)
        new, all_of_them = zip(*((stop - start, stop) for _, start, stop in self.spans))
        if self.slots.flash:
            bounds = lambda sizes: to_device(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), tokens.device)
            self.segments = Segments(bounds(new), bounds(all_of_them))
            if self.one_by_one:
                return self.queries[None]  # nothing asks for the part of a token
        count = lambda sizes: torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        number = lambda sizes: to_device(count(sizes), tokens.device)
        self.query_part, self.key_part = number(new), number(all_of_them)  # (T,), (S,)
        if not self.one_by_one:
            rows = to_device([row for row, *_ in self.spans], tokens.device)
            self.query_rows, self.key_rows = rows[self.query_part], rows[self.key_part]
        return self.queries[None]

    def mask(self, window: int | None) -> AttentionMask:
        _, start, stop = self.spans[0]
        whole = len(self.spans) == 1 and start == 0 and (window is None or window >= stop)
        if whole and is_causal_works(self.keys.device):
            return AttentionMask("sdpa")  # causal
        if self.segments is not None:
            return AttentionMask("flash", None, window, self.segments, most=max(stop for *_, stop in self.spans))
        distance = self.queries[:, None] - self.keys  # (T, S)
        seen = (self.query_part[:, None] == self.key_part) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        return AttentionMask("sdpa", additive(seen[None, None], self.slots.keys.dtype))  # (1, 1, T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for stored, new in ((self.slots.keys[layer], k[0]), (self.slots.values[layer], v[0])):
            stored = stored.transpose(1, 2)  # (rows, capacity, K, D)
            if self.one_by_one:
                pieces = new.split([stop - start for _, start, stop in self.spans])
                for (row, start, stop), piece in zip(self.spans, pieces):
                    stored[row, start:stop] = piece
            else:
                stored[self.query_rows, self.queries] = new
            if all(start == 0 for _, start, _ in self.spans):
                found.append(new[None])  # nothing to add: the new ones are all, and in the dtype of the queries
            elif not self.one_by_one:
                found.append(stored[self.key_rows, self.keys][None])
            else:
                there = [stored[row, :stop] for row, _, stop in self.spans]
                found.append((there[0] if len(there) == 1 else torch.cat(there))[None])  # one needs no copy
        return found[0], found[1]
