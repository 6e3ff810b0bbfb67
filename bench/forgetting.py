"""What a method gains in a domain and forgets elsewhere: methods at equal tokens, on a real base.

    python tools/gguf_base.py SmolLM2-135M-Instruct.Q4_1.gguf WORK/base
    python bench/forgetting.py --work WORK --root ROOT --budget 3600

The base is SmolLM2-135M-Instruct, the domain German, which it hardly knows (tools/forgetting_texts.py makes the texts).
Every method sees the same tokens in the same order, in as many steps, computed in bfloat16 from float32 weights, and
each has rates of its own. Models are kept and measured in float32: rounded to bfloat16, a weight that moved by less
than the rounding is back at the base's, which costs full fine-tuning at small rates a part of its gain.

    expansion   six new blocks, one after every fifth block
    upper       six new blocks in the upper half
    muon        as expansion, matrices by Muon
    taught      as expansion, with KL to the base on what is replayed
    full        full fine-tuning; merged with its base in the picture of the dials
    blocks      the six highest blocks of the base, as many parameters as six new ones
    lora-70     PEFT's LoRA on every linear layer, as many parameters; lora-256 of the rank that is recommended
    english     as expansion, on nothing but the text for replay: what any training does to this base

First every method once with a fifth of each step replayed, then two more rates of the four that are compared. Of the
best rate (most gained less forgotten) two more seeds, a run without replay, and the dial: new blocks times A, or the
weights A of the way from the base; and new blocks without replay at a rate at which they forget, with their dial. Last
the other methods' rates. A run is a row of the result, which is read back: a bench that was stopped goes on with what
is missing.

On a CPU two benches of one thread each (OMP_NUM_THREADS=1) do a third more than one of two threads: each with --methods
and --out of its own, and --join brings their rows together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pro_fast import train
from llama_pro_fast.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.files import new_folder
from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.alternatives import lora_estimate
from llama_pro_fast.planning.cost import step_cost
from llama_pro_fast.planning.job import Job, expanded_shape
from llama_pro_fast.training.export import export_run
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.schedule import settle_schedule
from llama_pro_kernels import select_attention_backend

sys.path.insert(0, str(common.ROOT / "tools"))
from forgetting_rows import COLUMNS, METHODS, REPLAY, Asked, Method, draw, summary, wanted
from forgetting_texts import DOMAIN, GENERAL, LEARNED, REPLAYED, write_texts

SEQ_LEN, BATCH, DTYPE = 512, 4, torch.bfloat16
SIZES = {"cpu": 65_536, "cpu-long": 262_144, "gpu": 4_194_304}
"""Tokens of a run."""
MEASURED = 4096
"""Tokens of each text."""
SPAWN = multiprocessing.get_context("spawn")


class Bench:
    """The runs of one size, in a folder that keeps texts, runs and rows.

    Args:
        out: the rows, read back if they are there.
    """

    def __init__(self, size: str, work: Path, out: Path) -> None:
        self.steps = SIZES[size] // (SEQ_LEN * BATCH)
        self.base, self.texts, self.work, self.out = work / "base", work / "texts", work, out
        self.rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
        self.digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(self.texts.iterdir()))).hexdigest()
        if self.rows and self.rows[0]["texts"] != self.digest:
            raise SystemExit(f"{out}: its rows are of other texts than {self.texts}: give another --out")

    def row(self, asked: Asked | None) -> None:
        """Do a run, or with None measure the base, and keep its row."""
        started, device = time.perf_counter(), common.provenance(common.found_device("auto"))
        if asked is None:
            facts, folder = {"method": "base", "texts": self.digest}, self.base
        else:
            facts = {**vars(asked), "gflop": gflop_per_token(METHODS[asked.method], PretrainedFolder(self.base).config)}
            folder = self.trained(asked) if asked.scale == 1 else self.between(asked)
            facts["seconds"] = round(time.perf_counter() - started, 1)
        self.rows.append(facts | {"loss": self.losses(folder)} | device)
        common.write_json(self.out, self.rows)

    def folder(self, asked: Asked) -> Path:
        return self.work / f"{asked.method}-{asked.rate:g}-replay-{asked.replay:g}-seed-{asked.seed}"

    def config(self, asked: Asked) -> RunConfig:
        method, english = METHODS[asked.method], asked.method == "english"
        return RunConfig(
            model=ModelConfig(path=str(self.base)),
            expand=method.expand,
            data=DataConfig(
                domain=str(self.texts / f"{REPLAYED if english else LEARNED}.jsonl"),
                general=str(self.texts / f"{REPLAYED}.jsonl"),
                replay=0.0 if english else asked.replay,
                cache=str(self.work / "tokens"),
            ),
            optim=OptimConfig(name=method.optimizer, lr=asked.rate),
            train=TrainConfig(
                seq_len=SEQ_LEN,
                batch_size=BATCH,
                steps=self.steps,
                seed=asked.seed,
                dtype="bfloat16",
                parameters=method.parameters,
                blocks=method.blocks,
                kl_weight=method.kl_weight if asked.replay else 0.0,
            ),
            # Every method's model is measured here, in the same way.
            eval=EvalConfig(every=self.steps, tokens=SEQ_LEN),
            output=str(self.folder(asked)),
        )

    def trained(self, asked: Asked) -> Path:
        """The model that a run makes, as a folder; made before if it is there."""
        folder, config, rank = self.folder(asked), self.config(asked), METHODS[asked.method].rank
        model = folder if rank else folder / "export"
        if not (model / "config.json").exists():
            with SPAWN.Pool(1) as pool:  # so that nothing of a run is left in memory
                if rank:
                    pool.apply(train_lora, (rank, config, folder))
                else:
                    pool.apply(train, (str(folder) if (folder / "config.yaml").exists() else config,))
        return model

    def between(self, asked: Asked) -> Path:
        """A model between the base and a run's: new blocks times the scale; of another method its weights that much of
        the way, which for LoRA is its own scale."""
        run = self.folder(asked)
        folder = self.work / f"{run.name}-scale-{asked.scale:g}"
        if folder.exists():
            return folder
        if METHODS[asked.method].expand.wanted:
            export_run(run, folder, scale=asked.scale)
            return folder
        end = PretrainedFolder(self.trained(asked))
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        for name, weight in model.named_parameters():
            weight.data.lerp_(end.tensor(name).float(), asked.scale)
        save(model, self.base, folder)
        return folder

    def losses(self, folder: Path) -> dict[str, float]:
        """Nats per token on each text."""
        config = PretrainedFolder(folder).config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention = select_attention_backend(device, torch.float32, head_dim=block_spec(config, 0).head_dim)
        model = load_model(PretrainedFolder(folder), device=device, max_length=SEQ_LEN, attention=attention)
        return {name: evaluate(model, self.batches(name)).loss for name in (*DOMAIN, *GENERAL, REPLAYED)}

    @functools.cache  # noqa: B019
    def batches(self, name: str) -> list[PackedBatch]:
        """MEASURED tokens of a text, of each document at most a sequence."""
        rows = [json.loads(line)["text"] for line in (self.texts / f"{name}.jsonl").open(encoding="utf-8")]
        random.Random(0).shuffle(rows)
        tokenizer, documents, left = AutoTokenizer.from_pretrained(self.base), [], MEASURED
        while left > 1:
            documents.append(tokenizer(rows.pop())["input_ids"][: min(SEQ_LEN, left)])
            left -= len(documents[-1])
        return [PackedBatch.from_documents(documents[at : at + 8]) for at in range(0, len(documents), 8)]


def train_lora(rank: int, config: RunConfig, folder: Path) -> None:
    """PEFT's LoRA on the steps that the trainer would make, by its optimizer; saved merged."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    size = {"seq_len": SEQ_LEN, "seed": config.train.seed, "batch_size": BATCH}
    text = Corpus.prepare(config.data, tokenizer, **size, default_general=False).train
    torch.manual_seed(config.train.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=DTYPE).to(device)
    # Alpha is the rank: the adapters' sum as it is. PEFT keeps them in float32.
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(model, trained, settle_schedule(config.optim, config.train.steps), config.train.steps)
    for step in range(config.train.steps):
        batches = [text.batch(step * BATCH + number, 1).to(device) for number in range(BATCH)]
        valid, losses = sum(batch.num_valid for batch in batches), []
        for batch in batches:
            with torch.autocast(device, DTYPE):
                # One row whose positions begin anew: transformers keeps the documents apart by them.
                found = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
            loss = F.cross_entropy(found.logits[0].float(), batch.labels, reduction="sum") / valid
            loss.backward()
            losses.append(loss.detach())
        optimizer.step(step, torch.stack(losses).sum())
    save(model.float().merge_and_unload(), config.model.path, folder)  # a merge in bf16 would round what was learned


def save(model: torch.nn.Module, base: Path | str, folder: Path) -> None:
    """In the dtype of the exports of the others; the folder comes into being whole."""
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)


def gflop_per_token(method: Method, base: Any) -> dict[str, float]:
    """In training, and where it is served; LoRA is merged by then."""
    layers, plan = base.num_hidden_layers, None
    if method.rank:
        job = Job(config=base, trained=Trained.all_of(layers), seq_len=SEQ_LEN)
        training = lora_estimate(job, rank=method.rank, micro_batch_size=1, usable=2**62).cost
    else:
        if method.expand.wanted:
            plan = ExpansionPlan.from_config(layers, method.expand)
        trained = what_trains({}, layers, parameters=method.parameters, blocks=method.blocks, plan=plan, name="")
        base = base if plan is None else expanded_shape(base, plan)
        training = step_cost(base, trained, seq_len=SEQ_LEN, taught=REPLAY if method.kl_weight else 0.0)
    served = step_cost(base, Trained(base.num_hidden_layers, ()), seq_len=SEQ_LEN)
    return {"train": round(training.total / 1e9, 4), "serve": round(served.forward / 1e9, 4)}


def main() -> None:
    parser = common.parser(__doc__, out="forgetting-SIZE-DEVICE", device=False)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, 1 GB each, with the base in base/")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the texts' packages are unpacked")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--methods", default=",".join(METHODS), help="of these only; default: all")
    parser.add_argument("--join", type=Path, nargs="+", default=[], help="other results, whose rows are taken over")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run is begun")
    options = parser.parse_args()
    started, work, methods = time.monotonic(), options.work.resolve(), options.methods.split(",")
    device = common.device_name(common.found_device("auto"))
    if not (work / "texts").exists():
        write_texts(options.root, work / "texts")
    bench = Bench(options.size, work, options.out or common.result_file(f"forgetting-{options.size}", device))
    for path in options.join:
        if not path.exists():
            parser.error(f"--join {path}: there is no such file")
        found = Bench(options.size, work, path).rows
        bench.rows += [row for row in found[bool(bench.rows) :] if row not in bench.rows]
    if not bench.rows and options.budget:
        bench.row(None)
    while time.monotonic() - started < options.budget:
        missing = (run for run in wanted(bench.rows, methods) if not any(run.is_row(row) for row in bench.rows[1:]))
        if (asked := next(missing, None)) is None:
            break
        bench.row(asked)
        print(*summary(bench.rows[:1] + bench.rows[-1:])[0], flush=True)
    if bench.rows:
        common.write_json(bench.out, bench.rows)
        print(common.table(COLUMNS, summary(bench.rows)), "\nlosses in nats per token, work in GFLOP per token")
        draw(bench.rows, common.ROOT / "docs" / "pictures" / f"forgetting-{options.size}.png")


if __name__ == "__main__":
    main()
