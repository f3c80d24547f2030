"""Number of an optimiser step -> this rank's batches. They depend on nothing that was asked before.

    loader = Loader(ds, packing=True, batch_size=8, accumulation_steps=4, max_seq_len=512)
    for step, batches in loader.prefetch(0, loader.steps_per_epoch):
        for batch in batches:          # as many on every rank, of the same sizes
            ...

An epoch is a seeded permutation, so a step's examples are a slice of it. Two ways to fill rows:
    packing=False   an example is a row (pretraining): batch_size x accumulation_steps x world rows a step
    packing=True    the same number of *examples* a step, packed best-fit into as few rows as hold them. A rank's rows
                    form batches of batch_size, the remaining ones a smaller batch; after `limit_shapes`, for compiled
                    code, with blank rows up to a size that is usual
The ranks take rows in turn. Which examples a step holds depends only on the product batch_size x accumulation_steps x
world.

B = rows of a batch, T = max_seq_len, N = rows of a rank's step, K = selected positions
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from operator import mul
from typing import Any

import numpy as np
import torch

from common.console import UserError
from dataset.batches.packing import pack
from dataset.tokens.examples import TokenDataset
from dataset.tokens.order import shuffled
from model.attention import Segments, find_segments

IGNORED = -100  # a target that is not trained on
SELECTED_MULTIPLE = 128
FEW_SHAPES = 4  # of batches, in a run whose code is compiled for each
SOME_STEPS = 64  # that are looked at, to know how many rows a step has
AHEAD = 2  # steps prepared while the device works on one


@dataclass(frozen=True)
class Batch:
    """One forward pass on one device."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -100 = not trained on
    documents: torch.Tensor  # (B, T) int32, numbered from 1 in each row; 0 = filling, a document of its own
    positions: torch.Tensor  # (B, T) int64, from 0 in each document
    selected: torch.Tensor | None  # (K,) int64, b * T + t of the positions with a target, then filling; None = all
    trained_tokens: int
    examples: tuple[int, ...]
    # (B, T, ...) what the data set knows of each target (TokenDataset.extras), 0 in the filling
    extras: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    segments: Segments | None = field(default=None, kw_only=True)  # where the documents begin and end
    whole_rows: bool = field(default=False, kw_only=True)  # each row is one document, so no mask is needed
    copy: Copy | None = field(default=None, kw_only=True)  # the one on the GPU, if it was made ahead

    def context(self) -> dict[str, Any]:
        """The model's keyword arguments: what it needs besides the tokens."""
        names = ("targets", "positions", "selected")
        packed = {} if self.whole_rows else dict(documents=self.documents, segments=self.segments)
        return {name: getattr(self, name) for name in names} | packed

    def to(self, device: torch.device | str) -> Batch:
        """This batch on the device. For CUDA through pinned memory, so that copying overlaps with computing."""
        if torch.device(device).type == "cpu":
            return self
        if self.copy is not None:
            return self.copy.get()
        cuda = torch.device(device).type == "cuda"
        return (self.pinned() if cuda else self)._map(lambda tensor: tensor.to(device, non_blocking=cuda))

    def pinned(self) -> Batch:
        """This batch in page-locked memory, from which a GPU reads by itself."""
        return self._map(lambda tensor: tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """This batch with each of its tensors changed."""

        def changed(value):
            if isinstance(value, dict):
                return {name: changed(own) for name, own in value.items()}
            if isinstance(value, Segments):
                return Segments(*map(changed, value))
            return change(value) if isinstance(value, torch.Tensor) else value

        return replace(self, **{own.name: changed(getattr(self, own.name)) for own in fields(self)})


@dataclass(frozen=True)
class Copy:
    """A batch on a GPU, which another stream is perhaps still copying."""

    batch: Batch
    done: torch.cuda.Event

    def get(self) -> Batch:
        """The batch, for work that is queued from now on: the GPU waits for the copy, and this thread does not."""
        stream = torch.cuda.current_stream(self.batch.tokens.device)
        stream.wait_event(self.done)
        # its memory belongs to the copying stream, which would else use it again while this one still reads
        self.batch._map(lambda tensor: tensor.record_stream(stream) or tensor)
        return self.batch


class Copier:
    """Copies batches to a GPU, on a stream of its own: neither the loop nor the kernels that it queues wait for it."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Batch:
        """The batch, which stays on the CPU, with its copy."""
        with torch.cuda.stream(self.stream):
            there, done = batch.pinned().to(self.device), torch.cuda.Event()
            done.record(self.stream)
        return replace(batch, copy=Copy(there, done))


class Loader:
    """The batches of every step.

    packing             False: one example a row; True: several, see above
    batch_size          rows of a batch at most
    accumulation_steps  batches of a step; with batch_size and world it tells the examples of a step
    rank, world         which process this is, of how many
    shuffle             False: in the data set's order, for validation
    device              a GPU: `prefetch` also copies batches there, and Batch.to has nothing left to do
    """

    ROWS_PER_EXAMPLE = 1  # length of the longest example, in multiples of max_seq_len
    sizes: list[int] = []  # rows of a step's last batch, after `limit_shapes`

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        packing: bool,
        batch_size: int,
        accumulation_steps: int,
        max_seq_len: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        device: torch.device | None = None,
    ):
        if len(dataset) == 0 or int(dataset.lengths.max()) > self.ROWS_PER_EXAMPLE * max_seq_len + 1:
            raise UserError(f"rows of {max_seq_len} do not hold this data set: {dataset.summary}")
        self.dataset, self.packing, self.max_seq_len = dataset, packing, max_seq_len
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.seed, self.shuffle = seed, shuffle
        self.copier = Copier(device) if device is not None and device.type == "cuda" else None
        self.examples_per_step = batch_size * accumulation_steps * world
        self.steps_per_epoch = -(-len(dataset) // self.examples_per_step)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._extras = {name: (own.shape[1:], own.dtype) for name, own in dataset.extras(0).items()}

    def examples(self, step: int) -> np.ndarray:
        """(examples,) the numbers of a step's examples, on all ranks together; steps are counted over all epochs."""
        epoch, nth = divmod(step, self.steps_per_epoch)
        begin = nth * self.examples_per_step
        end = min(begin + self.examples_per_step, len(self.dataset))
        if not self.shuffle:
            return np.arange(begin, end)
        known, permutation = self._permutation
        if known != epoch:
            permutation = shuffled(len(self.dataset), self.seed, epoch)
            self._permutation = (epoch, permutation)
        return permutation[begin:end]

    def row_length(self, step: int) -> int:
        return self.max_seq_len

    def rows(self, step: int) -> list[list[int]]:
        """The examples of each row of the step, on all ranks together. Blank rows give each rank the same number."""
        examples = self.examples(step).tolist()
        if self.packing:
            lengths = (self.dataset.lengths[examples] - 1).tolist()
            rows = [[examples[i] for i in row] for row in pack(lengths, self.row_length(step))]
            share = sum(self._batch_sizes(-(-len(rows) // self.world)))
        else:
            rows = [[example] for example in examples]
            share = -(-len(rows) // self.world)
            # full batches, all of one shape; only a data set that is smaller than a step has smaller ones
            share = -(-share // self.batch_size) * self.batch_size if self.steps_per_epoch > 1 else share
        return rows + [[]] * (share * self.world - len(rows))

    def batches(self, step: int) -> list[Batch]:
        rows, length = self.rows(step)[self.rank :: self.world], self.row_length(step)
        for row in rows:
            for example in row:
                self.dataset.will_read(example)  # all of them first: a disk reads several at once faster
        batches, begin = [], 0
        for size in self._batch_sizes(len(rows)):
            batches.append(self._batch(rows[begin : begin + size], length))
            begin += size
        return batches

    def prefetch(self, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, batches) for start <= step < stop. One thread prepares and copies them; its errors are raised here."""
        # a thread begins on GPU 0. Pinned memory would take room there for every process
        begin = partial(torch.cuda.set_device, self.copier.stream.device) if self.copier else None
        pool = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=begin)
        try:
            waiting = deque()
            for step in range(start, stop):
                waiting.append((step, pool.submit(self._ready, step)))
                if len(waiting) > AHEAD:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            for ready, future in waiting:
                yield ready, future.result()
        finally:  # also when the consumer leaves early
            pool.shutdown(wait=True, cancel_futures=True)

    def _ready(self, step: int) -> list[Batch]:
        batches = self.batches(step)
        return [self.copier(batch) for batch in batches] if self.copier else batches

    def _some_steps(self) -> Sequence[int]:
        """All steps of an epoch, or SOME_STEPS of them, evenly spread."""
        steps = self.steps_per_epoch
        return range(steps) if steps <= SOME_STEPS else [steps * i // SOME_STEPS for i in range(SOME_STEPS)]

    def count_shapes(self) -> int:
        """How many shapes (rows, length) its batches have, as far as some steps show."""
        shapes = set()
        for step in self._some_steps():
            sizes = self._batch_sizes(len(self.rows(step)) // self.world)
            shapes.update((size, self.row_length(step)) for size in sizes)
        return len(shapes)

    def count_positions(self, steps: int) -> int:
        """About how many positions so many steps of this rank compute."""
        asked = self._some_steps()
        counts = (len(self.rows(step)) // self.world * self.row_length(step) for step in asked)
        return steps * sum(counts) // len(asked)

    def limit_shapes(self, most: int = FEW_SHAPES) -> None:
        """From now on batches have at most so many shapes, for compiled code: the rows of a step's last batch are
        filled up to one of a few numbers, which some steps show. Blank rows cost time and change no result.

        One shape is kept free. Full batches have it, or a step with more rows than any of those steps: each epoch is
        shuffled anew. If an epoch has few steps, several epochs are looked at."""
        if self.packing:
            several = self.shuffle and self.steps_per_epoch < SOME_STEPS
            steps = range(SOME_STEPS) if several else self._some_steps()
            shares = [len(self.rows(step)) // self.world for step in steps]
            self.sizes = few_sizes([(n - 1) % self.batch_size + 1 for n in shares], most - 1)

    def _batch_sizes(self, rows: int) -> list[int]:
        """The rows of each batch of a rank's step; together at least `rows`."""
        full, rest = divmod(rows, self.batch_size)
        sizes = self.sizes or [rest]
        last = min((n for n in sizes if n >= rest), default=self.batch_size if full else max(sizes))
        while last < rest:  # more than in the steps that were looked at: an eighth more, as the next such step may need
            last = min(last + -(-last // 8), self.batch_size)
        return [self.batch_size] * full + [last] * (rest > 0)

    def describe(self) -> str:
        """Examples -> rows -> steps of an epoch, for people. Of more than 64 steps, 64 are counted."""
        steps, asked = self.steps_per_epoch, self._some_steps()
        examples = np.concatenate([self.examples(step) for step in asked])
        counts = [sum(map(bool, self.rows(step))) for step in asked]
        lengths = [self.row_length(step) for step in asked]
        computed = sum(map(mul, counts, lengths))
        fill = int((self.dataset.lengths[examples] - 1).sum()) / computed
        about = "about " if self.packing and len(examples) < len(self.dataset) else ""
        of_all = int((self.dataset.lengths - 1).sum()) / fill if about else computed * len(self.dataset) / len(examples)
        in_all = round(of_all * sum(counts) / computed)
        up_to = "up to " if min(lengths) < max(lengths) else ""
        return (
            f"{len(self.dataset):,} examples -> {about}{in_all:,} rows of {up_to}{max(lengths):,} "
            f"-> {steps:,} steps an epoch (fill {fill:.0%})"
        )

    def _batch(self, rows: list[list[int]], length: int) -> Batch:
        shape = (len(rows), length)
        tokens = np.full(shape, self.dataset.end_of_text, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        documents = np.zeros(shape, np.int32)
        positions = np.broadcast_to(np.arange(length), shape).copy()
        extras = {name: np.zeros((*shape, *inner), dtype) for name, (inner, dtype) in self._extras.items()}
        examples = [example for row in rows for example in row]
        ids, trained = zip(*map(self.dataset.read, examples)) if examples else ((), ())
        # all examples one after the other: an array operation for each of them would take most of the time
        sizes = np.array([len(own) - 1 for own in ids], np.int64)
        row = np.repeat(np.arange(len(rows)), list(map(len, rows)))  # of each example
        number = np.arange(len(examples)) - np.searchsorted(row, row) + 1  # in its row
        before = np.cumsum(sizes) - sizes  # in front of each example, of all
        used = np.bincount(row, sizes, len(rows)).astype(np.int64)  # positions of each row
        begin = before - (np.cumsum(used) - used)[row]  # of each example, in its row
        nth = np.arange(int(sizes.sum()))  # of all positions that are used
        place = nth + np.repeat(row * length + begin - before, sizes)
        positions -= used[:, None]
        positions.ravel()[place] = nth - np.repeat(before, sizes)
        documents.ravel()[place] = np.repeat(number, sizes)
        for array, values in ((tokens, [own[:-1] for own in ids]), (targets, [own[1:] for own in ids])):
            array.ravel()[place] = np.concatenate([nth[:0], *values])
        if any(own is not None for own in trained):
            kept = [own[1:] if own is not None else np.ones(n, bool) for own, n in zip(trained, sizes)]
            targets.ravel()[place[~np.concatenate(kept)]] = IGNORED
        for name, array in extras.items() if examples else ():
            found = [self.dataset.extras(example)[name][1:] for example in examples]
            array.reshape(-1, *array.shape[2:])[place] = np.concatenate(found)
        if not self.packing:
            documents, positions = self._documents_of_stream(tokens, documents)
        trained_tokens = int((targets != IGNORED).sum())
        numbers = torch.from_numpy(documents)
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            documents=numbers,
            positions=torch.from_numpy(positions),
            selected=select(targets) if self.packing else None,
            trained_tokens=trained_tokens,
            examples=tuple(examples),
            extras={name: torch.from_numpy(values) for name, values in extras.items()},
            segments=find_segments(numbers),
            whole_rows=bool((documents == documents[:, :1]).all()),
        )

    def _documents_of_stream(self, tokens: np.ndarray, filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(documents, positions) of rows of a stream: each `start_of_text` among the inputs opens a document.
        filled: (B, T) 1, and 0 in the filling."""
        opens = tokens == self.dataset.start_of_text
        opens[:, 0] = True
        opens &= filled > 0
        opens[:, 1:] |= filled[:, 1:] < filled[:, :-1]  # the filling at the end is a document too, number 0
        t = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        positions = t - np.maximum.accumulate(np.where(opens, t, 0), axis=1)
        return np.cumsum(opens, axis=1, dtype=np.int32) * filled, positions


def few_sizes(numbers: Sequence[int], most: int) -> list[int]:
    """`most` of the numbers, such that raising each number to the next one of them adds least in all: of 2, 7, 9, 9, 9
    and 10, two are 2 and 10, and three are 2, 9 and 10."""
    counts = Counter(numbers)
    *others, largest = sorted(counts)

    def added(sizes: tuple[int, ...]) -> int:
        return sum(count * (next(size for size in sizes if size >= n) - n) for n, count in counts.items())

    smaller = combinations(others, min(most - 1, len(others)))
    return list(min(((*few, largest) for few in smaller), key=added))


def select(targets: np.ndarray) -> torch.Tensor | None:
    """(K,) positions for which the head is needed: those with a target, and filling up to a multiple.

    The filling must not count in the loss, so it repeats a position without a target. If there is no such position, or
    if selecting saves nothing: None, which means all positions.
    """
    flat = targets.ravel()
    trained = np.flatnonzero(flat != IGNORED)
    size = max(-(-len(trained) // SELECTED_MULTIPLE), 1) * SELECTED_MULTIPLE
    if size >= len(flat) or len(trained) == len(flat):
        return None
    filler = int(np.argmax(flat == IGNORED))
    selected = np.full(size, filler, np.int64)
    selected[: len(trained)] = trained
    return torch.from_numpy(selected)
