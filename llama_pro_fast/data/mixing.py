"""Which source gives each sequence of a run, so that every step is the mixture that was asked for.

Source i should have given q_i(g) of the first g sequences of the run: a line for a source with a share; for one with a
weight a line within each epoch, from what it had given before to what it gives in it. The q_i add up to g. What it has
given after t whole steps of B sequences, C_i(t), is a whole number with

    ⌊q_i(t·B)⌋ ≤ C_i(t) ≤ ⌈q_i(t·B)⌉        and        ⌊δ⌋ ≤ C_i(t + 1) - C_i(t) ≤ ⌈δ⌉,  δ = q_i((t + 1)·B) - q_i(t·B)

so every step is within one sequence of each source's share, and an epoch is complete in the step in which its end
falls, and not before. Such numbers exist for any number of sources and any lines (they are a flow, and flows may be
rounded). Of two sources, rounding the first's line gives them. Of more, the extra sequences of a step go where one will
be due first; this can run into a dead end, so it is tried some steps ahead and taken back.

Within a step the sources are spread evenly, an epoch's sequences before the next one's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import ceil, floor

import numpy as np

CHUNK, AHEAD = 64, 32
"""Steps that are decided at a time, and how many more have to be possible after them."""


class Mixing:
    """The order of the sources.

    Args:
        batch_size: B, sequences of a step.
        shares: of each source its share of every step, None where it has a weight. If all have one, they sum to 1.
        sequences_before: of each source how many of its sequences come before an epoch; read for those with a weight.
        epoch: sequences of an epoch where every source has a share.
    """

    def __init__(
        self,
        batch_size: int,
        shares: Sequence[Fraction | None],
        sequences_before: Sequence[Callable[[int], int]],
        *,
        epoch: int = 0,
    ):
        self._batch_size, self._shares, self._before, self._epoch = batch_size, shares, sequences_before, epoch
        self._weighted = [i for i, share in enumerate(shares) if share is None]
        # Of a step, what is left for those with weights.
        self._rest = Fraction(1) - sum(share for share in shares if share is not None)
        self._ends: list[int] = []  # of epochs 0, 1, …, see _end
        self._borders: list[int] = []  # the first whole number of sequences of the run with which each is over
        self._states = [(0,) * len(shares)]  # C at steps 0, CHUNK, 2·CHUNK, …
        self._chunk = lru_cache(maxsize=4)(self._decide)
        self._lines = lru_cache(maxsize=8)(self._lines_of)
        self._rows_of = lru_cache(maxsize=4)(self._arrange)

    def shares(self) -> list[float]:
        """Of a step in the first epoch that has sequences, by source."""
        lines = self._lines(self._epoch_of(0)) if self._weighted else [(0, *s.as_integer_ratio()) for s in self._shares]
        return [slope / scale for _, slope, scale in lines]

    def locate(self, sequence: int) -> tuple[int, int]:
        """(epoch, position in it) of a sequence."""
        if not self._weighted:
            return divmod(sequence, self._epoch)
        if self._rest == 1:
            epoch = self._epoch_of(sequence)
        else:
            step, position = divmod(sequence, self._batch_size)
            epoch = self._epoch_of(step * self._batch_size) + bisect_right(self._rows_of(step)[1], position)
        return epoch, sequence - self.first_sequence(epoch)

    def first_sequence(self, epoch: int) -> int:
        """The first sequence of an epoch; that of the next where it has none."""
        if not self._weighted:
            return epoch * self._epoch
        end = self._end(epoch - 1) if epoch else 0
        if self._rest == 1 or not end:
            return end
        step = ceil(end / self._rest / self._batch_size) - 1  # in which the epoch before ends
        place = step * self._batch_size
        return place + self._rows_of(step)[1][epoch - 1 - self._epoch_of(place)]

    def rows(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence [begin, end) of the run, and which of its sequences it is; both int64."""
        if len(self._shares) == 1:
            return np.zeros(end - begin, np.int64), np.arange(begin, end)
        first, last = begin // self._batch_size, -(-end // self._batch_size)
        sources = np.concatenate([self._rows_of(step)[0] for step in range(first, last)])
        numbers = np.empty(len(sources), np.int64)
        for source, given in enumerate(self._given(first)):
            of_it = np.flatnonzero(sources == source)
            numbers[of_it] = np.arange(given, given + len(of_it))
        here = slice(begin - first * self._batch_size, end - first * self._batch_size)
        return sources[here], numbers[here]

    def given(self, sequence: int) -> list[int]:
        """How many of the first sequences of the run are of each source."""
        step, more = divmod(sequence, self._batch_size)
        given = list(self._given(step))
        if more:
            counted = np.bincount(self.rows(step * self._batch_size, sequence)[0], minlength=len(given))
            given = [number + int(new) for number, new in zip(given, counted, strict=True)]
        return given

    # Lines

    def _end(self, epoch: int) -> int:
        """How many sequences of the weighted sources epochs 0 … ``epoch`` have together."""
        while len(self._ends) <= epoch:
            self._ends.append(sum(self._before[i](len(self._ends) + 1) for i in self._weighted))
            self._borders.append(ceil(self._border(len(self._ends) - 1)))
        return self._ends[epoch]

    def _border(self, epoch: int) -> Fraction:
        """After how many sequences of the run an epoch ends."""
        return self._end(epoch) / self._rest

    def _epoch_of(self, place: int) -> int:
        """The epoch that goes on after ``place`` sequences of the run."""
        while not self._borders or self._borders[-1] <= place:
            self._end(len(self._ends))
        return bisect_right(self._borders, place)

    def _lines_of(self, epoch: int) -> list[tuple[int, int, int]]:
        """(a, b, c) of each source: q(g) = (a + b·g) / c within an epoch."""
        lines = []
        for source, share in enumerate(self._shares):
            if share is not None:
                lines.append((0, *share.as_integer_ratio()))
                continue
            begin, end = self._before[source](epoch), self._before[source](epoch + 1)
            passed = self._end(epoch - 1) if epoch else 0
            part = Fraction(end - begin, self._end(epoch) - passed)
            at_0, slope = begin - passed * part, self._rest * part
            scale = at_0.denominator * slope.denominator
            lines.append((int(at_0 * scale), int(slope * scale), scale))
        return lines

    def _target(self, source: int, place: int) -> Fraction:
        """q of a source."""
        if not self._weighted:
            return self._shares[source] * place
        a, b, c = self._lines(self._epoch_of(place))[source]
        return Fraction(a + b * place, c)

    # Steps

    def _given(self, step: int) -> tuple[int, ...]:
        place = step * self._batch_size
        if len(self._shares) == 1:
            return (place,)
        if len(self._shares) == 2:
            first = floor(self._target(0, place) + Fraction(1, 2))
            return first, place - first
        while len(self._states) <= step // CHUNK:
            self._states.append(self._chunk(len(self._states) - 1)[CHUNK])
        return self._chunk(step // CHUNK)[step % CHUNK]

    def _decide(self, chunk: int) -> list[tuple[int, ...]]:
        """C at steps CHUNK·chunk and on, to where the next chunk begins."""
        path = [self._states[chunk]]
        tries = [self._choices(CHUNK * chunk, path[0])]
        dead = set()
        while len(path) <= CHUNK + AHEAD:
            following = next((state for state in tries[-1] if (len(path), state) not in dead), None)
            if following is not None:
                path.append(following)
                tries.append(self._choices(CHUNK * chunk + len(path) - 1, following))
            else:
                assert len(path) > 1, f"no way to mix {self._shares} in steps of {self._batch_size} from {path[0]}"
                tries.pop()
                dead.add((len(path) - 1, path.pop()))
        return path[: CHUNK + 1]

    def _choices(self, step: int, given: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """What C may be after a step, the most promising first."""
        least, urgency = [], []
        for source, (done, (target, change)) in enumerate(zip(given, self._step(step), strict=True)):
            few, rest = divmod(*change)
            reached, more = divmod(*target)
            at_least = max(done + few, reached)
            at_most = min(done + few + (rest > 0), reached + (more > 0))
            if at_least > at_most:
                return
            least.append(at_least)
            if at_least < at_most:
                due = (at_least + 1 - target[0] / target[1]) / (rest / change[1])  # in so many steps
                urgency.append((due, source))
        extra = (step + 1) * self._batch_size - sum(least)
        if 0 <= extra <= len(urgency):
            for chosen in combinations([source for _, source in sorted(urgency)], extra):
                yield tuple(number + (source in chosen) for source, number in enumerate(least))

    def _step(self, step: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Of each source, as numerator and denominator, q after a step and by how much q grows in it."""
        size, place = self._batch_size, step * self._batch_size
        if not self._weighted:
            lines = [(0, *share.as_integer_ratio()) for share in self._shares]
        elif self._borders[epoch := self._epoch_of(place)] > place + size:
            lines = self._lines(epoch)
        else:
            targets = [[self._target(i, at) for at in (place, place + size)] for i in range(len(self._shares))]
            return [(new.as_integer_ratio(), (new - old).as_integer_ratio()) for old, new in targets]
        return [((a + b * (place + size), c), (b * size, c)) for a, b, c in lines]

    def _arrange(self, step: int) -> tuple[np.ndarray, list[int]]:
        """The sources of a step's sequences, int64, and where in it each epoch that goes on in it ends."""
        begin, place = self._given(step), step * self._batch_size
        end = self._given(step + 1)
        parts = []
        if self._weighted:
            epoch = self._epoch_of(place)
            done = list(begin)
            while (border := self._border(epoch)) <= place + self._batch_size:
                epoch += 1
                until = [
                    self._before[source](epoch)
                    if share is None
                    else begin[source] + floor((end[source] - begin[source]) * (border - place) / self._batch_size)
                    for source, share in enumerate(self._shares)
                ]
                parts.append([new - old for new, old in zip(until, done, strict=True)])
                done = until
            parts.append([new - old for new, old in zip(end, done, strict=True)])
        else:
            parts.append([new - old for new, old in zip(end, begin, strict=True)])
        return np.concatenate([_evenly(counts) for counts in parts]), np.cumsum([*map(sum, parts)]).tolist()


def _evenly(counts: list[int]) -> np.ndarray:
    """Each source as often as its count says, in equal distances."""
    sources = np.repeat(np.arange(len(counts)), counts)
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return sources[np.argsort(places, kind="stable")]
