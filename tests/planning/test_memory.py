"""What a step is said to hold is what it holds: counted allocation by allocation, over whole optimizer steps.

The count is PyTorch's own record (`bench/peak_bytes.py`) plus the tensors that are there at entry. Nothing of it is
known to `memory.py`, so a term that is dropped, doubled or of the wrong phase shows, where that phase is the fullest.
Each case below says which one is.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peak_bytes import PeakBytes

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.hf.loading import rotary_tables
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.block import Block
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.layers import Embedding, RMSNorm
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.job import Job
from llama_pro_fast.planning.memory import StepMemory, evaluation_memory, states_bytes, step_memory
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_kernels import implementation_name

pytestmark = pytest.mark.usefixtures("nothing_old_to_collect")

fp32, bf16 = torch.float32, torch.bfloat16
CHILD = os.environ.get("TRITON_INTERPRET") == "1"

NONE, MLP, ALL_BUT_ATTENTION, BLOCK = Recompute
MIXTURE = (BLOCK, ALL_BUT_ATTENTION, MLP, NONE)
LAYERS = len(MIXTURE)
TINY = {"hidden_size": 16, "head_dim": 8, "intermediate_size": 48, "vocab_size": 40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model of four blocks and the step it makes; ``fullest`` is the step's phase with nothing recomputed."""

    fullest: str
    trained: tuple[int, ...] = (1, 3)
    train_all: bool = False
    family: str = "llama"
    config: dict = dataclasses.field(default_factory=dict)
    seq_len: int = 128
    micro_batch_size: int = 2
    micro_batches: int = 1
    attention: str = "cpu_flash"
    muon: bool = False
    taught: bool = False
    eight_bits: bool = False

    def job(self, dtype: torch.dtype) -> Job:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": 512,
        }
        return Job(
            config=transformers.AutoConfig.for_model(self.family, **(sizes | self.config)),
            trained=Trained.all_of(LAYERS) if self.train_all else Trained(LAYERS, self.trained),
            dtype=dtype,
            seq_len=self.seq_len,
            attention=self.attention,
            triton=implementation_name("cpu", fp32).startswith("triton"),
            muon=self.muon,
            taught=float(self.taught),
            eight_bits=self.eight_bits,
        )


CASES = {
    "loss": Case(fullest="the loss", config={"vocab_size": 8000}),
    "loss, several micro-batches": Case(fullest="the loss", config={"vocab_size": 8000}, micro_batches=3),
    "loss, of a small vocabulary": Case(
        fullest="the loss", trained=(3,), config={"intermediate_size": 16, "vocab_size": 600}, micro_batch_size=4
    ),
    "narrow branches": Case(
        fullest="backward of block 3",
        config={"hidden_size": 256, "head_dim": 8, "intermediate_size": 64, "num_attention_heads": 2},
    ),
    "top block": Case(fullest="backward of block 3"),
    "top block only": Case(fullest="backward of block 3", trained=(3,)),
    "lower block": Case(fullest="backward of block 2", trained=(2,), config={"intermediate_size": 640}, seq_len=16),
    "lowest block trains": Case(fullest="backward of block 3", trained=(0, 3)),
    "only the lowest trains": Case(
        fullest="backward of block 0", trained=(0,), config={"hidden_size": 128, "intermediate_size": 512}, seq_len=16
    ),
    "several micro-batches": Case(fullest="backward of block 3", micro_batches=2),
    "one sequence": Case(fullest="backward of block 3", micro_batch_size=1, seq_len=256),
    "many heads": Case(
        fullest="backward of block 3",
        config={"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16},
    ),
    "one head for k and v": Case(fullest="backward of block 3", config={"num_key_value_heads": 1}),
    "biases": Case(fullest="backward of block 3", config={"attention_bias": True, "mlp_bias": True}),
    "qk norm": Case(fullest="backward of block 3", family="qwen3", config={"head_dim": 16}),
    "qk norm, wide heads": Case(
        fullest="backward of block 3", family="qwen3", config={"head_dim": 32, "intermediate_size": 320}
    ),
    "window": Case(
        fullest="backward of block 3", family="mistral", config={"sliding_window": 32}, attention="reference"
    ),
    "Muon": Case(fullest="the optimizer's step", config={"hidden_size": 256}, seq_len=8, muon=True),
    "the base teaches": Case(fullest="the loss", config={"vocab_size": 8000}, taught=True),
    "eight bits": Case(fullest="backward of block 3", trained=(1,), eight_bits=True),
    "eight bits, qk norm, many heads": Case(
        fullest="backward of block 3",
        trained=(1,),
        family="qwen3",
        config={"num_attention_heads": 8, "head_dim": 16, "intermediate_size": 32},
        eight_bits=True,
    ),
    "eight bits, wide rows": Case(
        fullest="backward of block 3",
        trained=(1,),
        config={"hidden_size": 256, "head_dim": 16, "intermediate_size": 64, "num_attention_heads": 2},
        eight_bits=True,
    ),
    "eight bits, some matrices": Case(
        fullest="backward of block 3", trained=(1,), config={"intermediate_size": 200}, eight_bits=True
    ),
    "everything trains": Case(fullest="backward of block 3", trained=(), train_all=True),
    "everything trains, several micro-batches": Case(
        fullest="backward of block 3", trained=(), train_all=True, micro_batches=2
    ),
    "everything trains, tied, a head that waits": Case(
        fullest="backward of block 3",
        trained=(),
        train_all=True,
        config={"vocab_size": 600, "tie_word_embeddings": True},
        micro_batches=2,
    ),
    "everything trains, few tokens": Case(
        fullest="backward of the embedding", trained=(), train_all=True, config={"vocab_size": 4000}, seq_len=32
    ),
    "everything trains, tied": Case(
        fullest="backward of the embedding",
        trained=(),
        train_all=True,
        config={"vocab_size": 4000, "tie_word_embeddings": True},
        seq_len=32,
    ),
    "everything trains, tied, several micro-batches": Case(
        fullest="the loss",
        trained=(),
        train_all=True,
        config={"vocab_size": 4000, "tie_word_embeddings": True},
        seq_len=24,
        micro_batches=2,
    ),
}
# So few tokens that the copy of a weight is the fullest: of gate_up_proj, and of qkv_proj.
FEW_TOKENS = {
    "wide MLP": Case(
        fullest="", trained=(3,), config={"hidden_size": 128, "intermediate_size": 1536}, seq_len=8, micro_batch_size=1
    ),
    "narrow MLP": Case(
        fullest="", trained=(3,), config={"hidden_size": 256, "intermediate_size": 128}, seq_len=8, micro_batch_size=1
    ),
}
# In an evaluation eight bits are nothing but bytes that are there.
EVALUATED = [name for name, case in CASES.items() if not case.train_all and "eight bits, " not in name]
WAYS = {policy.value: (policy,) * LAYERS for policy in Recompute} | {"mixture": MIXTURE}
EACH_WAY = [way if way in ("none", "mixture") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]


def make_model(job: Job, recompute: tuple[Recompute, ...] = (NONE,) * LAYERS) -> Decoder:
    generator, config = torch.Generator().manual_seed(0), job.config

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(std=0.02, generator=generator)

    def embedding() -> Embedding:
        table = drawn(config.vocab_size, config.hidden_size)
        return Embedding(table, trained=job.trained.everything, compute_dtype=job.dtype)

    return Decoder(
        embed_tokens=embedding(),
        blocks=[
            Block(
                spec,
                {name: drawn(*shape) for name, shape in spec.shapes().items()},
                block_class=block_class,
                compute_dtype=job.dtype,
                recompute=policy,
                eight_bits=job.eight_bits,
            )
            for spec, block_class, policy in zip(job.specs, job.trained.classes, recompute, strict=True)
        ],
        norm=RMSNorm(torch.ones(config.hidden_size), 1e-5, trained=job.trained.everything, compute_dtype=job.dtype),
        lm_head=None if config.tie_word_embeddings else embedding(),
        rotary_tables=rotary_tables(config, job.seq_len),
        attention=job.attention,
    )


def make_batch(job: Job, micro_batch_size: int) -> PackedBatch:
    return PackedBatch.from_documents(torch.randint(job.config.vocab_size, (micro_batch_size, job.seq_len)).tolist())


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(autouse=True)
def _no_scratch_of_onednn():
    """On CPUs with AMX it takes room for reordered bf16 weights from PyTorch's allocator, which no plan knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of switches for GPUs that it has none of
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def optim_config(job: Job) -> OptimConfig:
    return OptimConfig(name="muon" if job.muon else "adamw", lr=1e-3, warmup_steps=0, decay_steps=0)


def counted_step(job: Job, recompute: tuple[Recompute, ...], micro_batch_size: int, micro_batches: int) -> int:
    """The peak of one optimizer step, bytes; its second, for in the first AdamW makes its moments."""
    model = make_model(job, recompute)
    model.accumulate()
    optimizer = Optimizer(model, model.trained_parameters(), optim_config(job), 10)
    scale = torch.tensor(1e-3)

    def step(index: int) -> None:
        for _ in range(micro_batches):
            batch = make_batch(job, micro_batch_size)
            if job.taught:
                batch = dataclasses.replace(batch, num_general=len(batch.labels), num_valid_general=batch.num_valid)
                model.loss_beside_base(batch, scale, 1.0, skip=job.trained.blocks)[0].backward()
            else:
                model.loss(batch, scale).backward()
            del batch
        optimizer.step(index)

    step(0)
    entry = bytes_of(*model.parameters(), *model.buffers(), *optimizer.state().values())
    with PeakBytes() as peak:
        step(1)
    return entry + peak.bytes


def assert_counted(case: Case, dtype: torch.dtype, way: str, within: float) -> None:
    job = case.job(dtype)
    said = step_memory(job, WAYS[way], micro_batch_size=case.micro_batch_size, accumulating=case.micro_batches > 1)
    counted = counted_step(job, WAYS[way], case.micro_batch_size, case.micro_batches)
    assert said.total == pytest.approx(counted, rel=within), f"{said.total / counted:.4f} of the count; {said}"


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize("name", CASES)
def test_in_fp32_it_is_the_counted_peak_to_1_percent(name, way):
    assert_counted(CASES[name], fp32, way, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize("name", CASES)
def test_in_bf16_it_is_the_counted_peak_to_5_percent(name, way):
    """With its temporaries in the accumulation dtype, which the reference makes and a kernel does not."""
    assert_counted(CASES[name], bf16, way, 0.05)


@pytest.mark.parametrize("way", ["none", "block"])
@pytest.mark.parametrize("name", FEW_TOKENS)
def test_with_few_tokens_it_is_the_counted_peak_to_a_thousandth(name, way):
    """In bf16, where a block that recomputes everything casts its weights for each product."""
    assert_counted(FEW_TOKENS[name], bf16, way, 0.001)


@pytest.mark.parametrize("name", CASES)
def test_the_fullest_moment_is_the_one_the_case_is_for(name):
    """Else a phase that none of the cases reaches would go uncounted."""
    case = CASES[name]
    said = step_memory(
        case.job(fp32), WAYS["none"], micro_batch_size=case.micro_batch_size, accumulating=case.micro_batches > 1
    )
    assert said.phase == case.fullest


@pytest.mark.skipif(not CHILD, reason="for the child, where Triton interprets")
def test_through_the_kernels_it_is_the_counted_peak_to_5_percent():
    case = dataclasses.replace(CASES["qk norm"], seq_len=16, micro_batch_size=1, config=TINY)
    job = case.job(fp32)
    assert job.triton
    assert_counted(case, fp32, "mixture", 0.05)


@pytest.mark.slow
def test_through_triton_it_is_the_counted_peak_to_5_percent():
    """In a child process, where every operation is its kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "through_the_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("way", ["none", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("name", [*EVALUATED, *FEW_TOKENS])
def test_an_evaluation_with_its_base_is_the_counted_peak_to_5_percent(name, dtype, way):
    case = (CASES | FEW_TOKENS)[name]
    assert_evaluation_counted(case, case.job(dtype), way)


@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("name", ["narrow branches", "top block", "narrow MLP"])
def test_with_the_first_base_too(name, dtype):
    case = (CASES | FEW_TOKENS)[name]
    job = case.job(dtype)
    trained = dataclasses.replace(job.trained, older_blocks=(0,))
    assert_evaluation_counted(case, dataclasses.replace(job, trained=trained), "none")


def assert_evaluation_counted(case: Case, job: Job, way: str) -> None:
    trained, micro_batch_size = job.trained, case.micro_batch_size
    bases = {"skip_for_base": trained.skip_for_base, "skip_for_first_base": trained.skip_for_first_base}
    model, batch = make_model(job, WAYS[way]), make_batch(job, micro_batch_size)
    evaluate(model, [batch], **bases)
    with PeakBytes() as peak:
        evaluate(model, [make_batch(job, micro_batch_size)], **bases)
    counted = peak.bytes + bytes_of(*model.parameters(), *model.buffers())
    # There are no moments here yet, and in a run there are.
    said = evaluation_memory(job, WAYS[way], micro_batch_size=micro_batch_size) - 4 * job.num_moments
    assert said == pytest.approx(counted, rel=0.05), f"{said / counted:.4f} of the count"


@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("name", CASES)
def test_the_kinds_are_what_the_model_and_the_optimizer_hold(name, dtype):
    case = CASES[name]
    job = case.job(dtype)
    said = step_memory(job, MIXTURE, micro_batch_size=case.micro_batch_size, accumulating=case.micro_batches > 1)
    model = make_model(job, MIXTURE)
    masters = model.trained_parameters().values()
    optimizer = Optimizer(model, model.trained_parameters(), optim_config(job), 10)
    assert said.masters == bytes_of(*masters)
    assert said.weights == bytes_of(*model.parameters()) - bytes_of(*masters)
    tables = bytes_of(model.cos, model.sin)
    transposed = [buffer for name, buffer in model.named_buffers() if name.endswith((".codes", ".scales"))]
    assert said.transposed == bytes_of(*transposed)
    assert bool(said.transposed) == case.eight_bits
    assert said.low_precision == bytes_of(*model.buffers()) - tables - said.transposed
    assert said.moments == bytes_of(*(m for key, m in optimizer.state().items() if not key.endswith(".step")))
    assert 0 <= said.gradients <= said.masters
    assert said.transient >= tables
    fewest = step_memory(job, WAYS["block"], micro_batch_size=1, accumulating=False)
    states = fewest.weights + fewest.transposed + fewest.low_precision + fewest.moments + 2 * fewest.masters
    assert states_bytes(job) == states
    assert said.total == sum(getattr(said, kind) for kind in StepMemory.KINDS)
    assert {field.name for field in dataclasses.fields(said)} == {*StepMemory.KINDS, "phase"}


def test_what_is_kept_is_kept_by_the_class_that_keeps_it():
    job = CASES["top block"].job(fp32)
    above = [BlockClass.TRAINED, BlockClass.FROZEN, BlockClass.TRAINED]
    assert job.trained.classes == [BlockClass.PREFIX, *above]
    said = step_memory(job, WAYS["none"], micro_batch_size=2, accumulating=False)
    tokens, H, I, Q, KV, N = 256, 64, 192, 64, 32, 4
    block = tokens * 4 * (2 * H + 2 + 2 * Q + 2 * KV + N + 2 * I)
    assert (said.kept_trained, said.kept_frozen) == (2 * block, block)


@pytest.mark.parametrize("way", ["none", "block"])
@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.train_all])
def test_an_evaluation_without_a_base_is_no_more_than_is_planned(name, dtype, way):
    case = CASES[name]
    job = case.job(dtype)
    model = make_model(job, WAYS[way])
    evaluate(model, [make_batch(job, case.micro_batch_size)])
    with PeakBytes() as peak:
        evaluate(model, [make_batch(job, case.micro_batch_size)])
    counted = peak.bytes + bytes_of(*model.parameters(), *model.buffers())
    said = evaluation_memory(job, WAYS[way], micro_batch_size=case.micro_batch_size) - 2 * 4 * job.num_trained
    assert 0.95 * counted <= said <= 1.15 * counted, f"{said / counted:.4f} of the count"


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_kernels_make_no_temporaries(dtype):
    """A step through the reference takes more by what its rows are widened to, and keeps the same."""
    job = CASES["one sequence"].job(dtype)
    plain, kernels = (
        step_memory(dataclasses.replace(job, triton=triton), MIXTURE, micro_batch_size=1, accumulating=False)
        for triton in (False, True)
    )
    assert plain.total > 1.05 * kernels.total
    assert plain.phase != kernels.phase or plain.kept_trained == kernels.kept_trained
