"""Figures for Prometheus, in its text format."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from serve.choices import Choice
from serve.models import Served

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # the bounds of the histograms' buckets


class Histogram:
    def __init__(self):
        self.counts, self.sum, self.count = [0] * len(SECONDS), 0.0, 0

    def add(self, seconds: float) -> None:
        self.counts = [count + (seconds <= bound) for count, bound in zip(self.counts, SECONDS)]
        self.sum, self.count = self.sum + seconds, self.count + 1

    def lines(self, name: str) -> Iterable[str]:
        for bound, count in zip((*SECONDS, "+Inf"), (*self.counts, self.count)):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {self.count}"


class Metrics:
    def __init__(self, table: dict[str, Served]):
        self.table = table
        self.responses: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.tokens: Counter[str] = Counter()
        self.first_token, self.request = Histogram(), Histogram()

    def respond(self, path: str, status: int) -> None:
        self.responses[path, status] += 1

    def count(self, choices: list[Choice]) -> None:
        for choice in choices:
            sequence = choice.sequence
            if sequence.slot is None:  # it never began
                continue
            self.tokens["prompt"] += len(sequence.request.prompt)
            self.tokens["cached"] += sequence.cached_tokens
            self.tokens["generated"] += choice.seen
            self.tokens["guessed"] += sequence.guessed
            if choice.finish_reason:
                self.request.add(time.perf_counter() - sequence.submitted)
            if sequence.first_token:
                self.first_token.add(sequence.first_token - sequence.submitted)

    def text(self) -> str:
        responses = [
            f'sparrow_responses_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.responses.items())
        ]
        tokens = [f'sparrow_tokens_total{{kind="{kind}"}} {self.tokens[kind]}' for kind in sorted(self.tokens)]
        running, waiting = [], []
        for name, served in self.table.items():
            engine = served.engine
            running.append(f'sparrow_sequences_running{{model="{name}"}} {len(engine.running) + len(engine.reading)}')
            waiting.append(f'sparrow_sequences_waiting{{model="{name}"}} {len(engine.waiting)}')
        families = [
            ("sparrow_responses_total", "counter", "responses by path and status", responses),
            (
                "sparrow_tokens_total",
                "counter",
                "tokens of prompts, those of them found in the cache, written, and those of them guessed before",
                tokens,
            ),
            ("sparrow_sequences_running", "gauge", "answers in the making", running),
            ("sparrow_sequences_waiting", "gauge", "answers that wait for a place", waiting),
        ]
        for name, help, histogram in (
            ("sparrow_first_token_seconds", "from the request to its first token", self.first_token),
            ("sparrow_answer_seconds", "from the request to the end of its answer", self.request),
        ):
            families.append((name, "histogram", help, list(histogram.lines(name))))
        lines = []
        for name, kind, help, samples in families:
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}", *samples]
        return "\n".join(lines) + "\n"
