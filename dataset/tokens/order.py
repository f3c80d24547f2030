"""Orders over examples: shuffled, held out for validation, repeated. A seed gives the same on every machine."""

from pathlib import Path

import numpy as np

from common.console import UserError
from common.values import MOST_TIMES

SPLIT, PART = 1 << 62, 1 << 61  # streams of `shuffled`; the loader uses the epochs 0, 1, ... as streams


def shuffled(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of n, the same on every machine and with every numpy: n sorted keys of Philox, a counter RNG.

    Generator.permutation may change between numpy versions (NEP 19), the raw Philox stream may not. An index in the low
    bits makes the keys unique, so how ties are sorted never shows.
    """
    bits = max(n - 1, 1).bit_length()
    keys = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(n)
    keys >>= np.uint64(bits)
    keys <<= np.uint64(bits)
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.astype(np.int32 if n < 1 << 31 else np.int64)


def weighted(spec: str | Path) -> tuple[Path, float]:
    """`data.jsonl:2.5` -> (data.jsonl, 2.5)."""
    path, colon, number = str(spec).rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return Path(spec), 1.0
    if not colon or Path(spec).exists():
        return Path(spec), 1.0
    if not 0 < weight <= MOST_TIMES:
        raise UserError(f"--data_path {spec}: the number after the colon must be above 0, and at most {MOST_TIMES:,}")
    return Path(path), weight


def held_out(count: int, fraction: float, seed: int, what: str) -> np.ndarray:
    """(count,) bool: a seeded choice of this fraction of them, at least one."""
    if not 0 < fraction < 1:
        raise UserError(f"--val_fraction {fraction}: must be between 0 and 1")
    wanted = max(1, round(fraction * count))
    if wanted >= count:
        raise UserError(f"--val_fraction {fraction}: {count} {what} are too few to split; --val_path names other files")
    chosen = np.zeros(count, bool)
    chosen[shuffled(count, seed, SPLIT)[:wanted]] = True
    return chosen


def repeated(sizes: list[int], weights: list[float], seed: int) -> np.ndarray:
    """Distinct examples, group after group, each group repeated by its weight's whole part and a seeded rest of it."""
    distinct, total = sum(sizes), sum(round(size * weight) for size, weight in zip(sizes, weights))
    if total > max(distinct, (1 << 31) - 1):
        raise UserError(
            f"--data_path: the numbers after the colons make {total:,} examples of {distinct:,}; lower them, and to "
            "train longer give --epochs or --max_steps"
        )
    dtype = np.int32 if distinct < 1 << 31 else np.int64
    parts, first = [], 0
    for group, (size, weight) in enumerate(zip(sizes, weights)):
        parts += [np.arange(first, first + size, dtype=dtype)] * int(weight)
        if rest := round((weight - int(weight)) * size):
            parts.append((first + np.sort(shuffled(size, seed, PART + group)[:rest])).astype(dtype))
        first += size
    if not any(map(len, parts)):
        shares = ", ".join(f"{weight:g} of {size:,}" for size, weight in zip(sizes, weights))
        raise UserError(f"--data_path: {shares} examples leave none; the number after the colon is a factor")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
