"""A source's rounds: orders on disk are the ones that would be drawn, and the next one is drawn beside the reading."""

from __future__ import annotations

import os
import threading
from fractions import Fraction

import numpy as np
import pytest

from llama_pro_fast.data import drawn, rounds
from llama_pro_fast.data.drawn import DrawnOrders
from llama_pro_fast.data.rounds import Rounds, permutation

LENGTHS = np.random.default_rng(0).integers(1, 40, 300)


@pytest.fixture(autouse=True)
def every_part_is_large(monkeypatch):
    monkeypatch.setattr(rounds, "LARGE", 1)
    yield
    wait_for_the_next()


def wait_for_the_next():
    for thread in threading.enumerate():
        if thread.name == "next order":
            thread.join()


def rounds_of(cache=None, **changed) -> Rounds:
    kept = None if cache is None else DrawnOrders(cache)
    options = {"weight": Fraction("0.7"), "seq_len": 16, "packing": "best_fit", "seed": 3, "source": 0}
    return Rounds(LENGTHS, **options | changed, kept=kept, content="key")


def all_pieces(source: Rounds) -> list[list[int]]:
    found = [array.tolist() for array in source.pieces(0, source.sequences_before(3))]
    wait_for_the_next()
    return found


def folders(cache) -> list:
    return sorted(path for path in (cache / "orders").iterdir() if path.is_dir())


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_an_order_on_disk_is_the_one_that_would_be_drawn(tmp_path, monkeypatch, packing):
    expected = all_pieces(rounds_of(packing=packing))
    assert all_pieces(rounds_of(tmp_path, packing=packing)) == expected
    monkeypatch.setattr(rounds, "pack", None)  # nothing can be drawn any more
    again = rounds_of(tmp_path, packing=packing)
    assert all_pieces(again) == expected
    assert isinstance(again.first().documents, np.memmap)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "cut": lambda folder: cut(folder / "documents.npy"),
    "a bit": lambda folder: flip(folder / "offsets.npy"),
    "gone": lambda folder: (folder / "starts.npy").unlink(),
    "no note": lambda folder: (folder / "order.json").unlink(),
    "half a note": lambda folder: cut(folder / "order.json"),
    "another thing in the note": lambda folder: (folder / "order.json").write_text("[1, 2]"),
    "a folder for a file": lambda folder: ((folder / "starts.npy").unlink(), (folder / "starts.npy").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_order_is_drawn_again(tmp_path, damage):
    expected = all_pieces(rounds_of(tmp_path))
    before = {path: path.read_bytes() for path in (tmp_path / "orders").glob("*/*")}
    for folder in folders(tmp_path):
        DAMAGE[damage](folder)
    assert all_pieces(rounds_of(tmp_path)) == expected
    assert {path: path.read_bytes() for path in (tmp_path / "orders").glob("*/*")} == before


def test_an_order_of_another_corpus_under_this_name_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "KEPT", 100)
    expected = all_pieces(rounds_of(tmp_path))
    ours = folders(tmp_path)
    all_pieces(rounds_of(tmp_path, seed=4))
    foreign = [folder for folder in folders(tmp_path) if folder not in ours]
    for folder, other in zip(ours, foreign, strict=True):
        for path in folder.iterdir():
            path.write_bytes((other / path.name).read_bytes())
    assert all_pieces(rounds_of(tmp_path)) == expected


def test_what_a_killed_process_left_is_removed_and_only_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "KEPT", 2)
    left = tmp_path / "orders" / ("0" * 32 + ".17.partial")
    left.mkdir(parents=True)
    (left / "documents.npy").write_bytes(b"half")
    os.utime(left, (0, 0))
    growing = left.with_name("1" * 32 + ".18.partial")
    growing.mkdir()
    expected = [all_pieces(rounds_of(seed=seed)) for seed in range(3)]
    assert [all_pieces(rounds_of(tmp_path, seed=seed)) for seed in range(3)] == expected
    assert len([folder for folder in folders(tmp_path) if not folder.suffix]) == 2
    assert (left.exists(), growing.exists()) == (False, True)


def test_one_cache_serves_many_orders(tmp_path, monkeypatch):
    """Another source, length, packing, seed or text is another order, however alike the documents are."""
    monkeypatch.setattr(rounds, "COUNTED", 1)
    changes = [{}, {"source": 1}, {"seq_len": 17}, {"packing": "concat"}, {"seed": 4}, {"weight": Fraction("0.6")}]
    for _ in range(2):
        for change in changes:
            assert all_pieces(rounds_of(tmp_path, **change)) == all_pieces(rounds_of(**change))
    shorter = Rounds(LENGTHS[::-1], weight=Fraction("0.7"), seq_len=16, packing="best_fit", seed=3, source=0,
                     kept=DrawnOrders(tmp_path), content="other key")  # fmt: skip
    alone = Rounds(LENGTHS[::-1], weight=Fraction("0.7"), seq_len=16, packing="best_fit", seed=3, source=0)
    assert all_pieces(shorter) == all_pieces(alone)


def test_a_cache_that_cannot_be_used_costs_the_drawing_only(tmp_path, capsys):
    (tmp_path / "orders").write_text("in the way")
    assert all_pieces(rounds_of(tmp_path)) == all_pieces(rounds_of())
    assert "not kept there" in capsys.readouterr().out


def test_the_next_part_is_drawn_in_a_thread_while_the_current_one_is_read(monkeypatch):
    drawn_by = []

    def pack(*arguments):
        drawn_by.append(threading.current_thread())
        return real(*arguments)

    real = rounds.pack
    monkeypatch.setattr(rounds, "pack", pack)
    source = rounds_of(weight=Fraction(1))
    half = source.sequences_in_round // 2
    source.pieces(0, half)
    assert drawn_by == [threading.main_thread()], "before half of the part is read"
    source.pieces(half, half + 1)
    source.pieces(source.sequences_in_round, source.sequences_in_round + 1)
    assert len(drawn_by) == 2
    assert drawn_by[1] is not threading.main_thread()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_part_of_which_drawing_ahead_failed_is_drawn_when_it_is_read(monkeypatch):
    real = rounds.pack

    def pack(*arguments):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return real(*arguments)

    expected = all_pieces(rounds_of(weight=Fraction(1)))
    monkeypatch.setattr(rounds, "pack", pack)
    assert all_pieces(rounds_of(weight=Fraction(1))) == expected


def test_a_permutation_is_of_all_numbers_and_any_sort_gives_it():
    for number in (1, 2, 7, 64, 1000):
        assert sorted(permutation(number, np.random.PCG64(np.random.SeedSequence(1)))) == list(range(number))
    # Written down once: a change here means that no stored run can be resumed.
    assert permutation(8, np.random.PCG64(np.random.SeedSequence(1))).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]


def test_rounds_gone_through_are_counted():
    source = rounds_of(weight=Fraction("1.5"))
    assert source.rounds_before(0) == 0
    assert [source.rounds_before(source.sequences_before(epoch)) for epoch in (1, 2)] == [1.5, 3]
