"""What is chosen fits, is the cheapest that does, and where nothing does, what is named instead does."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import ALL_BUT_ATTENTION, BLOCK, CARD, JOBS, MLP, NONE, job_of, least, peak, question_of

from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.config import find_config
from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.planning import search
from llama_pro_fast.planning.cost import kept_bytes, recomputed_flops, step_cost
from llama_pro_fast.planning.devices import DEVICES
from llama_pro_fast.planning.job import Job, expanded_shape, parse_recompute, recompute_text
from llama_pro_fast.planning.memory import low_precision_bytes
from llama_pro_fast.planning.search import HOST_BACKWARD, HOST_FORWARD, NEARLY, best_fit, fit, policies


def sizes(batch_size: int) -> list[int]:
    return [size for size in range(1, batch_size + 1) if batch_size % size == 0]


def work(job: Job, recompute) -> float:
    return step_cost(job.config, job.trained, seq_len=job.seq_len, recompute=recompute).recomputed


# -- the ladder of mixtures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_each_rung_keeps_less_for_more_work(name):
    """So the first that fits is the cheapest that does."""
    job, rungs = JOBS[name], list(policies(JOBS[name]))
    kept = [sum(map(kept_bytes, job.specs, job.trained.classes, [job.dtype] * 8, rung)) for rung in rungs]
    assert kept == sorted(set(kept), reverse=True)
    again = [work(job, rung) for rung in rungs]
    assert again == sorted(set(again))


def test_a_rung_may_need_more_memory_than_the_one_before():
    """What the block that is the fullest makes again is there just then; so none may be skipped over."""
    rises = 0
    for job in JOBS.values():
        needed = [peak(job, rung, 4, 8) for rung in policies(job, 4)]
        rises += needed != sorted(needed, reverse=True)
        for usable in needed:
            found = best_fit(question_of(job, batch_size=8, micro_batch_size=4, usable=usable))
            assert found.peak == next(size for size in needed if size <= usable)
    assert rises


@pytest.mark.parametrize("name", JOBS)
def test_a_rung_changes_one_block_and_the_ladder_ends_at_the_least(name):
    job, rungs = JOBS[name], list(policies(JOBS[name]))
    assert rungs[0] == (NONE,) * 8
    above = [kind is not BlockClass.PREFIX for kind in job.trained.classes]
    assert rungs[-1] == tuple(BLOCK if backward else NONE for backward in above)
    for before, after in pairwise(rungs):
        (changed,) = (index for index in range(8) if before[index] is not after[index])
        assert above[changed]


@pytest.mark.parametrize("name", [name for name in JOBS if name != "windows in some blocks"])
def test_blocks_alike_change_from_the_lowest_up(name):
    """What the lowest keep is there while all others run backward; and the cheapest bytes go first in all of them."""
    job = JOBS[name]
    for rung in policies(job):
        for alike in (BlockClass.FROZEN, BlockClass.TRAINED):
            pairs = zip(rung, job.trained.classes, strict=True)
            order = [list(Recompute).index(policy) for policy, kind in pairs if kind is alike]
            assert order == sorted(order, reverse=True), recompute_text(rung, job.trained.first)
            assert len(set(order)) <= 2


@pytest.mark.parametrize("name", JOBS)
def test_bytes_never_get_cheaper_along_the_ladder(name):
    """FLOPs for each byte saved; no way between two rungs, and none beyond them, is cheaper than the ones taken."""
    job, rungs = JOBS[name], list(policies(JOBS[name]))

    def held(spec, kind, policy) -> int:
        return job.seq_len * kept_bytes(spec, kind, job.dtype, policy) + low_precision_bytes(job, spec, kind, policy)

    kept = [sum(map(held, job.specs, job.trained.classes, rung)) for rung in rungs]
    flops = [job.seq_len * work(job, rung) for rung in rungs]
    rates = [(flops[i + 1] - flops[i]) / (kept[i] - kept[i + 1]) for i in range(len(rungs) - 1)]
    assert all(later >= earlier * (1 - 1e-3) for earlier, later in pairwise(rates))
    # Every policy, in every block, lies on or above the hull.
    for spec, kind in zip(job.specs, job.trained.classes, strict=True):
        if kind is not BlockClass.PREFIX:
            for policy in (MLP, ALL_BUT_ATTENTION, BLOCK):
                saved = held(spec, kind, NONE) - held(spec, kind, policy)
                more = job.seq_len * recomputed_flops(spec, policy, job.seq_len)
                assert more / saved >= min(rates) * (1 - 1e-3)


def test_with_few_tokens_the_cheapest_bytes_are_the_copies_of_trained_weights():
    """0.4 GB a block at LLaMA-2-7B, as much as a frozen block keeps of 4,300 tokens."""
    _, base = find_config("meta-llama/Llama-2-7b-hf")
    plan = ExpansionPlan.from_groups(32, 8)
    job = Job(config=expanded_shape(base, plan), trained=plan.trained, seq_len=2048, attention="flash_4")
    only_new = tuple(BLOCK if new else NONE for new in plan.is_new)
    found = best_fit(
        question_of(job, batch_size=2, micro_batch_size=1, usable=peak(job, only_new), device=DEVICES["h100"])
    )
    assert found.recompute == only_new
    assert found.cost.recomputed / found.cost.total < 0.08


def test_long_sequences_do_not_make_attention_again_until_they_must():
    """Its quadratic part is by far the dearest there; in short sequences it is next to nothing."""
    usual = list(policies(JOBS["attention dearer than products"]))
    assert any(set(rung[1:]) == {ALL_BUT_ATTENTION} for rung in usual)
    rates = {}
    for name in ("short sequences", "attention dearer than products"):
        spec, job = JOBS[name].specs[0], JOBS[name]
        rates[name] = recomputed_flops(spec, BLOCK, job.seq_len) / recomputed_flops(
            spec, ALL_BUT_ATTENTION, job.seq_len
        )
    assert rates["short sequences"] < 1.05
    assert rates["attention dearer than products"] > 5


# -- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_recomputed_where_it_fits(name, batch_size):
    job = JOBS[name]
    found = best_fit(question_of(job, batch_size=batch_size))
    assert found is not None
    assert found.recompute == (NONE,) * 8
    assert found.cost.recomputed == 0
    assert batch_size % found.micro_batch_size == 0


@pytest.mark.parametrize("name", JOBS)
def test_just_short_of_that_a_mixture_fits_and_its_last_change_was_needed(name):
    job = JOBS[name]
    rungs = list(policies(job))
    usable = peak(job, rungs[0]) - 1
    found = best_fit(question_of(job, batch_size=2, micro_batch_size=1, usable=usable))
    if least(job) > usable:  # weights' gradients, or logits, are all there is in the fullest phase
        assert found is None
        return
    assert found.peak <= usable
    index = rungs.index(found.recompute)
    assert index > 0
    assert peak(job, rungs[index - 1]) > usable


@pytest.mark.parametrize("name", ["usual", "attention dearer than products", "everything", "fp32"])
def test_every_budget_from_plenty_to_the_least_gets_the_first_rung_that_fits(name):
    job = JOBS[name]
    rungs = list(policies(job))
    needed = [peak(job, rung) for rung in rungs]
    for usable in {*needed, *(size - 1 for size in needed), *(size + 1 for size in needed)}:
        found = best_fit(question_of(job, batch_size=2, micro_batch_size=1, usable=usable))
        first = next((rung for rung, size in zip(rungs, needed, strict=True) if size <= usable), None)
        assert (found and found.recompute) == first, usable


@st.composite
def questions(draw):
    layers = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    train_all = draw(st.booleans())
    family = draw(st.sampled_from(["llama", "qwen3", "mistral"]))
    job = job_of(
        family=family,
        layers=layers,
        new=() if train_all else sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))),
        train_all=train_all,
        seq_len=draw(st.sampled_from([8, 100, 1024, 16_384])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        hidden_size=draw(st.sampled_from([32, 128, 512])),
        intermediate_size=draw(st.sampled_from([16, 200, 2048])),
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 64])),
        vocab_size=draw(st.sampled_from([50, 5000, 150_000])),
        tie_word_embeddings=draw(st.booleans()),
        **({"sliding_window": draw(st.sampled_from([None, 16]))} if family == "mistral" else {}),
    )
    return job, draw(st.integers(1, 12)), draw(st.floats(0, 1))


@settings(max_examples=80, deadline=None)
@given(questions())
def test_no_plan_is_over_its_budget_and_a_possible_one_is_found(question):
    job, batch_size, where = question
    rungs = list(policies(job))
    smallest = min(least(job, size, batch_size) for size in sizes(batch_size))
    most = peak(job, rungs[0], batch_size, batch_size)
    usable = int(smallest + where * abs(most - smallest) * 1.1)
    found = best_fit(question_of(job, batch_size=batch_size, usable=usable))
    assert found is not None
    assert found.peak <= usable
    assert batch_size % found.micro_batch_size == 0
    assert found.peak == peak(job, found.recompute, found.micro_batch_size, batch_size)
    # No way that fits is faster by more than is thought alike.
    for size in sizes(batch_size):
        for rung in rungs:
            other = fit(question_of(job, batch_size=batch_size), micro_batch_size=size, recompute=rung)
            assert other.peak > usable or found.seconds <= other.seconds * (1 + NEARLY)


@settings(max_examples=25, deadline=None)
@given(questions())
def test_below_the_least_there_is_none(question):
    job, batch_size, _ = question
    smallest = min(least(job, size, batch_size) for size in sizes(batch_size))
    assert best_fit(question_of(job, batch_size=batch_size, usable=smallest)) is not None
    assert best_fit(question_of(job, batch_size=batch_size, usable=smallest - 1)) is None


def test_a_batch_that_is_one_micro_batch_may_fit_where_its_half_does_not():
    """No gradients wait for a next one."""
    job = job_of(seq_len=16, new=(0, 2, 4, 6), hidden_size=512)
    assert least(job, 2, 2) < least(job, 1, 2)
    assert best_fit(question_of(job, batch_size=2, usable=least(job, 2, 2))).micro_batch_size == 2


def test_what_is_given_is_kept():
    job = JOBS["usual"]
    plenty = best_fit(question_of(job, batch_size=8, micro_batch_size=2))
    assert (plenty.micro_batch_size, plenty.recompute) == (2, (NONE,) * 8)
    mixture = parse_recompute(".bbbaamm", job.trained.classes)
    asked = best_fit(question_of(job, batch_size=8, recompute=mixture))
    assert asked.recompute == mixture
    both = best_fit(question_of(job, batch_size=8, micro_batch_size=4, recompute=mixture))
    assert (both.micro_batch_size, both.recompute) == (4, mixture)
    # Even where another would fit.
    assert best_fit(question_of(job, batch_size=8, recompute=(NONE,) * 8, usable=peak(job, (NONE,) * 8) - 1)) is None
    assert (
        best_fit(question_of(job, batch_size=8, micro_batch_size=8, usable=peak(job, list(policies(job))[-1], 1)))
        is None
    )


def test_of_ways_nearly_equal_the_smaller_micro_batch_is_taken():
    """Its gradients' traffic is next to nothing beside the products of 4096 tokens and more."""
    job = job_of(seq_len=65_536)
    ways = [fit(question_of(job, batch_size=8), micro_batch_size=n, recompute=(NONE,) * 8) for n in (1, 2, 4, 8)]
    assert ways[0].seconds > ways[-1].seconds >= ways[0].seconds * (1 - NEARLY)
    assert best_fit(question_of(job, batch_size=8)).micro_batch_size == 1
    # And where it is not, the larger one.
    assert best_fit(question_of(job_of(seq_len=16), batch_size=8)).micro_batch_size > 1


def test_a_larger_micro_batch_is_not_bought_with_recomputation():
    job = job_of(seq_len=2048)
    usable = peak(job, (NONE,) * 8, 1, 8)
    found = best_fit(question_of(job, batch_size=8, usable=usable))
    assert found.micro_batch_size == 1
    assert found.cost.recomputed == 0
    assert best_fit(question_of(job, batch_size=8, micro_batch_size=2, usable=usable)).cost.recomputed > 0


def test_an_evaluation_has_to_fit_too():
    """With a large vocabulary it makes two chunks of logits where a step makes one."""
    job = job_of(new=(7,), vocab_size=150_000, seq_len=2048)
    found = fit(question_of(job, batch_size=1), micro_batch_size=1, recompute=(NONE,) * 8)
    assert found.peak > found.memory.total
    assert best_fit(question_of(job, batch_size=1, usable=found.memory.total)) is None
    assert best_fit(question_of(job, batch_size=1, usable=found.peak)) is not None


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_small_step_takes_as_long_as_the_host_needs_to_start_it():
    job = job_of()
    on_card, on_slow_card = (question_of(job, batch_size=8, device=device) for device in (DEVICES["h100"], CARD))
    for size in (1, 8):
        small = fit(on_card, micro_batch_size=size, recompute=(NONE,) * 8)
        host = 8 * HOST_FORWARD + (8 - job.trained.first) * HOST_BACKWARD
        assert job.trained.first > 0
        assert small.seconds == pytest.approx(host / (size * job.seq_len))
    assert small.seconds < fit(on_slow_card, micro_batch_size=8, recompute=(NONE,) * 8).seconds


def test_products_in_eight_bits_take_their_part_of_the_time():
    """Of blocks 2, 4 and 6, the frozen ones above the lowest new one: four products of dX, 2 FLOPs an element."""
    job = job_of()
    plain, found = (
        fit(
            question_of(dataclasses.replace(job, eight_bits=e), batch_size=8), micro_batch_size=8, recompute=(NONE,) * 8
        )
        for e in (False, True)
    )
    elements = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 688
    saved = 3 * 2 * elements * (1 - 1 / 1.9) / (search.SHARE * CARD.flops)
    assert plain.seconds - found.seconds == pytest.approx(saved, rel=1e-6)


def test_time_is_products_and_attention_at_a_share_and_traffic_at_the_bandwidth(monkeypatch):
    job, tokens = JOBS["usual"], 8 * 512
    question, ways = question_of(job, batch_size=8), {}
    for share in (0.2, 0.4):
        monkeypatch.setattr(search, "SHARE", share)
        for size in (1, 2, 8):
            ways[size, share] = fit(question, micro_batch_size=size, recompute=(NONE,) * 8)
    # Half the share, twice the time of what is computed; the traffic stays.
    computed = ways[8, 0.2].seconds - ways[8, 0.4].seconds
    traffic = ways[8, 0.4].seconds - computed
    assert traffic == pytest.approx(34 * job.num_trained / tokens / CARD.bandwidth)
    # Each micro-batch of several reads the gradients once more.
    for size, more in ((1, 8), (2, 4)):
        gradients = ways[size, 0.4].seconds - ways[8, 0.4].seconds
        assert gradients == pytest.approx(more * 4 * job.num_trained / tokens / CARD.bandwidth)
    # Flash attention's backward is 2.5 times its forward, not 2.
    cost = step_cost(job.config, job.trained, seq_len=512)
    above = 7 * 4 * 256 * 512 / 2
    assert computed == pytest.approx((cost.total + above / 2) / (0.4 * CARD.flops))


# -- a recipe's words ----------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.data())
def test_what_is_written_is_read_back(data):
    layers = data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, layers - 1))
    classes = [BlockClass.PREFIX] * first + [BlockClass.FROZEN] * (layers - first)
    above = data.draw(st.lists(st.sampled_from(list(Recompute)), min_size=layers - first, max_size=layers - first))
    recompute = (NONE,) * first + tuple(above)
    assert parse_recompute(recompute_text(recompute, first), classes) == recompute


def test_a_policy_is_written_by_its_name_and_a_mixture_by_letters():
    classes = JOBS["usual"].trained.classes
    assert recompute_text((NONE, *[BLOCK] * 7), 1) == "block"
    assert recompute_text((NONE, BLOCK, ALL_BUT_ATTENTION, MLP, *[NONE] * 4), 1) == ".bam...."
    assert parse_recompute("mlp", classes) == (NONE, *[MLP] * 7)
    assert parse_recompute(".bam....", classes) == (NONE, BLOCK, ALL_BUT_ATTENTION, MLP, NONE, NONE, NONE, NONE)


@pytest.mark.parametrize("text", ["blocks", "", ".bam...", ".bam.....", ".bax....", "None", "auto "])
def test_other_words_are_refused_with_the_remedy(text):
    with pytest.raises(UserError) as error:
        parse_recompute(text, JOBS["usual"].trained.classes)
    assert f"recompute {text}: give auto, none, mlp, all_but_attention, block, or a letter for each of the 8" in str(
        error.value
    )
    assert ". none, m mlp, a all_but_attention, b block" in str(error.value)


# -- the shape of the model to be ----------------------------------------------------------------------------------


def test_the_expanded_shape_has_the_blocks_of_the_plan_and_leaves_the_base_alone():
    base = job_of(layers=4).config
    plan = ExpansionPlan.from_groups(4, 2)
    assert expanded_shape(base, plan).num_hidden_layers == 6
    assert base.num_hidden_layers == 4
    assert expanded_shape(base, plan).hidden_size == base.hidden_size


def test_a_copy_attends_as_its_source_does():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    base = transformers.Qwen3Config(
        num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=16, max_window_layers=0
    )
    plan = ExpansionPlan.from_after(4, [0, 3], 1)
    changed = expanded_shape(base, plan)
    assert changed.layer_types == [kinds[0], kinds[0], kinds[1], kinds[2], kinds[3], kinds[3]]
    windows = [block_spec(changed, index).window for index in range(6)]
    assert windows == [16, 16, None, 16, None, None]
    assert base.layer_types == kinds
