"""What `train.fp8 backward` costs in accuracy, and on a GPU what its products gain.

    python bench/fp8.py gradients [--model FOLDER --groups 6]
    python bench/fp8.py curves
    python bench/fp8.py products

gradients   of a model's new blocks, after some steps of training, against float32's, over everything and by depth. The
            row `backward` is what a run does. Others stand for choices that were not made, imitated in this file: other
            scales of the gradient or of the weight, e5m2, trained blocks too, forward too. The bound of a block was
            stated before it was measured: a frozen block adds 0.075 of the share of its branches in the gradient that
            leaves it (four products in a row, 0.0375 each: two roundings of 2⁻⁴, evenly spread), squares add up, and
            bf16's own error is there too. It holds for dX of a token; a weight's gradient sums over tokens, whose
            roundings partly cancel.
curves      200 steps of the packaged base with and without, of three seeds each: held-out losses at the end.
products    dX at LLaMA-2-7B's shapes: bf16; e4m3 with one scale, and with a scale a token and a column; sums in float32
            or in the tensor cores' own registers. Errors are of the sums alone, against fp64 of the same codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

import llama_pro_fast
from llama_pro_fast.config import DataConfig, OptimConfig
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model import block as block_module
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.block import PROJECTIONS
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.layers import refresh_low_precision_copies
from llama_pro_fast.model.policy import BlockClass
from llama_pro_fast.recipe import parse
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.schedule import settle_schedule
from llama_pro_kernels import E4M3, linear_dx, quantize_e4m3, select_attention_backend
from llama_pro_kernels.linear import missing_e4m3, scaled_product

A_BLOCK = 0.0375 * 4**0.5
SEQ_LEN, BATCH = 512, 4


# Gradients


@dataclasses.dataclass(frozen=True)
class Imitated:
    """A choice that was not made.

    Attributes:
        gradient, weight: over what one scale stands: a row (a token, a column of W), so many numbers of it, or all.
        trained, forward: whether trained blocks' dX and frozen blocks' forward are in eight bits too.
    """

    gradient: int | str = "row"
    weight: int | str = "row"
    dtype: torch.dtype = torch.float8_e4m3fn
    trained: bool = False
    forward: bool = False

    @contextlib.contextmanager
    def within(self, model: Decoder) -> Iterator[None]:
        """Products of ``model`` are made so."""
        theirs = {"_linear_dx": block_module._linear_dx, "_linear": block_module._linear}
        passing = self._weights(model, BlockClass.FROZEN, *([BlockClass.TRAINED] if self.trained else []))
        ahead = self._weights(model, BlockClass.FROZEN, BlockClass.PREFIX) if self.forward else set()

        def dx(dy: Tensor, weight: Tensor, transposed: E4M3 | None) -> Tensor:
            if weight.data_ptr() not in passing:
                return theirs["_linear_dx"](dy, weight, transposed)
            return (self.rounded(dy, self.gradient) @ self.rounded(weight.t(), self.weight).t()).to(weight.dtype)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if weight.data_ptr() not in ahead:
                return theirs["_linear"](x, weight, bias)
            y = self.rounded(x, self.gradient) @ self.rounded(weight, self.weight).t()
            return (y if bias is None else y + bias).to(x.dtype)

        block_module._linear_dx, block_module._linear = dx, linear
        try:
            yield
        finally:
            block_module._linear_dx, block_module._linear = theirs.values()

    @staticmethod
    def _weights(model: Decoder, *classes: BlockClass) -> set[int]:
        matrices = (getattr(b, name) for b in model.blocks if b.block_class in classes for name in PROJECTIONS)
        return {(m.weight if m.low_precision is None else m.low_precision).data_ptr() for m in matrices}

    def rounded(self, x: Tensor, over: int | str) -> Tensor:
        x = x.float()
        parts = x.flatten()[None] if over == "all" else x if over == "row" else x.unflatten(-1, (-1, over))
        largest = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        scale = 2.0 ** (largest / torch.finfo(self.dtype).max).log2().ceil()
        return ((parts / scale).to(self.dtype).float() * scale).view_as(x)


WAYS: dict[str, Imitated | None] = {
    "bf16": None,
    "backward": None,
    "the same, imitated": Imitated(),
    "gradient by 64": Imitated(gradient=64),
    "gradient by tensor": Imitated(gradient="all"),
    "weight by tensor": Imitated(weight="all"),
    "both by tensor": Imitated(gradient="all", weight="all"),
    "e5m2": Imitated(dtype=torch.float8_e5m2),
    "trained blocks too": Imitated(trained=True),
    "forward too": Imitated(forward=True),
}


def gradients_of(model: Decoder, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """Of the mean loss of all batches, float32."""
    valid = sum(batch.num_valid for batch in batches)
    for batch in batches:
        model.loss(batch, torch.tensor(1 / valid, device=batch.labels.device)).backward()
    found = {name: p.grad.float().cpu() for name, p in model.trained_parameters().items()}
    model.zero_grad(set_to_none=True)
    return found


def branch_shares(model: Decoder, batches: list[PackedBatch]) -> list[float]:
    """Of each frozen block that passes a gradient on, |dx - dy| / |dx|; 0 for the others."""
    squares = torch.zeros(len(model.blocks), 2)

    def hook(index: int) -> Callable[..., None]:
        def add(module: Any, grad_in: Any, grad_out: Any) -> None:
            dx, dy = grad_in[0].float(), grad_out[0].float()
            squares[index] += torch.stack([(dx - dy).square().sum(), dx.square().sum()]).cpu()

        return add

    frozen = [index for index, b in enumerate(model.blocks) if b.block_class is BlockClass.FROZEN]
    hooks = [model.blocks[index].register_full_backward_hook(hook(index)) for index in frozen]
    gradients_of(model, batches)
    for each in hooks:
        each.remove()
    return [math.sqrt(part / whole) if whole else 0.0 for part, whole in squares.tolist()]


def gradients(options: Any, folder: Path) -> dict[str, Any]:
    device, cpu = torch.device(options.device), options.device == "cpu"
    base = model_folder.find(options.model)
    llama_pro_fast.expand(base, folder / "expanded", groups=options.groups)
    expanded = PretrainedFolder(folder / "expanded")
    trained = what_trains(expanded.raw_config, expanded.config.num_hidden_layers, parameters="new_blocks", name="")
    data = DataConfig(domain="stdlib:code", cache=str(folder / "tokens"))
    size = {"seq_len": SEQ_LEN, "seed": 0, "batch_size": BATCH}
    text = Corpus.prepare(data, expanded.tokenizer(), **size, default_general=False).train
    batches = [text.batch(index, 1).to(device) for index in range(BATCH * (options.steps + 1))]

    def load(dtype: torch.dtype, eight_bits: bool = False) -> Decoder:
        head_dim = block_spec(expanded.config, 0).head_dim
        attention = select_attention_backend(device, dtype, head_dim=head_dim)
        how = {"trained": trained, "dtype": dtype, "device": device, "attention": attention, "max_length": SEQ_LEN}
        return load_model(expanded, **how, eight_bits=eight_bits)

    model = load(torch.float32)
    settings = settle_schedule(OptimConfig(lr=1e-3), options.steps)
    optimizer = Optimizer(model, model.trained_parameters(), settings, options.steps)
    for step in range(options.steps):
        parts = batches[BATCH * step : BATCH * (step + 1)]
        valid = sum(part.num_valid for part in parts)
        for part in parts:
            model.loss(part, torch.tensor(1 / valid, device=device)).backward()
        optimizer.step(step)
    learned = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    measured = batches[-BATCH:]
    exact, shares = gradients_of(model, measured), branch_shares(model, measured)
    del model, optimizer

    rows, errors_of = [], {}
    for name, imitated in WAYS.items():
        model = load(torch.bfloat16, eight_bits=name == "backward")
        with torch.no_grad():
            for key, p in model.trained_parameters().items():
                p.copy_(learned[key])
        refresh_low_precision_copies(model)
        with imitated.within(model) if imitated else contextlib.nullcontext():
            found = gradients_of(model, measured)
        errors_of[name] = {index: _error(found, exact, f"blocks.{index}.") for index in trained.blocks}
        rows.append({
            "way": name,
            "cosine": _cosine(found, exact),
            "error": _error(found, exact, ""),
            "least_cosine": min((_cosine({k: found[k]}, exact), k) for k in found),
            "tensors": {k: [_cosine({k: found[k]}, exact), _error(found, exact, k)] for k in found},
        })  # fmt: skip
        print(f"{name}: cosine {rows[-1]['cosine']:.6f}", flush=True)
    depth = [
        {
            "block": index,
            "frozen_above": trained.classes[index:].count(BlockClass.FROZEN),
            **{way: errors_of[way][index] for way in ("bf16", "backward")},
            "bound": math.hypot(errors_of["bf16"][index], *(A_BLOCK * share for share in shares[index:])),
        }
        for index in reversed(trained.blocks)
    ]
    shown = [[r["way"], f"{r['cosine']:.5f}", f"{r['error']:.2%}", f"{r['least_cosine'][0]:.5f}"] for r in rows]
    print(common.table(["new blocks' gradients", "cosine", "error", "least of a tensor"], shown))
    lines = [[f"block {d['block']}", str(d["frozen_above"]), *(f"{d[k]:.2%}" for k in ("bf16", "backward", "bound"))]
             for d in depth]  # fmt: skip
    print(common.table(["error by depth", "frozen above", "bf16", "backward", "its bound"], lines))
    within = all(d["backward"] <= d["bound"] for d in depth)
    print(f"{'WITHIN' if within else 'BEYOND'} the bound; imitated: {cpu}")
    return {"model": Path(options.model).name, "layers": trained.num_layers, "new_blocks": list(trained.blocks),
            "steps": options.steps, "tokens": BATCH * SEQ_LEN, "rows": rows, "depth": depth, "branch_shares": shares,
            "within_bound": within}  # fmt: skip


def _flat(gradients: dict[str, Tensor], prefix: str = "") -> Tensor:
    return torch.cat([g.double().flatten() for name, g in gradients.items() if name.startswith(prefix)])


def _cosine(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    a, b = _flat(found), _flat({name: exact[name] for name in found})
    return (a @ b / (a.norm() * b.norm())).item()


def _error(found: dict[str, Tensor], exact: dict[str, Tensor], prefix: str) -> float:
    a, b = _flat(found, prefix), _flat(exact, prefix)
    return ((a - b).norm() / b.norm()).item()


# Curves


def curves(options: Any, folder: Path) -> dict[str, Any]:
    rows = []
    for seed in range(3):
        for fp8 in ("none", "backward"):
            run = folder / f"{fp8}-{seed}"
            asked = {"output": run, "train.seed": seed, "train.fp8": fp8, "train.steps": 200, "train.batch_size": 4,
                     "train.micro_batch_size": 4, "train.device": options.device, "train.dtype": "bfloat16",
                     "eval.every": 50, "data.cache": folder / "tokens"}  # fmt: skip
            words = [word for key, value in asked.items() for word in (f"--{key}", str(value))]
            llama_pro_fast.train(parse(["--config", "quickstart", *words]).config)
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = {row["role"]: row["loss"] for row in metrics if row["kind"] == "eval"}  # the last stay
            curve = {
                role: [row["loss"] for row in metrics if row["kind"] == "eval" and row["role"] == role]
                for role in losses
            }
            rows.append({"fp8": fp8, "seed": seed, "curve": curve, **losses})
    found = {}
    for role in ("domain", "general"):
        by = {fp8: [row[role] for row in rows if row["fp8"] == fp8] for fp8 in ("none", "backward")}
        spread = max(by["none"]) - min(by["none"])
        apart = [b - a for a, b in zip(by["none"], by["backward"], strict=True)]
        found[role] = {**by, "spread_of_seeds": spread, "backward_minus_none": apart}
    shown = [
        [role, *(f"{x:.4f}" for x in (*f["none"], *f["backward"])), f"{f['spread_of_seeds']:.4f}",
         f"{max(map(abs, f['backward_minus_none'])):.4f}"]
        for role, f in found.items()
    ]  # fmt: skip
    columns = ["held-out loss", *(f"{way} {n}" for way in ("none", "backward") for n in range(3))]
    print(common.table([*columns, "spread of seeds", "most apart"], shown))
    return {"steps": 200, "rows": rows, "ends": found}


# Products

SHAPES = {"o_proj": (4096, 4096), "qkv_proj": (12288, 4096), "gate_up_proj": (22016, 4096), "down_proj": (4096, 11008),
          "K 11,008": (11008, 4096)}  # fmt: skip
"""Of LLaMA-2-7B's weights, out and in; the sum of dX runs over the first."""


def products(options: Any, folder: Path) -> dict[str, Any]:
    if why := missing_e4m3(torch.device(options.device)):
        raise SystemExit(why)
    cuda = options.device == "cuda"
    tokens, shapes = (16384, SHAPES) if cuda else (64, {"trial": (96, 64)})
    rows = []
    for name, (outs, ins) in shapes.items():
        dy, weight = (torch.randn(shape, device=options.device).bfloat16() for shape in ((tokens, outs), (outs, ins)))
        weight *= 0.02
        in_codes, transposed = quantize_e4m3(dy), quantize_e4m3(weight.t())
        one = torch.ones((), device=options.device)
        some = slice(0, tokens, max(1, tokens // 64))
        sums = in_codes.codes[some].double() @ transposed.codes.double().t()
        exact = sums * in_codes.scales[some, None].double() * transposed.scales.double()

        def by_row(fast: bool, a=in_codes, b=transposed) -> Tensor:
            return scaled_product(a, b, fast=fast)

        def by_tensor(fast: bool, dtype=torch.bfloat16, a=in_codes.codes, b=transposed.codes, one=one) -> Tensor:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=dtype, use_fast_accum=fast)

        calls: dict[str, tuple[Callable[[], Tensor], Tensor | None]] = {
            "bf16": (lambda dy=dy, weight=weight: linear_dx(dy, weight), dy[some].double() @ weight.double()),
            "e4m3 by tensor": (lambda: by_tensor(False), sums),
            "e4m3 by tensor, fast sums": (lambda: by_tensor(True), sums),
            "to float32": (lambda: by_tensor(False, torch.float32), sums),
            "to float32, fast sums": (lambda: by_tensor(True, torch.float32), sums),
            "e4m3 by row": (lambda: by_row(False), exact),
            "e4m3 by row, fast sums": (lambda: by_row(True), exact),
            "cast apart": (lambda dy=dy: quantize_e4m3(dy).codes, None),
        }
        for way, (call, truth) in calls.items():
            row = {"product": name, "K": outs, "N": ins, "way": way, "us": None, "tflops": None, "error": None}
            try:
                if truth is not None:
                    row["error"] = ((call()[some].double() - truth).norm() / truth.norm()).item()
                taken = common.seconds(call, options.device)
                flops = 2 * tokens * outs * ins / taken / 1e12 if truth is not None else None
                row |= {"us": round(taken * 1e6, 2), "tflops": flops and round(flops, 2)}
            except (RuntimeError, ValueError) as error:
                row["said"] = str(error).strip().splitlines()[0]
            rows.append(row)
    shown = []
    for r in rows:
        figures = ("-" if r[key] is None else f"{r[key]:,.4g}" for key in ("us", "tflops", "error"))
        shown.append([f"{r['product']}, K {r['K']}", r["way"], *figures, r.get("said", "")])
    print(common.table(["dX", "way", "us", "TFLOP/s", "error of sums", ""], shown))
    return {"tokens": tokens, "rows": rows}


PARTS = {"gradients": gradients, "curves": curves, "products": products}


def main() -> int:
    parser = common.parser(__doc__, out="fp8-PART-DEVICE")
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--model", default="builtin:prose-3m", help="of gradients: a base's folder")
    parser.add_argument("--groups", type=int, default=3, help="of gradients: new blocks")
    parser.add_argument("--steps", type=int, default=20, help="of gradients: steps before they are measured")
    options = parser.parse_args()
    name = f"-{Path(options.model).name.lower()}" if options.part == "gradients" and ":" not in options.model else ""
    with tempfile.TemporaryDirectory() as folder:
        found = PARTS[options.part](options, Path(folder))
    out = options.out or common.result_file(f"fp8-{options.part}{name}", common.device_name(options.device))
    common.write_json(out, common.provenance(options.device) | found)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
