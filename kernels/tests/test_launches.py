"""What a frozen weight costs, counted: kernels started and memory asked for. On meta tensors: nothing runs."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from llama_pro_kernels import triton_kernels as ops
from llama_pro_kernels.linear_cross_entropy import linear_cross_entropy_outputs
from llama_pro_kernels.triton_kernels.launch import recorded_launches

T, H, I, V = 8192, 512, 1408, 32000
bf16, fp32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def device():
    with torch.device("meta"):
        yield "meta"


class Allocations(TorchDispatchMode):
    """Shape and dtype of every tensor with memory of its own that is made within."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and isinstance(result, torch.Tensor):
            self.made.append((tuple(result.shape), result.dtype))
        return result


def count(call):
    """(names of the kernels started, tensors made) by ``call``, whose own tensors are made before."""
    with recorded_launches() as launches, Allocations() as allocations:
        call()
    return [launch.name for launch in launches], allocations.made


def rows(width=H, dtype=bf16):
    return torch.empty(T, width, dtype=dtype)


def test_a_norm_is_one_kernel_and_makes_its_results_only():
    x, residual, weight = rows(), rows(), torch.empty(H, dtype=bf16)
    assert count(lambda: ops.rms_norm_forward(x, weight, 1e-5)) == (
        ["_rms_norm_forward_kernel"], [((T, H), bf16), ((T,), fp32)],
    )  # fmt: skip
    assert count(lambda: ops.add_rms_norm_forward(x, residual, weight, 1e-5)) == (
        ["_rms_norm_forward_kernel"], [((T, H), bf16), ((T, H), bf16), ((T,), fp32)],
    )  # fmt: skip


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_frozen_norm_launches_no_dweight_work_and_allocates_none(with_residual):
    dy, x, ds, weight, rstd = rows(), rows(), rows(), torch.empty(H, dtype=bf16), torch.empty(T)

    def backward(need_dweight):
        return count(
            lambda: ops.rms_norm_backward(
                dy, x, weight, rstd, dresidual=ds if with_residual else None, need_dweight=need_dweight
            )
        )

    assert backward(need_dweight=False) == (["_rms_norm_backward_kernel"], [((T, H), bf16)])
    launches, made = backward(need_dweight=True)
    assert launches == ["_rms_norm_backward_kernel", "_sum_rows_kernel"]
    (partial, partial_dtype), *rest = made[1:]
    assert made[0] == ((T, H), bf16)
    assert partial[1:] == (H,)
    assert partial[0] < T // 8
    assert partial_dtype == fp32
    assert rest == [((H,), fp32)]


def test_the_frozen_kernel_has_no_accumulation_in_it():
    """Not only no buffer: the loop that would fill it is not compiled in either."""
    dy, x, weight, rstd = rows(), rows(), torch.empty(H, dtype=bf16), torch.empty(T)
    with recorded_launches() as launches:
        ops.rms_norm_backward(dy, x, weight, rstd, need_dweight=False)
        ops.rms_norm_backward(dy, x, weight, rstd, need_dweight=True)
    frozen, trained, _ = launches
    assert frozen.options["NEED_DWEIGHT"] is False
    assert trained.options["NEED_DWEIGHT"] is True
    # A program for every tile of rows, against few that walk.
    assert frozen.grid[0] == T // frozen.options["ROWS"]
    assert trained.grid[0] < frozen.grid[0]


def test_a_scales_gradient_reads_the_weight_where_it_lies():
    weight, dweight, scale = torch.empty(2 * I, H, dtype=bf16), torch.empty(2 * I, H), torch.empty(H)
    launches, made = count(lambda: ops.linear_dscale(weight, dweight, scale))
    assert launches == ["_dscale_kernel", "_sum_rows_kernel"]
    (partial, dtype), *rest = made
    assert partial[1:] == (H,)
    assert (partial[0] < 2 * I // 8, dtype) == (True, fp32)
    assert rest == [((H,), fp32)] * 2  # the sum, and its quotient in place


@pytest.mark.parametrize("need_product", [False, True])
def test_swiglu_backward_writes_over_its_input_in_one_kernel(need_product):
    dy, gate_up = rows(I), rows(2 * I)
    launches, made = count(lambda: ops.swiglu_backward_(dy, gate_up, need_product=need_product))
    assert launches == ["_swiglu_backward_kernel"]
    assert made == ([((T, I), bf16)] if need_product else [])


def test_q_and_k_turn_in_one_kernel_and_so_do_their_gradients():
    heads, kv_heads, head_dim = 8, 2, 64
    qkv = rows((heads + 2 * kv_heads) * head_dim)
    tables = torch.empty(T, 32), torch.empty(T, 32), torch.empty(T, dtype=torch.int64)
    dq, dk, dv = (torch.empty(T, n, head_dim, dtype=bf16) for n in (heads, kv_heads, kv_heads))
    launches, made = count(lambda: ops.rotary_forward(qkv, *tables, heads, kv_heads, head_dim))
    assert (launches, made) == (["_rotary_kernel"], [((T, heads + kv_heads, head_dim), bf16)])
    launches, made = count(lambda: ops.rotary_forward_(qkv, *tables, heads, kv_heads, head_dim))
    assert (launches, made) == (["_rotary_kernel"], [])
    launches, made = count(lambda: ops.rotary_backward(dq, dk, dv, *tables))
    assert (launches, made) == (["_rotary_kernel"], [((T, (heads + 2 * kv_heads) * head_dim), bf16)])


def test_normed_heads_turn_in_one_kernel_and_so_do_their_gradients():
    """Of norm and rotation by themselves it was four kernels forward, and five and two copies backward."""
    heads, kv_heads, head_dim = 8, 2, 64
    qkv, norm = rows((heads + 2 * kv_heads) * head_dim), torch.empty(head_dim)
    tables = torch.empty(T, 32), torch.empty(T, 32), torch.empty(T, dtype=torch.int64)
    d = [torch.empty(T, n, head_dim, dtype=bf16) for n in (heads, kv_heads, kv_heads)]
    launches, made = count(
        lambda: ops.qk_norm_rotary_forward(qkv, norm, norm, 1e-5, *tables, heads, kv_heads, head_dim)
    )
    assert (launches, made) == (["_qk_norm_rotary_kernel"], [((T, heads + kv_heads, head_dim), bf16)])

    def backward(need_dweight):
        return count(lambda: ops.qk_norm_rotary_backward(*d, qkv, norm, norm, 1e-5, *tables, need_dweight=need_dweight))

    assert backward(False) == (["_qk_norm_rotary_backward_kernel"], [(tuple(qkv.shape), bf16)])
    launches, made = backward(True)
    assert launches == ["_qk_norm_rotary_backward_kernel", "_sum_rows_kernel"]
    (partial, dtype), total = made[1:]
    assert (partial[0] < T // 8, partial[1:], dtype) == (True, (2 * head_dim,), fp32)
    assert total == ((2 * head_dim,), fp32)


def test_a_gradient_in_codes_is_one_kernel_that_writes_nothing_else():
    """Not the gradient itself, but where it is a residual too; made apart it would be written and read once more."""
    heads, kv_heads, head_dim = 8, 2, 64
    packed, norm, rstd = rows((heads + 2 * kv_heads) * head_dim), torch.empty(head_dim), torch.empty(T)
    tables = torch.empty(T, 32), torch.empty(T, 32), torch.empty(T, dtype=torch.int64)
    d = [torch.empty(T, n, head_dim, dtype=bf16) for n in (heads, kv_heads, kv_heads)]

    def codes(width):
        return [((T, width), torch.float8_e4m3fn), ((T,), fp32)]

    width = packed.shape[1]
    x, weight = rows(), torch.empty(H, dtype=bf16)
    assert count(lambda: ops.quantize_e4m3(x)) == (["_quantize_e4m3_kernel"], codes(H))
    dy, gate_up = rows(I), rows(2 * I)
    made = count(lambda: ops.swiglu_backward_e4m3(dy, gate_up))
    assert made == (["_swiglu_backward_e4m3_kernel"], codes(2 * I))
    assert count(lambda: ops.rotary_backward_e4m3(*d, *tables)) == (["_rotary_kernel"], codes(width))
    made = count(lambda: ops.qk_norm_rotary_backward_e4m3(*d, packed, norm, norm, 1e-5, *tables))
    assert made == (["_qk_norm_rotary_backward_kernel"], codes(width))
    launches, made = count(lambda: ops.rms_norm_backward_e4m3(x, x, weight, rstd, dresidual=x))
    assert (launches, sorted(made, key=str)) == (
        ["_rms_norm_backward_kernel"], sorted([((T, H), bf16), *codes(H)], key=str),
    )  # fmt: skip


def test_logits_become_their_gradient_in_one_kernel_without_a_second_buffer():
    logits, labels, scale = rows(V), torch.empty(T, dtype=torch.int64), torch.empty(())
    options = {"ignore_index": -100, "need_dlogits": True}
    assert count(lambda: ops.cross_entropy_(logits, labels, scale, **options)) == (
        ["_cross_entropy_kernel"], [((T,), fp32)],
    )  # fmt: skip
    base = rows(V)
    assert count(lambda: ops.cross_entropy_kl_(logits, base, labels, scale, 0.7, **options)) == (
        ["_cross_entropy_kl_kernel"], [((T,), fp32)] * 2,
    )  # fmt: skip


def test_another_weight_of_the_divergence_is_no_other_kernel():
    logits, labels, scale = rows(V), torch.empty(T, dtype=torch.int64), torch.empty(())
    with recorded_launches() as launches:
        for kl_weight in (0, 1, 0.1):
            ops.cross_entropy_kl_(logits, logits, labels, scale, kl_weight, ignore_index=-100, need_dlogits=True)
    assert all(isinstance(launch.arguments[-1], float) for launch in launches)  # an integer is specialised


@pytest.mark.parametrize("need_dweight", [False, True])
def test_a_frozen_head_makes_no_dweight(need_dweight, monkeypatch):
    monkeypatch.setattr(sys.modules[linear_cross_entropy_outputs.__module__], "implementation", lambda x: ops)
    x, weight, labels, scale = rows(), torch.empty(V, H, dtype=bf16), torch.empty(T, dtype=torch.int64), torch.empty(())
    chunks = 4
    launches, made = count(
        lambda: linear_cross_entropy_outputs(
            x, weight, labels, scale, True, need_dweight, -100, T // chunks, False, False
        )
    )
    assert launches == ["_cross_entropy_kernel"] * chunks
    assert made.count(((T // chunks, V), bf16)) == chunks
    assert (((V, H), fp32) in made) == need_dweight
    assert max((shape for shape, _ in made if shape != (V, H)), key=lambda s: torch.Size(s).numel()) == (T // chunks, V)


def test_floating_point_contraction_is_said_and_not_left_to_a_default():
    with recorded_launches() as launches:
        ops.rms_norm_forward(rows(), torch.empty(H, dtype=bf16), 1e-5)
    assert launches[0].options["enable_fp_fusion"] is True


def test_nothing_to_do_starts_nothing():
    x, weight = torch.empty(0, H, dtype=bf16), torch.empty(H, dtype=bf16)
    assert count(lambda: ops.rms_norm_forward(x, weight, 1e-5))[0] == []
    assert count(lambda: ops.swiglu_forward(torch.empty(0, 2 * I, dtype=bf16)))[0] == []
    # The sum over no rows is zero, and somebody has to write that down.
    launches, _ = count(lambda: ops.rms_norm_backward(x, x, weight, torch.empty(0), need_dweight=True))
    assert launches == ["_sum_rows_kernel"]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: ops.rms_norm_forward(rows(), torch.empty(H - 1), 1e-5), r"weight has shape \[511\]"),
        (lambda: ops.add_rms_norm_forward(rows(), rows(64), torch.empty(H), 1e-5), "residual"),
        (lambda: ops.rms_norm_backward(rows(64), rows(), torch.empty(H), torch.empty(T), need_dweight=False), "dy"),
        (lambda: ops.rms_norm_backward(rows(), rows(), torch.empty(H), torch.empty(9), need_dweight=True), "rstd"),
        (lambda: ops.linear_dscale(rows(), rows(H - 1), torch.empty(H)), "dweight"),
        (lambda: ops.linear_dscale(rows(), rows(), torch.empty(H - 1)), "scale"),
        (lambda: ops.swiglu_forward(rows(7)), "two halves"),
        (lambda: ops.swiglu_backward_(rows(I - 1), rows(2 * I)), "dy"),
        (lambda: ops.swiglu_backward_e4m3(rows(I - 1), rows(2 * I)), "dy"),
        (lambda: ops.rotary_forward(rows(24), rows(4), rows(4), torch.empty(T - 1), 1, 1, 8), "position_ids"),
        (lambda: ops.rotary_forward(rows(24), rows(8), rows(8), torch.empty(T), 1, 1, 8), "cos turns 16 dimensions"),
        (lambda: ops.rotary_forward(rows(24), rows(4), rows(2), torch.empty(T), 1, 1, 8), "sin"),
        (
            lambda: ops.cross_entropy_(
                rows(V), torch.empty(T - 1), torch.empty(()), ignore_index=-1, need_dlogits=True
            ),
            "labels",
        ),
        (
            lambda: ops.cross_entropy_kl_(
                rows(V), rows(V - 1), torch.empty(T), torch.empty(()), 0.7, ignore_index=-1, need_dlogits=True
            ),
            "base_logits",
        ),
        (lambda: ops.kl_divergence(rows(V), rows(V - 1)), "logits"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_nothing_starts(call, what):
    with recorded_launches() as launches, pytest.raises(ValueError, match=what):
        call()
    assert launches == []
