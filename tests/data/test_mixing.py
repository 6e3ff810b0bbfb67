"""Mixing: every step is the mixture that was asked for, and epochs end where they should."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.data.mixing import Mixing

quick = settings(deadline=None, max_examples=40)


@st.composite
def mixtures(draw) -> tuple[list[Fraction | None], list[list[int]]]:
    """The shares of 1 to 5 sources (None: a weight), and of each the sequences of its epochs 0, 1, …, then again."""
    number = draw(st.integers(1, 5))
    parts = draw(st.lists(st.integers(1, 50), min_size=number, max_size=number))
    has_share = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    shares = [
        Fraction(part, sum(parts)) if with_share else None for part, with_share in zip(parts, has_share, strict=True)
    ]
    epochs = st.lists(st.integers(0, 60), min_size=1, max_size=3).filter(any)
    return shares, draw(st.lists(epochs, min_size=number, max_size=number))


def mixing(mixture, batch_size: int) -> Mixing:
    shares, epochs = mixture

    def before(of_source: list[int]):
        return lambda epoch: sum(of_source[e % len(of_source)] for e in range(epoch))

    return Mixing(batch_size, shares, [before(each) for each in epochs], epoch=sum(each[0] for each in epochs) + 1)


def wanted(mixture, place: int) -> list[Fraction]:
    """What each source should have given after ``place`` sequences: its line, written down from the definition."""
    shares, epochs = mixture
    rest = 1 - sum(share for share in shares if share is not None)
    found = [share * place if share is not None else Fraction(0) for share in shares]
    left, epoch = rest * place, 0
    weighted = [i for i, share in enumerate(shares) if share is None]
    while weighted and left > 0:
        sizes = {i: epochs[i][epoch % len(epochs[i])] for i in weighted}
        total = sum(sizes.values())
        part = min(Fraction(1), left / total) if total else Fraction(0)
        for i in weighted:
            found[i] += part * sizes[i]
        left -= part * total
        epoch += 1
    return found


@quick
@given(mixtures(), st.sampled_from([1, 2, 3, 7, 16, 33]))
def test_every_step_is_within_one_sequence_of_each_share_also_where_epochs_end(mixture, batch_size):
    steps = 40
    sources, _ = mixing(mixture, batch_size).rows(0, steps * batch_size)
    for step in range(steps):
        here = sources[step * batch_size : (step + 1) * batch_size]
        lines = [wanted(mixture, place * batch_size) for place in (step, step + 1)]
        for source, (old, new) in enumerate(zip(*lines, strict=True)):
            assert abs(np.count_nonzero(here == source) - (new - old)) <= 1
            given_so_far = np.count_nonzero(sources[: (step + 1) * batch_size] == source)
            assert abs(given_so_far - new) <= 1, "what is too little or too much adds up"


@quick
@given(mixtures(), st.sampled_from([1, 3, 16]), st.integers(0, 300), st.integers(1, 40))
def test_any_position_is_the_straight_runs(mixture, batch_size, begin, count):
    straight = mixing(mixture, batch_size).rows(0, begin + count)
    one = mixing(mixture, batch_size)
    for row, expected in zip(one.rows(begin, begin + count), straight, strict=True):
        assert row.tolist() == expected[begin:].tolist()
    counted = np.bincount(straight[0][:begin], minlength=len(mixture[0])).tolist()
    assert one.given(begin) == counted
    # A source's sequences come one after the other, none is left out.
    for source in range(len(mixture[0])):
        numbers = straight[1][straight[0] == source]
        assert numbers.tolist() == list(range(len(numbers)))


@quick
@given(mixtures(), st.sampled_from([1, 3, 16]))
def test_an_epoch_ends_when_the_weighted_sources_have_finished_theirs(mixture, batch_size):
    shares, epochs = mixture
    mix = mixing(mixture, batch_size)
    begins = [mix.first_sequence(epoch) for epoch in range(6)]
    assert begins == sorted(begins)
    for epoch, begin in enumerate(begins):
        given_before = mix.given(begin)
        for source, share in enumerate(shares):
            if share is None:
                sizes = epochs[source]
                assert given_before[source] == sum(sizes[e % len(sizes)] for e in range(epoch))
    for sequence in range(begins[-1]):
        epoch, position = mix.locate(sequence)
        assert begins[epoch] <= sequence < begins[epoch + 1]
        assert position == sequence - begins[epoch]


@pytest.mark.parametrize("place", [0, 160, 16 * 400])
def test_sources_are_spread_over_a_step(place):
    mix = mixing(([None, Fraction(1, 4)], [[1000], [10]]), 16)
    sources = mix.rows(place, place + 16)[0]
    gaps = np.diff(np.flatnonzero(sources == 1))
    assert len(gaps) == 3
    assert set(gaps.tolist()) <= {3, 4, 5}


def test_shares_are_those_of_a_step():
    assert mixing(([None, Fraction(1, 5), None], [[30], [7], [10]]), 16).shares() == [0.6, 0.2, 0.2]
