"""What stands beside a plan: the plan itself, other places, other methods."""

from __future__ import annotations

import pytest
from planner_cases import CARD, job_of

from llama_pro_fast import plan
from llama_pro_fast.model.policy import Recompute
from llama_pro_fast.planning import alternatives
from llama_pro_fast.planning.devices import SHARE
from llama_pro_fast.planning.search import best_fit
from llama_pro_fast.recipe import parse


def asked(*argv):
    """``(question, its plan)`` of a command line."""
    line = ["--model.path", "meta-llama/Llama-3.1-8B", "--gpu", "h100", *argv]
    question = plan.question_of(parse(line, verb="plan", own=plan.OWN))
    return question, best_fit(question)


def test_the_first_way_is_the_plan_with_all_that_was_asked_for():
    question, found = asked("--expand.groups", "8", "--train.micro_batch_size", "1", "--train.recompute", "block")
    first, *others = alternatives.ways(question, found)
    assert (first.name, first.peak, first.seconds, first.how) == ("this plan", found.peak, found.seconds, "1, block")
    assert [way.name for way in others] == ["8 in the upper half", "full fine-tuning", "LoRA, rank 16"]


@pytest.mark.parametrize("policy", list(Recompute))
def test_a_policy_of_all_blocks_is_named(policy):
    first = next(alternatives.ways(*asked("--expand.groups", "8", "--train.recompute", policy.value)))
    assert first.how.endswith(f", {policy.value}")


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (["--expand.after", "30,31"], ["this plan", "2 interleaved", "2 in the upper half", "full fine-tuning"]),
        (["--expand.after", "23,31"], ["this plan", "2 interleaved", "full fine-tuning"]),
        (["--expand.groups", "20"], ["this plan", "full fine-tuning"]),
        (["--expand.groups", "8", "--train.parameters", "all"], ["this plan", "full fine-tuning"]),
        (["--train.parameters", "all"], ["this plan"]),
    ],
)
def test_other_places_are_those_that_differ_and_exist(where, names):
    assert [way.name for way in alternatives.ways(*asked(*where))] == [*names, "LoRA, rank 16"]


def test_the_upper_half_costs_less_because_less_has_a_backward():
    interleaved, upper, *_ = alternatives.ways(*asked("--expand.groups", "8"))
    assert upper.trained == interleaved.trained
    assert upper.gflop < interleaved.gflop
    assert upper.peak < interleaved.peak
    assert upper.seconds < interleaved.seconds


def test_all_ways_take_attentions_backward_for_what_it_is():
    """At 32k tokens it is most of the work, so a convention that left it out would show in the speed."""
    question, found = asked("--expand.groups", "8", "--train.seq_len", "32768")
    *_, lora = alternatives.ways(question, found)
    assert lora.gflop * 1e9 / lora.seconds < 0.96 * SHARE * question.device.flops


def test_lora_has_its_adapters_and_no_dw_of_the_base():
    job = job_of(new=(), train_all=True)
    found = alternatives.lora_estimate(job, rank=4, micro_batch_size=1, usable=CARD.usable)
    H, I, Q, KV = 256, 688, 256, 128
    per_block = 4 * ((H + Q) + 2 * (H + KV) + (Q + H) + 2 * (H + I) + (I + H))
    assert found.parameters == 8 * per_block
    assert found.cost.dw == 6 * found.parameters
    assert not found.recomputed
    tight = alternatives.lora_estimate(job, rank=4, micro_batch_size=1, usable=found.peak - 1)
    assert tight.recomputed
    assert tight.peak < found.peak
