"""Where new blocks go (paper, section 3.2)."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.config import ExpandConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan


@st.composite
def grouped(draw) -> tuple[int, int, int]:
    layers = draw(st.integers(1, 80))
    groups = draw(st.integers(1, layers))
    return layers, groups, draw(st.integers(1, layers // groups))


@st.composite
def placed(draw) -> tuple[int, list[int], int]:
    layers = draw(st.integers(1, 40))
    copies = draw(st.integers(1, layers))
    after = draw(st.lists(st.integers(copies - 1, layers - 1), min_size=1, unique=True))
    return layers, after, copies


def check_any_plan(plan: ExpansionPlan, layers: int, new: int) -> None:
    assert [plan.sources[index] for index in plan.old_indices] == list(range(layers))
    assert sorted((*plan.old_indices, *plan.new_indices)) == list(range(layers + new))
    assert plan.num_old == layers
    assert plan.num_layers == layers + new == len(plan.trained.strip)
    assert [index for index, mark in enumerate(plan.trained.strip) if mark == "X"] == list(plan.new_indices)


@settings(deadline=None)
@given(grouped())
def test_groups_are_balanced_and_each_ends_in_copies_of_its_last_blocks(case):
    layers, groups, copies = case
    plan = ExpansionPlan.from_groups(layers, groups, copies)
    check_any_plan(plan, layers, groups * copies)
    assert [new for new, _ in groupby(plan.is_new)] == [False, True] * groups
    sizes = [len(list(run)) for new, run in groupby(plan.is_new) if not new]
    assert max(sizes) - min(sizes) <= 1
    for index in plan.new_indices:
        assert plan.sources[index] == plan.sources[index - copies]


@settings(deadline=None)
@given(placed())
def test_named_blocks_are_followed_by_copies(case):
    layers, after, copies = case
    plan = ExpansionPlan.from_after(layers, after, copies)
    check_any_plan(plan, layers, len(after) * copies)
    for block in after:
        start = plan.old_indices[block] + 1
        assert plan.sources[start : start + copies] == tuple(range(block - copies + 1, block + 1))
        assert all(plan.is_new[start : start + copies])


def test_llama_2_7b_is_expanded_as_in_the_paper():
    plan = ExpansionPlan.from_groups(32, 8)
    assert plan.num_layers == 40
    assert plan.new_indices == (4, 9, 14, 19, 24, 29, 34, 39)
    assert [plan.sources[index] for index in plan.new_indices] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert plan.trained.strip == "....X" + "ooooX" * 7


def test_the_two_forms_agree_and_order_does_not_matter():
    assert ExpansionPlan.from_groups(8, 2) == ExpansionPlan.from_after(8, [7, 3])
    assert ExpansionPlan.from_groups(8, 2, 2).trained.strip == "....XXooooXX"
    assert ExpansionPlan.from_groups(8, 2, 2).sources == (0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7)


@pytest.mark.parametrize("after", ["7,3", " 3, 7", [3, 7]])
def test_a_recipe_may_spell_after_as_text_or_list(after):
    assert ExpansionPlan.from_config(8, ExpandConfig(after=after)) == ExpansionPlan.from_groups(8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups 0"),
        ({"groups": -2}, "groups -2"),
        ({"groups": 9}, "groups 9: the model has 8 blocks"),
        ({"groups": 4, "copies": 0}, "copies 0"),
        ({"groups": 4, "copies": 3}, "copies 3: the smallest of 4 groups of 8 blocks has 2"),
        ({"groups": 3, "copies": 3}, "copies 3: the smallest of 3 groups of 8 blocks has 2"),
        ({"after": [8]}, "after 8: the model has blocks 0 to 7"),
        ({"after": [-1]}, "after -1"),
        ({"after": [3, 3]}, "after 3: named twice"),
        ({"after": []}, "no block is named"),
        ({"after": [0], "copies": 2}, "after 0: 2 copies need 2 blocks, there are 1"),
        ({"after": "3,x"}, "after 3,x: not a list"),
        ({"after": ""}, "not a list"),
        ({"groups": 2, "after": [3]}, "each of them is given"),
        ({}, "none of them is given"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        ExpansionPlan.from_config(8, ExpandConfig(**options))
