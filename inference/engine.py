"""Many answers at once. A sequence enters when there is room, and leaves when it is done; the others go on.

    engine = Engine(model, rows=16)
    sequence = engine.submit(Request(prompt_ids, Sampling(), max_new_tokens=64, stop=tokenizer.stop_ids))
    while not sequence.finish_reason:
        engine.step()
    print(tokenizer.decode(sequence.tokens))

A step computes one more token of every running sequence. It also reads a part of the prompts that wait, so that a long
prompt delays the others by the time of one part only. The result of a request does not depend on what else is computed:
each has its own random numbers, and rows do not see each other. What differs is the rounding of the last bit, as it
does between any two batch sizes.

`submit` and `cancel` may be called from any thread, `step` from one thread only. A step that raises leaves the cache
as it was; what is to become of the sequences is left to the caller (`fail`). A sequence whose logits are NaN or
infinite ends with an error, and the others go on. (Prompts that are read in the same step lie in one row of attention,
where NaN spreads.)

Letters: B running sequences, T positions that are read, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from common.console import UserError
from inference.dice import Dice, drawn_of, is_random
from inference.drawn import Drawn, LogProb, LogProbs, to_device
from inference.graphs import DecodeGraphs
from inference.lookup import Lookup
from inference.request import Request, Sequence, lookup_of, slot_of
from inference.slots import Decoding, Reading, Slots, common_length
from model.transformer import CausalLM

READ_ALONE, READ_BESIDE = 512, 256  # positions of prompts that a step reads: if no sequence is running, and if some are
GPU_READS = 2**39  # weights x positions that a GPU may compute beside running sequences: 1 TFLOP
WORTH_WAITING = 64  # tokens: a beginning that another prompt is just reading is not read a second time
MOST_SCORES = 2**24  # of attention over the parts of several prompts: most of them are between prompts, and masked
MOST_KEYS = 2**18  # in a row of such parts, where attention needs no mask: they are copied
MOST_LOGITS = 2**24  # that are kept at a time where the log-probabilities of a prompt are asked for: 64 MB


class Engine:
    """One model, with one cache that is allocated once.

    rows         sequences that run at the same time; more wait in a queue
    capacity     tokens that prompt and answer of one sequence may have; None: the model's max_position_embeddings
    before_step  called at the beginning of each step. Engines that share a model activate their adapter with it.
    late         tokens are read a step after they were drawn, so that a GPU has the next step to do meanwhile. A token
                 that is computed after an answer's end is thrown away. None: on CUDA. Without guesses only
    prompt_lookup_num_tokens  of a sequence that are guessed and computed together (inference/lookup.py); 0: none
    """

    def __init__(
        self,
        model: CausalLM,
        rows: int = 16,
        capacity: int | None = None,
        before_step: Callable[[], None] = lambda: None,
        prompt_lookup_num_tokens: int = 0,
        late: bool | None = None,
    ):
        self.model, self.before_step, self.most_guessed = model, before_step, prompt_lookup_num_tokens
        weight, limit = model.model.embed_tokens.weight, model.config.max_position_embeddings
        self.device, self.rows = weight.device, rows
        dtype = model.compute_dtype or weight.dtype
        self.slots = Slots(model.config, rows, min(capacity or limit, limit), dtype, self.device)
        self.waiting: deque[Sequence] = deque()
        self.reading: list[Sequence] = []  # in the order they came
        self.running: list[Sequence] = []  # running[i] is in row i
        on_cuda = self.device.type == "cuda"
        self.late = (on_cuda if late is None else late) and not self.most_guessed
        self.graphs = DecodeGraphs(model, self.slots) if on_cuda else None
        self.unread: Drawn | None = None  # of the last step, for all that run
        self.wider = times_as_many(model.num_parameters(active=True)) if on_cuda else 1
        self.dice = Dice(self.device)
        self.steps = 0

    @property
    def capacity(self) -> int:
        return self.slots.capacity

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    def submit(self, request: Request) -> Sequence:
        """Puts it into the queue. UserError if the prompt is empty, or does not fit with what is to be written."""
        if not request.prompt:
            raise UserError("generation needs at least one token to start from")
        if len(request.prompt) + request.max_new_tokens > self.capacity:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones exceed the model's "
                f"{self.capacity} positions: shorten the conversation or ask for fewer (--max_new_tokens)"
            )
        if wrong := [token for token in request.sampling.logit_bias if not 0 <= token < self.model.config.vocab_size]:
            raise UserError(f"logit_bias: {wrong[0]} is no token; there are {self.model.config.vocab_size}")
        generator = None
        if not request.sampling.greedy and request.sampling.seed is not None:
            generator = torch.Generator(self.device).manual_seed(request.sampling.seed)
        sequence = Sequence(request, generator)
        self.waiting.append(sequence)
        return sequence

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Computes the next token of every running sequence, or the next ones where they were guessed -> the sequences
        that got a token or came to an end."""
        self.steps += 1
        self.before_step()
        moved = self._drop_cancelled()
        self._admit()
        logits: list[Tensor] = []
        drawing = list(self.running)
        guesses = self._guesses()
        parts = self._parts()
        complete = [sequence for sequence, part in parts if _is_read(sequence, len(part))]
        ahead, drawn = torch.empty(0), None
        if self.running:
            ahead, drawn = self._decode(guesses, draw=not complete)
            logits.append(ahead[:, 0])
        if parts:
            logits.append(self._read(parts))
        # from here on nothing fails halfway: what was computed is entered
        before, self.unread = self.unread, None
        for sequence in self.running if before is None else ():
            slot_of(sequence).ids.append(sequence.tokens[-1])
        for sequence, part in parts:
            slot_of(sequence).ids.extend(part)
        for sequence in complete:
            self.reading.remove(sequence)
            self.slots.move(slot_of(sequence), len(self.running))
            self.running.append(sequence)
            drawing.append(sequence)
        if drawing and drawn is None:
            drawn = self.dice.draw(drawing, torch.cat(logits))
        if before is not None:
            moved += self._enter_all(before, computed=True)
        if drawn is not None and self.late and not any(map(_cannot_wait, self.running)):
            self.unread = drawn
        elif drawn is not None:
            moved += self._enter_all(drawn, computed=False)
        self._keep_right(drawing[: len(guesses)], guesses, ahead)
        self._drop_finished()
        if not self.running:
            self.unread = None
        return list(dict.fromkeys(moved))  # one may have got a token of the step before, and its last

    def _decode(self, guesses: list[list[int]], draw: bool) -> tuple[Tensor, Drawn | None]:
        """-> logits (B, T, V) after the last token of each running sequence, whether the host has read it or not, and
        after the guesses that follow it; and the tokens, where a graph has drawn them.

        draw: the running sequences are all that get a token in this step
        """
        T = 1 + max(map(len, guesses))
        if self.unread is None:
            fed = [[s.tokens[-1], *guess] + [0] * (T - 1 - len(guess)) for s, guess in zip(self.running, guesses)]
            tokens = to_device(fed, self.device)
        else:
            tokens = self.unread.tokens[:, None]
            if self.unread.sequences != self.running:
                place = {sequence: i for i, sequence in enumerate(self.unread.sequences)}
                tokens = tokens[to_device([place[sequence] for sequence in self.running], self.device)]
        found, running = None, list(self.running)
        if self.graphs is not None and T == 1:
            if draw and not any(sequence.said for sequence in running):
                fill = partial(self.dice.fill, running) if is_random(running) else None
                found = self.graphs.step(tokens, self.dice.settings(running), fill)
            else:
                found = self.graphs.step(tokens)
        if found is None:
            return self.model(tokens, cache=Decoding(self.slots, len(tokens), T)).logits, None
        return found.logits[:, None], found.drawn and drawn_of(running, *found.drawn, found.logits)

    def fail(self, error: BaseException) -> list[Sequence]:
        """Ends all sequences with this error -> those sequences. What the slots hold is not trusted any more."""
        everyone = [*self.running, *self.reading]
        while self.waiting:
            everyone.append(self.waiting.popleft())
        self.running, self.reading, self.unread = [], [], None
        for sequence in everyone:
            sequence.error = error
            self._finish(sequence, "error")
        for slot in self.slots.slots:
            slot.ids.clear()
        return everyone

    # ---- who is where

    def _drop_cancelled(self) -> list[Sequence]:
        dropped = [s for s in (*self.running, *self.reading, *self.waiting) if s.cancelled]
        for sequence in dropped:
            self._finish(sequence, "cancelled")
            if sequence.slot and not self.slots.is_finite(sequence.slot):  # nobody has seen its last logits
                self.slots.wipe(sequence.slot, behind=1 + self.most_guessed)
            for group in (self.reading, self.waiting):
                if sequence in group:
                    group.remove(sequence)
        self._drop_finished()
        return dropped

    def _drop_finished(self) -> None:
        """The rows of those that ended are filled with the last ones, so that the running rows stay the first ones."""
        for row in reversed(range(len(self.running))):
            if self.running[row].finish_reason:
                last = self.running.pop()
                if row < len(self.running):
                    self.slots.move(slot_of(last), row)
                    self.running[row] = last

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.slot:
            sequence.slot.busy, sequence.slot.used = False, self.steps
        sequence.finish_reason = reason

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.reading) < self.rows:
            prompt = self.waiting[0].request.prompt
            for other in self.reading:  # wait for a beginning that is being read
                there = len(slot_of(other).ids) + WORTH_WAITING
                if len(prompt) > there and common_length(other.request.prompt, prompt, len(prompt) - 1) >= there:
                    return
            sequence = self.waiting[0]
            sequence.slot = self.slots.claim(prompt, self.steps)
            self.waiting.popleft()  # only now: if there is no memory to claim a slot, `fail` still finds the sequence
            if sequence.request.prompt_logprobs:
                sequence.slot.ids.clear()  # the logits at all its positions are needed
            sequence.cached_tokens = len(sequence.slot.ids)
            self.reading.append(sequence)

    # ---- guessing tokens

    def _guesses(self) -> list[list[int]]:
        """Tokens that may follow, for each running sequence."""
        if not self.most_guessed or not self.running:
            return [[] for _ in self.running]
        room = self.capacity - max(len(slot_of(sequence).ids) for sequence in self.running) - 1
        found = []
        for sequence in self.running:
            request, said = sequence.request, sequence.tokens
            lookup = sequence.lookup = sequence.lookup or Lookup(request.prompt)
            lookup.extend(said[len(lookup.ids) - len(request.prompt) :])
            found.append(lookup.guess(min(self.most_guessed, request.max_new_tokens - len(said) - 1, room)))
        return found

    def _keep_right(self, sequences: list[Sequence], guesses: list[list[int]], logits: Tensor) -> None:
        """Draws the tokens after each guess that was right. logits (B, T, V), of which the first are drawn from.

        A token is drawn as it would be without guesses, from the same logits and random numbers, and compared. This is
        speculative sampling (arXiv:2211.17192) for a draft that is certain of its tokens.
        """
        going = [row for row, guess in enumerate(guesses) if guess]
        for row in going:
            lookup_of(sequences[row]).right = 0
        for i in range(logits.shape[1] - 1 if going else 0):
            right = []
            for row in going:
                sequence, guess = sequences[row], guesses[row]
                if not sequence.finish_reason and i < len(guess) and sequence.tokens[-1] == guess[i]:
                    right.append(row)
                    sequence.guessed += 1
                    lookup_of(sequence).right = i + 1
                    slot_of(sequence).ids.append(guess[i])
            going = right
            if not going:
                return
            self._enter_all(self.dice.draw([sequences[row] for row in going], logits[going, i + 1]), computed=False)

    # ---- reading prompts

    def _parts(self) -> list[tuple[Sequence, list[int]]]:
        """What is read in this step: (sequence, the tokens of its prompt)."""
        room = self.wider * (READ_BESIDE if self.running else READ_ALONE)
        parts, queries, keys = [], 0, 0
        for sequence in self.reading:
            request, done = sequence.request, len(slot_of(sequence).ids)
            if request.prompt_logprobs:
                room = min(room, max(MOST_LOGITS // self.model.config.vocab_size, 1))
            part = request.prompt[done : done + room]
            queries, keys, room = queries + len(part), keys + done + len(part), room - len(part)
            too_many = keys > MOST_KEYS if self.slots.flash else queries * keys > MOST_SCORES
            if not part or parts and too_many:
                break
            parts.append((sequence, part))
        return parts

    def _read(self, parts: list[tuple[Sequence, list[int]]]) -> Tensor:
        """-> logits (B, V) after the last token of each prompt that is complete with this."""
        tokens = to_device([[token for _, part in parts for token in part]], self.device)  # (1, T)
        cache = Reading(self.slots, [(slot_of(sequence), len(part)) for sequence, part in parts])
        wanted, last, start = [], [], 0  # places in the row
        for sequence, part in parts:
            stop = start + len(part)
            if sequence.request.prompt_logprobs:
                wanted += range(start, stop)
            elif _is_read(sequence, len(part)):
                wanted.append(stop - 1)
            if _is_read(sequence, len(part)):
                last.append(len(wanted) - 1)
            start = stop
        places = to_device(torch.tensor(wanted, dtype=torch.int64), self.device)
        logits = self.model(tokens, selected=places, cache=cache).logits
        start = 0
        for sequence, part in parts:
            if sequence.request.prompt_logprobs:
                done = len(slot_of(sequence).ids)
                targets = sequence.request.prompt[done + 1 : done + 1 + len(part)]
                rows = logits[start : start + len(targets)]
                chosen = to_device(torch.tensor(targets, dtype=torch.int64), self.device)
                sequence.prompt_logprobs += LogProbs.of(rows, chosen, sequence.request.logprobs or 0).read()
                start += len(part)
            elif _is_read(sequence, len(part)):
                start += 1
        return logits[to_device(torch.tensor(last, dtype=torch.int64), self.device)]

    # ---- what was drawn

    def _enter_all(self, drawn: Drawn, computed: bool) -> list[Sequence]:
        """Gives the sequences their tokens. The one place in a step that waits for the device.

        computed: the slots hold keys and values of these tokens already
        """
        tokens, logprobs = drawn.read()
        now = time.perf_counter()
        going = [own for own in zip(drawn.sequences, tokens, logprobs) if not own[0].finish_reason]
        for sequence, token, logprob in going:
            self._enter(sequence, token, logprob, now)
            if computed and not sequence.finish_reason:
                slot_of(sequence).ids.append(token)
        return [sequence for sequence, *_ in going]

    def _enter(self, sequence: Sequence, token: int, logprob: LogProb | None, now: float) -> None:
        """token: -1 where the logits are not finite."""
        request = sequence.request
        if token < 0:
            self.slots.wipe(slot_of(sequence), behind=1 + self.most_guessed)
            sequence.error = UserError(
                "the model computes NaN or infinity: its weights are damaged, or too large for its precision "
                "(try --dtype float32)"
            )
            return self._finish(sequence, "error")
        if request.max_new_tokens == 0:
            return self._finish(sequence, "length")
        sequence.first_token = sequence.first_token or now
        if request.logprobs is not None and logprob is not None:
            sequence.logprobs.append(LogProb(logprob.value, logprob.likeliest[: request.logprobs]))
        if token in request.stop:
            sequence.end = token
            return self._finish(sequence, "stop")
        if sequence.said:
            sequence.said.add(token)
        sequence.tokens.append(token)
        if len(sequence.tokens) == request.max_new_tokens:
            self._finish(sequence, "length")


def times_as_many(weights: int) -> int:
    """How many times as many positions of prompts a GPU reads in a step than a CPU does."""
    return min(max(GPU_READS // weights // READ_BESIDE, 1), 8)


def _is_read(sequence: Sequence, more: int = 0) -> bool:
    return len(slot_of(sequence).ids) + more >= len(sequence.request.prompt)


def _cannot_wait(sequence: Sequence) -> bool:
    """Whether its newest token has to be read now: the next one's penalties depend on it, or it is the last one."""
    return sequence.said is not None or len(sequence.tokens) + 1 >= sequence.request.max_new_tokens


def follow(engine: Engine, sequence: Sequence) -> Iterator[int]:
    """Runs the engine for this sequence and yields its tokens. May be abandoned at any time. Raises its error."""
    seen = 0
    try:
        while True:
            ended = sequence.finish_reason is not None
            for token in sequence.tokens[seen:]:
                seen += 1
                yield token
            if sequence.error is not None:
                raise sequence.error
            if ended:
                return
            engine.step()
    finally:
        sequence.cancel()
