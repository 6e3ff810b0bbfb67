"""What a block keeps and computes, to the byte and the FLOP: every class, every kind of attention."""

from __future__ import annotations

import json

import memory
import pytest
import torch
from block_cases import SPECS, make_block, make_context, make_rows
from peak_bytes import PeakBytes
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model import block as block_module
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.cost import attention_flops, kept_bytes, matrices, recomputed_flops, step_cost
from llama_pro_kernels import linear_cross_entropy, select_attention_backend

pytestmark = pytest.mark.usefixtures("nothing_old_to_collect")

TOKENS = (24, 56)


def measured(name, which, dtype=torch.bfloat16):
    spec = SPECS[name]
    attention = select_attention_backend("cpu", dtype, window=spec.window, head_dim=spec.head_dim)
    return memory.measure_block(spec, *memory.ROWS[which], dtype, TOKENS, attention)


@pytest.mark.parametrize(
    ("name", "which"),
    [
        (name, which)
        for name in SPECS
        for which, (_, _, policy) in memory.ROWS.items()
        if policy is Recompute.NONE or name in ("gqa", "mqa", "qk norm", "all")
    ],
)
def test_bytes_and_work_equal_their_formulas(name, which):
    row, spec, (_, _, policy) = measured(name, which), SPECS[name], memory.ROWS[which]
    which = which.split(", ")[0] if "lowest" not in which else "lowest"
    H, I, N, K, D = spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
    in_bf16 = {
        "none": 2 * (2 * H + 4) + 4 * (N + K) * D + 4 * N + 4 * I,
        "mlp": 2 * (2 * H + 4) + 4 * (N + K) * D + 4 * N,
        "all_but_attention": 2 * H + 2 * N * D + 4 * N,
        "block": 2 * H,
    }
    assert row["bytes"] == row["bytes_formula"] == (0 if which == "prefix" else in_bf16[policy.value])

    qkv, o, gate_up, down = H * (N + 2 * K) * D, H * N * D, 2 * H * I, H * I
    weights = qkv + o + gate_up + down
    backward = {  # dX and dW, in weights
        "prefix": 0,
        "lowest": (weights - qkv) + weights,
        "frozen": weights,
        "trained": 2 * weights,
    }
    recomputed = {"none": 0, "mlp": gate_up, "all_but_attention": weights - down, "block": weights - down}
    tokens, lengths = TOKENS[1], memory.documents(TOKENS[1])
    window = spec.window or tokens
    pairs = sum(1 for n in lengths for query in range(n) for key in range(query + 1) if query - key < window)
    attention = 4 * N * D * pairs
    assert row["work"] == row["work_formula"]
    assert row["work"] == {
        "products forward": 2 * tokens * weights,
        "products backward": 2 * tokens * (backward[which] + recomputed[policy.value]),
        "attention forward": attention,
        "attention backward": (0 if which == "prefix" else attention * 5 // 2)
        + (attention if policy.value == "block" else 0),
    }


def test_what_the_policies_cost_at_the_shape_of_llama_2_7b():
    """The figures of a frozen block, documents of 4,096 tokens, attention's backward 2.5 times its forward."""
    cost = sum(2 * 2 * elements for elements in matrices(memory.SPEC).values())
    cost += 3.5 * attention_flops(memory.SPEC, 4096)
    figures = {
        policy.value: (
            kept_bytes(memory.SPEC, BlockClass.FROZEN, torch.bfloat16, policy),
            round(recomputed_flops(memory.SPEC, policy, 4096) / cost, 3),
        )
        for policy in Recompute
    }
    assert figures == {
        "none": (93_320, 0),
        "mlp": (49_288, 0.195),
        "all_but_attention": (16_512, 0.339),
        "block": (8_192, 0.376),
    }


@pytest.mark.parametrize("which", memory.ROWS)
def test_bytes_in_fp32(which):
    row = measured("all", which, torch.float32)
    assert row["bytes"] == row["bytes_formula"]


def test_the_head_makes_two_products():
    """A frozen one: logits and dX."""
    x, weight = torch.randn(2, 64, requires_grad=True), torch.randn(100, 64)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, torch.arange(2), torch.tensor(0.5)).backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 64 * 100


def test_a_gradient_of_a_norm_is_no_kernel_of_the_norm(monkeypatch):
    """Weights of the two norms of the residual get theirs from the projections; those of q and k are sums."""
    asked = []
    original = block_module.rms_norm_backward

    def watched(*args, need_dweight, **kwargs):
        asked.append(need_dweight)
        return original(*args, need_dweight=need_dweight, **kwargs)

    monkeypatch.setattr(block_module, "rms_norm_backward", watched)
    spec = SPECS["all"]
    block, x = make_block(spec, BlockClass.TRAINED, torch.float32), make_rows(spec, torch.float32).requires_grad_()
    block(x, make_context(spec, torch.float32)).sum().backward()
    assert asked == [False, False]
    assert block.input_layernorm.weight.grad.any()


def test_a_frozen_block_asks_for_nothing_that_only_a_weight_needs(monkeypatch):
    asked = {}

    def watch(name, flag):
        original = getattr(block_module, name)

        def watched(*args, **kwargs):
            asked[name] = kwargs[flag]
            return original(*args, **kwargs)

        monkeypatch.setattr(block_module, name, watched)

    watch("swiglu_backward_", "need_product")
    watch("qk_norm_rotary_backward", "need_dweight")
    spec = SPECS["all"]
    for block_class in (BlockClass.FROZEN, BlockClass.TRAINED):
        x = make_rows(spec, torch.float32).requires_grad_()
        make_block(spec, block_class, torch.float32)(x, make_context(spec, torch.float32)).sum().backward()
        assert set(asked.values()) == {block_class is BlockClass.TRAINED}
        assert len(asked) == 2


class TestWhatIsLeft:
    def test_sees_what_hooks_on_saved_tensors_miss(self):
        class Hoards(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.hidden = {"deep": [x.exp()]}
                return x * 2

            @staticmethod
            def backward(ctx, dy):
                return dy

        x = torch.randn(10, requires_grad=True)
        with PeakBytes() as memory:
            y = Hoards.apply(x)
        assert memory.left - y.nbytes == 40

    def test_counts_a_storage_once_and_whole(self):
        with PeakBytes() as memory:
            whole = torch.zeros(10)
            views = whole[:1], whole[5:6]
            del whole
        assert memory.left == 40
        del views

    def test_a_byte_too_many_is_found(self, monkeypatch):
        hoard = []
        original = block_module.swiglu_forward
        monkeypatch.setattr(block_module, "swiglu_forward", lambda x: hoard.append(original(x)) or hoard[-1])
        row = measured("gqa", "frozen")
        assert row["bytes"] == row["bytes_formula"] + 2 * SPECS["gqa"].intermediate_size


@pytest.mark.slow
class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(memory, "SPEC", SPECS["gqa"])

        def run(*arguments):
            code = memory.main([*arguments, "--tokens", "16", "40", "--out", str(tmp_path / "memory.json")])
            return code, capsys.readouterr().out.splitlines()[-1], json.loads((tmp_path / "memory.json").read_text())

        return run

    def test_says_equal_and_ends_with_0(self, run):
        code, last, result = run()
        assert code == 0
        assert last.startswith("EQUAL")
        assert [row["block"] for row in result["rows"]] == [*memory.ROWS]
        assert {"device", "commit", "versions", "command"} <= result.keys()

    @pytest.mark.parametrize("broken", ["kept_bytes", "expected_work"])
    def test_ends_with_1_where_one_differs(self, run, monkeypatch, broken):
        original = getattr(memory, broken)

        def off_by_one(*args):
            formula = original(*args)
            return formula + 1 if broken == "kept_bytes" else formula | {"attention forward": 1}

        monkeypatch.setattr(memory, broken, off_by_one)
        code, last, _ = run()
        assert code == 1
        assert last.startswith("NOT EQUAL")


@pytest.mark.parametrize("family", [{}, {"family": "qwen3"}, {"family": "qwen2", "tie_word_embeddings": True}])
@pytest.mark.parametrize("trained", [[2, 3], [1, 3], "all"])
def test_a_steps_products_are_those_of_step_cost(family, trained, make_base):
    """From the embedding to the loss and back: prefix, lowest, frozen, trained and head together."""
    recompute = list(Recompute)
    folder = make_base(**family)
    what = Trained.all_of(4) if trained == "all" else Trained(4, tuple(trained))
    model = load_model(
        folder,
        trained=what,
        attention="cpu_flash",
        max_length=12,
        recompute=recompute,
    )
    batch = PackedBatch.from_documents([list(range(12)), list(range(20, 32))])
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, torch.tensor(1.0)).backward()
    products = memory.by_kind(counter, "made")["products made"]
    cost = step_cost(folder.config, what, seq_len=12, recompute=recompute)
    attention_recomputed = attention_flops(block_spec(folder.config, 3), 12)
    assert cost.recomputed > attention_recomputed
    assert products == 24 * (cost.forward + cost.dx + cost.dw + cost.recomputed - attention_recomputed)


def test_step_cost_counts_half_the_square_and_a_band_where_there_is_a_window(make_base):
    """4·N·D for every pair: S²/2 of them in a block that sees all, and W·S - W²/2 in one with a window."""
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    config = make_base(family="qwen2", **sliding).config
    full, band = 20 * 20 / 2, 8 * 20 - 8 * 8 / 2
    pairs = (3 * full + band) + 2 * (full + band)  # forward everywhere, twice that from block 2 up
    assert step_cost(config, Trained(4, (2,)), seq_len=20).attention == pytest.approx(4 * 16 * pairs / 20, rel=1e-12)
