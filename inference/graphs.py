"""Decoding on GPUs: the kernels of a step are recorded once, as a CUDA graph, and then queued all together.

A step of a small model is hundreds of kernels of a few microseconds. Queueing them one by one takes longer than
computing them. A graph's kernels read and write the same memory each time, with the same shapes. So tokens and lengths
are copied into fixed tensors, and rows and columns are rounded up to a few sizes. There is a graph for each pair of
sizes, captured when it is first needed.

Letters: B rows, S columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.console import note
from inference.drawn import to_device
from inference.slots import Decoding, Slots
from model.attention import AttentionMask, additive
from model.transformer import CausalLM

COLUMNS = 256  # the least; then twice as many, and so on

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # -> (replay, where its result is)


class FixedDecoding(Decoding):
    """As `Decoding`, but only the device knows how long the rows are: the same kernels serve other lengths."""

    def __init__(self, slots: Slots, ends: Tensor, columns: int):
        """ends (B, 1): where each row's new token comes; all of them below `columns`."""
        self.slots, self.rows, self.columns, self.places = slots, len(ends), columns, ends
        self.lengths = []

    def extend(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        self.index = torch.arange(self.rows, device=tokens.device)[:, None]
        return self.places

    def mask(self, window: int | None) -> AttentionMask:
        column = torch.arange(self.columns, device=self.places.device)
        seen = column <= self.places
        if window is not None and window < self.columns:
            seen &= column > self.places - window
        return AttentionMask("sdpa", additive(seen[:, None, None], self.slots.keys.dtype))  # (B, 1, 1, S)


class DecodeGraphs:
    """The model's next logits for the first rows of the slots.

    A graph has the addresses of weights in it. So weights may change in place, but not be replaced.
    """

    def __init__(self, model: CausalLM, slots: Slots, capture: Capture | None = None):
        rows, device = len(slots.slots), slots.keys.device
        self.model, self.slots, self.capture = model, slots, capture or CaptureOnCUDA(device)
        self.tokens, self.ends = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self.works = True

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1), one more for each of the first B slots -> (B, V), which the next call overwrites."""
        B = len(tokens)
        if not self.works:
            return self.model(tokens, cache=Decoding(self.slots, B)).logits[:, -1]
        lengths = [len(slot.ids) for slot in self.slots.slots]
        rows, columns = size_for(B, 1, len(lengths)), size_for(max(lengths[:B]) + 1, COLUMNS, self.slots.capacity)
        for slot in self.slots.slots[B:rows]:  # they write too, behind what is kept
            if len(slot.ids) == self.slots.capacity:
                slot.ids.pop()
            lengths[slot.row] = len(slot.ids)
        self.tokens[:B].copy_(tokens)
        self.ends[:rows].copy_(to_device(lengths[:rows], self.ends.device)[:, None])
        if (rows, columns) not in self.graphs:
            try:
                self.graphs[rows, columns] = self.capture(lambda: self._compute(rows, columns))
            except RuntimeError as error:
                self.works = False
                note(f"warning: no CUDA graph for generation, so it is slower: {str(error).splitlines()[0]}")
                return self.logits(tokens)
        replay, found = self.graphs[rows, columns]
        replay()
        return found[:B]

    def _compute(self, rows: int, columns: int) -> Tensor:
        cache = FixedDecoding(self.slots, self.ends[:rows], columns)
        return self.model(self.tokens[:rows], cache=cache).logits[:, -1]


def size_for(needed: int, least: int, most: int) -> int:
    """least, twice as many, four times ..., at most `most`: the first that is enough."""
    while least < needed:
        least *= 2
    return min(least, most)


class CaptureOnCUDA:
    """-> (what queues the function's kernels again, the tensor that they write). All on one stream of the device: the
    current device may be another one, whose graph would be empty; and each stream costs cuBLAS 32 MB on Hopper."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # the first time is not recorded: kernels are chosen, tables are copied
                    function()
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                found = function()
        return graph.replay, found
