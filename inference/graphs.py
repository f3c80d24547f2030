"""Decoding on GPUs: the kernels of a step are recorded once, as a CUDA graph, and then queued all together.

A step of a small model is hundreds of kernels of a few microseconds. Queueing them one by one takes longer than
computing them. A graph's kernels read and write the same memory each time, with the same shapes. So tokens, lengths and
settings of sampling are kept in fixed tensors, and rows and columns are rounded up to a few sizes. There is a graph for
each pair of sizes and each kind of sampling, captured when it is first needed.

A graph that draws leaves its tokens and the new lengths where the next replay reads them. As long as the same sequences
go on, a step is one launch, and one copy of the drawn tokens to the host.

Letters: B rows, S columns, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from common.console import note
from inference.drawn import to_device
from inference.sampling import SamplingRows, next_tokens
from inference.slots import Decoding, Slots
from model.attention import AttentionMask, Segments, additive
from model.transformer import CausalLM

COLUMNS = 256  # the least; then twice as many, and so on
MOST_KINDS = 12  # of sampling; a graph takes memory, and those who ask a server choose the settings


class Step(NamedTuple):
    """Tensors that the next step overwrites."""

    logits: Tensor  # (B, V)
    drawn: tuple[Tensor, Tensor] | None = None  # tokens (B,), and the same with -1 where the logits are not finite


Capture = Callable[[Callable[[], Step]], tuple[Callable[[], None], Step]]  # -> (replay, where its results are)


class FixedDecoding(Decoding):
    """As `Decoding`, but only the device knows how long the rows are: the same kernels serve other lengths."""

    def __init__(self, slots: Slots, ends: Tensor, columns: int, heads: Segments | None = None):
        """ends (B, 1): where each row's new token comes; below `columns`, but for rows that only fill up.
        heads: where the keys of each head are, for torch's flash attention. It needs no mask, and the whole room."""
        self.slots, self.rows, self.places, self.lengths = slots, len(ends), ends, []
        self.most, self.heads = columns, heads
        self.columns = columns if heads is None else slots.capacity

    def extend(self, tokens: Tensor) -> Tensor:
        self.index = torch.arange(self.rows, device=tokens.device)[:, None]
        if self.heads is not None:
            self.used = (self.places + 1).to(torch.int32).repeat(1, self.slots.keys.shape[2]).flatten()  # (B * K,)
        return self.places

    def mask(self, window: int | None) -> AttentionMask:
        if self.heads is not None:
            return AttentionMask("flash", None, window, self.heads, self.used, self.most)
        column = torch.arange(self.columns, device=self.places.device)
        seen = column <= self.places
        if window is not None and window < self.columns:
            # a row that only fills up may be longer: it sees the last keys, as seeing none may leave NaN
            seen &= column > self.places.clamp(max=self.columns - 1) - window
        return AttentionMask("sdpa", additive(seen[:, None, None], self.slots.keys.dtype))  # (B, 1, 1, S)


class DecodeGraphs:
    """The model's next logits for the first rows of the slots, and the tokens that are drawn from them.

    A graph has the addresses of weights in it. So weights may change in place, but not be replaced.
    """

    def __init__(self, model: CausalLM, slots: Slots, capture: Capture | None = None):
        rows, device = len(slots.slots), slots.keys.device
        self.model, self.slots, self.capture = model, slots, capture or CaptureOnCUDA(device)
        # what the graphs read, (rows, 1). `growth` is 1 where a row gets a token; the others only fill up the size
        self.tokens, self.ends, self.growth = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(3))
        begins = torch.arange(rows * slots.keys.shape[2] + 1, dtype=torch.int32, device=device)
        self.heads = Segments(begins, begins * slots.capacity) if slots.flash else None
        self.noise: Tensor | None = None  # (rows, V)
        self.lengths, self.growing = [-1] * rows, 0  # what the host knows of `ends` and of `growth`
        self.settings: SamplingRows | None = None  # the last ones
        self.fixed: dict[tuple, SamplingRows] = {}  # {kind: of all rows}
        self.graphs: dict[tuple, tuple[Callable[[], None], Step]] = {}
        self.works = True

    def step(
        self, tokens: Tensor, settings: SamplingRows | None = None, fill: Callable[[Tensor], None] | None = None
    ) -> Step | None:
        """tokens (B, 1), one more for each of the first B slots -> the logits after them, and with settings of these B
        rows the next tokens, unless there are graphs for too many others already. None: there are no graphs here.

        fill: writes random numbers from [0, 1) into its argument (B, V). None: all rows take the likeliest token.
        """
        B = len(tokens)
        if settings is not None and settings.kind not in self.fixed and len(self.fixed) >= MOST_KINDS:
            settings = fill = None
        lengths = [len(slot.ids) for slot in self.slots.slots]
        rows, columns = size_for(B, 1, len(lengths)), size_for(max(lengths[:B]) + 1, COLUMNS, self.slots.capacity)
        for slot in self.slots.slots[B:rows]:  # they write too, behind what is kept
            if len(slot.ids) == self.slots.capacity:
                slot.ids.pop()
            lengths[slot.row] = len(slot.ids)
        key = rows, columns, None if settings is None else (settings.kind, fill is not None)
        if key not in self.graphs and self.works:
            tokens = tokens.clone()  # before it is recorded it runs, and draws tokens itself
            self._put(tokens, lengths[:rows], growing=0)
            try:
                self.graphs[key] = self.capture(lambda: self._compute(rows, columns, settings, fill is not None))
            except RuntimeError as error:
                self.works = False
                self.tokens[:B].copy_(tokens)  # the caller's own tokens may be these
                note(f"warning: no CUDA graph for generation, so it is slower: {str(error).splitlines()[0]}")
        if not self.works:
            return None
        self._put(tokens, lengths[:rows], growing=B)
        if settings is not None and settings is not self.settings:
            self.settings = settings
            for fixed, new in zip(self._fixed(settings), settings):
                if isinstance(fixed, Tensor) and isinstance(new, Tensor):
                    fixed[:B].copy_(new)
        if fill is not None:
            fill(self._noise()[:B])
        replay, found = self.graphs[key]
        if settings is not None:
            self.lengths[:B] = [-1] * B  # not known, should Ctrl-C come meanwhile
        replay()
        if settings is not None:
            self.lengths[:B] = [length + 1 for length in lengths[:B]]
        return Step(found.logits[:B], found.drawn and (found.drawn[0][:B], found.drawn[1][:B]))

    def _put(self, tokens: Tensor, lengths: list[int], growing: int) -> None:
        """Writes what a graph reads, if it does not stand there since the last one."""
        rows, B = len(lengths), len(tokens)
        if tokens.data_ptr() != self.tokens.data_ptr():
            self.tokens[:B].copy_(tokens)
        if lengths != self.lengths[:rows]:
            self.ends[:rows].copy_(to_device(lengths, self.ends.device)[:, None])
            self.lengths[:rows] = lengths
        if growing != self.growing:
            self.growing = growing
            self.growth.zero_()[:growing].fill_(1)

    def _fixed(self, settings: SamplingRows) -> SamplingRows:
        """Tensors for settings of this kind, of all rows."""
        if settings.kind not in self.fixed:
            wide = lambda part: part.new_ones(len(self.ends), *part.shape[1:])
            self.fixed[settings.kind] = settings.each(wide, most=settings.kind[0])
        return self.fixed[settings.kind]

    def _noise(self) -> Tensor:
        if self.noise is None:
            self.noise = torch.ones(len(self.ends), self.model.config.vocab_size, device=self.ends.device)
        return self.noise

    def _compute(self, rows: int, columns: int, settings: SamplingRows | None, random: bool) -> Step:
        heads = self.heads and Segments(*(part[: rows * self.slots.keys.shape[2] + 1] for part in self.heads[:2]))
        cache = FixedDecoding(self.slots, self.ends[:rows], columns, heads)
        logits = self.model(self.tokens[:rows], cache=cache).logits[:, -1]
        if settings is None:
            return Step(logits)
        fixed = self._fixed(settings).each(lambda part: part[:rows])
        drawn, told = next_tokens(logits, fixed, self._noise()[:rows] if random else None)
        self.tokens[:rows] = drawn[:, None]
        self.ends[:rows] += self.growth[:rows]
        return Step(logits, (self.tokens[:rows, 0], told))


def size_for(needed: int, least: int, most: int) -> int:
    """least, twice as many, four times ..., at most `most`: the first that is enough."""
    while least < needed:
        least *= 2
    return min(least, most)


@cache
def _stream_for_captures(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all engines of a thread, which come and go: torch has 32 streams, and gives them out in turn."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_workspace_of_the_stream() -> Iterator[None]:
    """What cuBLAS's products need besides comes from the graphs' own memory. torch keeps a piece for each stream, 32 MB
    on Hopper, and a graph would have its address. In torch 2.13 that piece is freed with any graph of the stream, also
    one of another engine, while the others go on writing there (https://github.com/pytorch/pytorch/issues/193402)."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # as torch's compiler does around its graphs
    clear()
    try:
        yield
    finally:
        clear()


class CaptureOnCUDA:
    """-> (what queues the function's kernels again, the tensors that they write). All on one stream of the device: the
    current device may be another one, whose graph would be empty. All graphs share the memory in which they compute:
    one runs at a time, and nothing but the results outlasts it."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = _stream_for_captures(device, threading.get_ident())

    def __call__(self, function: Callable[[], Step]) -> tuple[Callable[[], None], Step]:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(here)
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(2):  # the first time is not recorded: kernels are chosen, tables are copied
                        function()
            finally:  # also if there is no memory for it: what it has queued writes tokens and slots
                here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile. After an error torch would stay on the graph's stream.
            capturing = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
            with torch.cuda.stream(here), _no_workspace_of_the_stream(), capturing:
                found = function()
        return graph.replay, found
