"""bench/contestants.py: the sizes are the models they are named after, and the weights an expansion's."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from llama_pro_fast.cost import num_parameters, step_cost


@pytest.fixture
def contestants(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "bench")
    return importlib.import_module("contestants")


@pytest.fixture
def workload(contestants):
    def make(size: str):
        return contestants.Workload(size=size, seq=8, micro_batch=1, steps=1, warmup=0, device="cpu")

    return make


@pytest.mark.parametrize(
    ("size", "base", "expanded", "head_dim"),
    # Meta's own counts; with the new blocks, 218,112,000 each at 8B shape.
    [("1b", 1_235_814_400, 1_479_100_416, 64), ("7b", 6_738_415_616, 8_357_482_496, 128),
     ("8b", 8_030_261_248, 9_775_157_248, 128)],
)  # fmt: skip
def test_a_size_is_the_model_it_is_named_after(contestants, workload, size, base, expanded, head_dim):
    config = workload(size).config
    assert num_parameters(config) == expanded
    config.num_hidden_layers = contestants.SIZES[size].base["num_hidden_layers"]
    assert (num_parameters(config), config.head_dim) == (base, head_dim)


def test_7b_is_the_papers_expansion(workload):
    paper = workload("7b")
    assert paper.trained_blocks == [4, 9, 14, 19, 24, 29, 34, 39]
    # By hand 38.28 GFLOP a token with all of dX from the lowest trained block up, whose q/k/v projection makes none.
    expected = 38.28e9 - 2 * 3 * 4096**2
    assert step_cost(paper.config, paper.trained_blocks, seq_len=4096).total == pytest.approx(expected, rel=1e-4)


def test_a_new_block_is_its_source_with_zero_outputs(workload):
    tiny = workload("tiny")  # 8 blocks, new ones after 3 and 7: block 4 copies 3, block 5 is the base's 4
    for name, shape in (("self_attn.q_proj.weight", (6, 4)), ("input_layernorm.weight", (4,))):
        new, source, above = (tiny.draw(f"model.layers.{index}.{name}", shape) for index in (4, 3, 5))
        assert torch.equal(new, source)
        assert not torch.equal(new, above)
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        assert not tiny.draw(f"model.layers.4.{name}", (4, 4)).any()
        assert tiny.draw(f"model.layers.3.{name}", (4, 4)).all()


def test_the_digest_sees_one_bit_and_an_exchange(contestants):
    def digest(tensor):
        return contestants.weights_digest(
            contestants.Runner(model=None, prepare=None, loss=None, tensors=lambda: [("w", tensor)]), torch.float32
        )

    weight = torch.tensor([1.0, 2.0, 3.0])
    assert digest(weight) == digest(weight.clone())
    assert digest(weight) != digest(torch.tensor([2.0, 1.0, 3.0]))
    assert digest(weight) != digest(torch.nextafter(weight, torch.full((3,), 9.0)))


@pytest.mark.parametrize("name", ["ours", "hf", "hf-checkpointing"])
def test_bf16_contestants_hold_equal_bits_and_float32_masters(contestants, workload, name, monkeypatch):
    # What a GPU will run, as far as a CPU can tell: precisions and dtypes, not speed.
    monkeypatch.setattr(contestants.Workload, "dtype", torch.bfloat16)
    tiny = workload("tiny")
    runner = contestants.CONTESTANTS[name](tiny)
    assert {p.dtype for p in runner.trained.values()} == {torch.float32}
    frozen = [p for p in runner.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    drawn = {n: tiny.draw(n, tuple(t.shape)) for n, t in runner.tensors()}
    assert all(torch.equal(t.detach().to(torch.bfloat16), drawn[n]) for n, t in runner.tensors())
    recomputing = any(getattr(module, "gradient_checkpointing", False) for module in runner.model.modules())
    assert recomputing is (name == "hf-checkpointing")
