"""Where nothing fits, what is named instead does; and what was chosen is given its reason."""

from __future__ import annotations

import dataclasses
import re

import pytest
from planner_cases import CARD, JOBS, NONE, job_of, least, peak, question_of

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.planning.explain import shortfall, why
from llama_pro_fast.planning.job import Job, recompute_text
from llama_pro_fast.planning.search import best_fit, policies

# -- where nothing fits --------------------------------------------------------------------------------------------


def expanded(layers=8, groups=4, **how):
    base = job_of(layers=layers, **how).config
    plan = ExpansionPlan.from_groups(layers, groups)
    return base, plan, job_of(layers=plan.num_layers, new=plan.new_indices, **how)


def fits(job: Job, usable: int) -> bool:
    return best_fit(question_of(job, batch_size=2, micro_batch_size=1, usable=usable)) is not None


def fewer(job: Job, base, count: int) -> Job:
    plan = ExpansionPlan.from_after(8, [1, 3, 5, 7][-count:])
    return job.expanded(base, plan)


@pytest.mark.parametrize("share", [0.999, 0.9, 0.7, 0.5])
@pytest.mark.parametrize("how", [{"seq_len": 2048}, {"seq_len": 512, "vocab_size": 20_000}, {"seq_len": 16_384}])
def test_the_changes_named_do_fit_and_the_next_ones_do_not(how, share):
    base, plan, job = expanded(**how)
    usable = int(share * least(job))
    assert not fits(job, usable)
    # A device of just this size, for beside a larger one it would be the limit that is too low.
    device = dataclasses.replace(CARD, memory=usable, is_cpu=True)
    said = shortfall(question_of(job, batch_size=4, usable=usable, base=base, expansion=plan, device=device))
    assert "\n" not in said
    own = shortfall(question_of(job, batch_size=4, usable=usable, base=base, expansion=plan))
    limit = re.search(r"would fit: a limit of ([\d.]+) GiB, or none of your own", own)[1]
    assert least(job) <= float(limit) * 2**30 <= least(job) + 2**30 / 1000
    assert "or one " not in own
    assert "would fit: " in said

    length = re.search(r"sequences of (\d+) tokens", said)
    lengths = [job.seq_len >> halvings for halvings in range(1, 12) if job.seq_len >> halvings >= 256]
    fitting = [n for n in lengths if fits(dataclasses.replace(job, seq_len=n), usable)]
    assert (length and int(length[1])) == (fitting[0] if fitting else None)

    moved = ExpansionPlan.from_after(8, [4, 5, 6, 7])
    moved = job.expanded(base, moved)
    assert ("the 4 new blocks in the upper half" in said) == fits(moved, usable)

    blocks = re.search(r"(\d) new blocks? instead of 4", said)
    fitting = [n for n in (3, 2, 1) if fits(fewer(job, base, n), usable)]
    assert (blocks and int(blocks[1])) == (fitting[0] if fitting else None)

    card = re.search(r"or one (.+)$", said) or re.search(r"fit: one (.+)$", said)
    assert card[1] == "RTX 4090 24 GB"  # the smallest that does


def test_in_place_of_all_parameters_a_few_new_blocks_are_named():
    job = job_of(layers=12, new=(), train_all=True)
    new = ExpansionPlan.from_groups(12, 8)
    few = job.expanded(job.config, new)
    between = least(few)
    assert between < least(job)
    assert "8 new blocks in place of all parameters" in shortfall(question_of(job, batch_size=4, usable=between))
    assert "in place of" not in shortfall(question_of(job, batch_size=4, usable=between - 1))


def test_where_what_was_asked_for_is_the_trouble_it_says_what_would_fit():
    job = JOBS["usual"]
    usable = peak(job, (NONE,) * 8, 1, 8)
    said = shortfall(question_of(job, batch_size=8, usable=usable, micro_batch_size=8, recompute=(NONE,) * 8))
    assert said.startswith("micro-batch 8 and the recomputation asked for needs ")
    free = best_fit(question_of(job, batch_size=8, usable=usable))
    assert f"micro-batch {free.micro_batch_size} with recompute {recompute_text(free.recompute, 1)}" in said


def test_where_no_card_is_large_enough_it_says_so():
    job = job_of(hidden_size=16_384, intermediate_size=65_536, num_attention_heads=128, seq_len=256, layers=80)
    said = shortfall(question_of(job, batch_size=4, usable=CARD.usable))
    assert "No card in the list holds it" in said
    assert "smaller model" in said


# -- why -----------------------------------------------------------------------------------------------------------


def reason(job: Job, usable: int, **asked) -> str:
    question = question_of(job, batch_size=8, usable=usable, **asked)
    return why(question, best_fit(question))


def test_the_reason_is_the_one():
    job = job_of(seq_len=2048)
    one = peak(job, (NONE,) * 8, 1, 8)
    assert reason(job, one).startswith(
        "1 sequence at a time (2 would fit with more recomputed only); nothing recomputed"
    )
    assert reason(job, one, micro_batch_size=1) == "1 sequence at a time as asked; nothing recomputed: everything fits"
    short = job_of(seq_len=16)
    assert reason(short, CARD.usable).startswith("8 sequences at a time, the whole batch; nothing recomputed")
    least = list(policies(job))[-1]
    said = reason(job, peak(job, least, 1, 8), recompute=least)
    assert re.fullmatch(r"1 sequence at a time \(2 do not fit\); block recomputed as asked, \d+\.\d% more work", said)
    long = job_of(seq_len=65_536)
    assert "1 sequence at a time (2 would hardly be faster)" in reason(long, CARD.usable)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.65])
def test_of_several_copies_whole_places_are_left_out(share):
    base = job_of(layers=8).config
    plan = ExpansionPlan.from_groups(8, 4, 2)
    job = job_of(layers=16, new=plan.new_indices)
    usable = int(share * least(job))
    device = dataclasses.replace(CARD, memory=usable, is_cpu=True)
    said = shortfall(question_of(job, batch_size=4, usable=usable, base=base, expansion=plan, device=device))
    count = int(re.search(r"(\d) new blocks instead of 8", said)[1])
    assert count % 2 == 0
    after = [1, 3, 5, 7]
    for blocks, does in ((count, True), (count + 2, False)):
        other = ExpansionPlan.from_after(8, after[-blocks // 2 :], 2)
        assert fits(job.expanded(base, other), usable) == does or blocks == 8
