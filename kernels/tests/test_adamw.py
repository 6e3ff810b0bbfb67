import pytest
import torch

from llama_pro_kernels import adamw_

OPTIONS = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7, 300), (1,), (1024,), (3, 1025)]


def state(dtype, copies=None):
    parameters = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    steps = [torch.zeros(()) for _ in parameters]
    return parameters, *moments, steps, [p.to(copies) if copies else None for p in parameters]


def step(state, gradients, divisor=2.0, left_out=0.0, **options):
    parameters, exp_avgs, exp_avg_sqs, steps, copies = state
    scalars = {"divisor": torch.tensor(divisor), "left_out": torch.tensor(left_out)}
    gradients = [gradient.clone() for gradient in gradients]
    adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, steps, copies, **OPTIONS | options, **scalars)


def by_formula(parameters, gradients, lr, beta1, beta2, eps, weight_decay):
    """Algorithm 2 of the paper over several steps."""
    m = [torch.zeros_like(p) for p in parameters]
    v = [torch.zeros_like(p) for p in parameters]
    for t, all_of_a_step in enumerate(gradients, 1):
        for i, g in enumerate(all_of_a_step):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat, v_hat = m[i] / (1 - beta1**t), v[i] / (1 - beta2**t)
            parameters[i] = parameters[i] - lr * weight_decay * parameters[i] - lr * m_hat / (v_hat.sqrt() + eps)
    return parameters, m, v


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-6)])
def test_is_the_papers_algorithm(dtype, tolerance):
    tensors = state(dtype)
    gradients = [[torch.randn(shape, dtype=dtype) * 10.0**-n for shape in SHAPES] for n in range(4)]
    exact = by_formula(
        [p.double() for p in tensors[0]], [[g.double() / 2 for g in each] for each in gradients], **OPTIONS
    )
    for each in gradients:
        step(tensors, each)
    for got, exactly in zip(tensors, exact, strict=False):
        for ours, theirs in zip(got, exactly, strict=True):
            torch.testing.assert_close(
                ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item()
            )
    assert all(count == 4 for count in tensors[3])


def test_the_first_corrections_are_exact_to_fp32():
    """1 - 0.999 is 1e-3 with three digits less, in fp32: the first update would be off by 3e-5."""
    parameter, options = torch.zeros(4), {"beta2": 0.999, "weight_decay": 0.0, "lr": 1.0}
    tensors = [parameter], [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())], [None]
    step(tensors, [torch.tensor([1.0, -2.0, 3e-4, 5.0])], **options)
    torch.testing.assert_close(parameter.double(), torch.tensor([-1.0, 1, -1, -1]).double(), rtol=0, atol=1e-6 + 2e-4)
    torch.testing.assert_close(parameter[[0, 1, 3]].abs(), torch.ones(3), rtol=0, atol=1e-6)


def test_copies_follow_and_one_without_is_left_alone():
    tensors = state(torch.float32, torch.bfloat16)
    tensors[4][1] = None
    step(tensors, [torch.randn(shape) for shape in SHAPES])
    for parameter, copy in zip(tensors[0], tensors[4], strict=True):
        if copy is not None:
            # The interpreter cuts bf16 off.
            assert ((copy.float() - parameter).abs() <= parameter.abs() * 2**-7).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_left_out_changes_nothing(bad):
    tensors = state(torch.float32, torch.bfloat16)
    step(tensors, [torch.randn(shape) for shape in SHAPES])
    flat = [each for kind in tensors for each in kind]
    before = [each.clone() for each in flat]
    step(tensors, [torch.full(shape, bad) for shape in SHAPES], divisor=bad, left_out=1.0)
    assert all(map(torch.equal, flat, before))
    assert all(count == 1 for count in tensors[3])


def test_gradients_may_lie_anyhow():
    tensors, gradients = state(torch.float32), [torch.randn(shape) for shape in SHAPES]
    others = [[each.clone() for each in kind] if kind[0] is not None else kind for kind in tensors]
    step(tensors, gradients)
    step(others, [gradient.t().contiguous().t() if gradient.ndim == 2 else gradient for gradient in gradients])
    for got, same in zip(others[0], tensors[0], strict=True):
        torch.testing.assert_close(got, same, rtol=0, atol=1e-6)


def test_what_is_written_over_and_does_not_lie_in_one_piece_is_refused():
    wide = torch.ones(4, 8)[:, :4]
    with pytest.raises(ValueError, match="must be contiguous"):
        step(([wide], [wide.clone()], [wide.clone()], [torch.zeros(())], [None]), [wide])


def test_writes_are_seen_by_autograd():
    tensors = state(torch.float32, torch.bfloat16)
    versions = [tensor._version for kind in (0, 1, 2, 4) for tensor in tensors[kind]]
    step(tensors, [torch.randn(shape) for shape in SHAPES])
    assert all(
        tensor._version > version
        for tensor, version in zip((t for kind in (0, 1, 2, 4) for t in tensors[kind]), versions, strict=True)
    )
