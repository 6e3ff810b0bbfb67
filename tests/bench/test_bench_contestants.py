"""bench/contestants.py: the sizes are the models they are named after, and the weights an expansion's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contestants import CONTESTANTS
from hugging_face import runner_of
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from workload import OPTIM, SIZES, Runner, Workload

from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.alternatives import adapter_parameters
from llama_pro_fast.planning.cost import num_parameters, step_cost
from llama_pro_fast.planning.job import Job
from llama_pro_fast.training.optimizer import Optimizer


def make(size: str) -> Workload:
    return Workload(size=size, seq=8, micro_batch=1, steps=1, warmup=0, device="cpu")


@pytest.mark.parametrize(
    ("size", "base", "expanded", "head_dim"),
    # Meta's own counts; with the new blocks, 218,112,000 each at 8B shape.
    [("1b", 1_235_814_400, 1_479_100_416, 64), ("7b", 6_738_415_616, 8_357_482_496, 128),
     ("8b", 8_030_261_248, 9_775_157_248, 128)],
)  # fmt: skip
def test_a_size_is_the_model_it_is_named_after(size, base, expanded, head_dim):
    config = make(size).config
    assert num_parameters(config) == expanded
    config.num_hidden_layers = SIZES[size].base["num_hidden_layers"]
    assert (num_parameters(config), config.head_dim) == (base, head_dim)


def test_7b_is_the_papers_expansion():
    paper = make("7b")
    assert paper.trained.blocks == (4, 9, 14, 19, 24, 29, 34, 39)
    # By hand 38.28 GFLOP a token with all of dX from the lowest trained block up, whose q/k/v projection makes none.
    expected = 38.28e9 - 2 * 3 * 4096**2
    assert step_cost(paper.config, paper.trained, seq_len=4096).total == pytest.approx(expected, rel=1e-4)


def test_a_new_block_is_its_source_with_zero_outputs():
    tiny = make("tiny")  # 8 blocks, new ones after 3 and 7: block 4 copies 3, block 5 is the base's 4
    for name, shape in (("self_attn.q_proj.weight", (6, 4)), ("input_layernorm.weight", (4,))):
        new, source, above = (tiny.draw(f"model.layers.{index}.{name}", shape) for index in (4, 3, 5))
        assert torch.equal(new, source)
        assert not torch.equal(new, above)
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        assert not tiny.draw(f"model.layers.4.{name}", (4, 4)).any()
        assert tiny.draw(f"model.layers.3.{name}", (4, 4)).all()


@pytest.fixture
def bfloat16(monkeypatch):
    """What a GPU will run, as far as a CPU can tell: precisions and dtypes, not speed."""
    monkeypatch.setattr(Workload, "dtype", torch.bfloat16)
    return make("tiny")


def recomputing(runner: Runner) -> list[bool]:
    """Of each of Hugging Face's layers."""
    return [m.gradient_checkpointing for m in runner.model.modules() if isinstance(m, LlamaDecoderLayer)]


@pytest.mark.parametrize("name", ["ours", "ours-block", "hf", "hf-checkpointing", "hf-checkpointing-trained"])
def test_bf16_contestants_hold_equal_bits_and_float32_masters(name, bfloat16):
    runner = CONTESTANTS[name].build(bfloat16)
    assert {p.dtype for p in runner.trained.values()} == {torch.float32}
    frozen = [p for p in runner.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    drawn = {n: bfloat16.draw(n, tuple(t.shape)) for n, t in runner.tensors()}
    assert all(torch.equal(t.detach().to(torch.bfloat16), drawn[n]) for n, t in runner.tensors())
    if name.startswith("hf"):
        new = list(bfloat16.plan.is_new)
        wanted = {"hf": [False] * 10, "hf-checkpointing": [True] * 10, "hf-checkpointing-trained": new}
        assert recomputing(runner) == wanted[name]
    else:
        assert {b.recompute.value for b in runner.model.blocks} == {"block" if name == "ours-block" else "none"}


@pytest.mark.parametrize("name", ["hf-bf16", "full-bf16-checkpointing"])
def test_pure_bf16_contestants_hold_nothing_else(name, bfloat16):
    runner = CONTESTANTS[name].build(bfloat16)
    assert {p.dtype for p in runner.model.parameters()} == {torch.bfloat16}
    assert runner.facts["trained_dtype"] == "bfloat16"
    tokens = runner.prepare(next(bfloat16.token_batches()))
    runner.loss(tokens).backward()
    optimizer = Optimizer(runner.model, runner.trained, OPTIM, 1)
    optimizer.step(0)
    moments = [value for key, value in optimizer.state().items() if not key.endswith(".step")]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    assert (len(runner.trained) == len(list(runner.model.parameters()))) is name.startswith("full")


def test_lora_trains_adapters_of_every_linear_layer_of_the_base_and_nothing_else(bfloat16):
    pytest.importorskip("peft")
    runner = CONTESTANTS["lora-checkpointing"].build(bfloat16)
    assert len(runner.trained) == 2 * 7 * 8
    assert all("lora_" in key and p.dtype == torch.float32 for key, p in runner.trained.items())
    base = replace(bfloat16, expanded=False).config
    job = Job(config=base, trained=Trained.all_of(base.num_hidden_layers))
    assert sum(p.numel() for p in runner.trained.values()) == adapter_parameters(job, 16)
    assert all(p.dtype == torch.bfloat16 for _, p in runner.tensors())
    assert recomputing(runner) == [True] * 8
    runner.loss(runner.prepare(next(bfloat16.token_batches()))).backward()
    # Of an adapter's two matrices the upper is zero, so that at first only it has a gradient.
    assert all(p.grad.any() for key, p in runner.trained.items() if "lora_B" in key)


@pytest.mark.parametrize("name", ["ours", "hf"])
def test_packed_documents_do_not_see_each_other(name):
    """Nor does one predict the next: the loss is the mean over the documents by themselves."""
    contestant, whole = CONTESTANTS[name], replace(make("tiny"), seq=12, document=4, micro_batch=2)
    alone = replace(whole, seq=4, document=None, micro_batch=1)
    tokens = next(whole.token_batches())
    together, by_itself = contestant.build(whole), contestant.build(alone)
    losses = [by_itself.loss(by_itself.prepare(piece[None])) for piece in tokens.view(-1, 4)]
    assert whole.predictions == 18
    assert contestant.flops_per_token(whole) == contestant.flops_per_token(alone)
    loss = together.loss(together.prepare(tokens))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_flash_attention_is_told_where_documents_begin():
    model = torch.nn.Module()
    model.config = LlamaConfig(attn_implementation="flash_attention_4")
    workload = replace(make("tiny"), document=4)
    batch = runner_of(workload, model, []).prepare(torch.arange(16).view(2, 8))
    model.config = LlamaConfig(attn_implementation="sdpa")
    assert "cu_seq_lens_q" not in runner_of(workload, model, []).prepare(torch.arange(16).view(2, 8))
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 8, 12, 16]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3] * 4]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3, -100, 5, 6, 7, -100, 9, 10, 11, -100, 13, 14, 15]]
    assert (batch["max_length_q"], batch["input_ids"].shape) == (4, (1, 16))
