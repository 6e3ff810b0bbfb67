#!/usr/bin/env bash
# One part of what a machine with a GPU should run: bench/suite.sh tests|kernels|train|throughput|memory|quickstart
#
#   tests        the tests of the kernels and of the block, natively
#   kernels      every op by the clock, beside eager PyTorch, torch.compile, and Liger and quack where installed
#   train        train, kill, resume, compare bit for bit
#   throughput   ours against Hugging Face; on a GPU the sizes 1b and 7b, else tiny
#   memory       what a step holds: ours and others, and the plan beside what is measured along six axes
#   quickstart   `python -m llama_pro_fast.train` without options, by the clock
#
# Each part ends within 470 s, needs no network, no installation and no git (say COMMIT=... where there is none), and
# leaves a few small files in OUT (by default bench/results). PYTHON names the interpreter.
set -euo pipefail

part=${1:-}
case $part in
    tests | kernels | train | throughput | memory | quickstart) ;;
    *)
        echo "usage: bench/suite.sh tests|kernels|train|throughput|memory|quickstart" >&2
        exit 2
        ;;
esac

# Once more under a limit, so that the limit is for the whole part and what it started ends with it.
if [[ -z ${SUITE_LIMITED:-} ]]; then
    SUITE_LIMITED=1 exec timeout --kill-after=5 470 bash "$0" "$part"
fi

# OUT is the caller's path, so before the change of folder.
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
cuda=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')

case $part in
    tests)
        {
            "$python" bench/common.py
            "$python" -m pytest kernels tests/model/test_block_gradients.py -q -p no:cacheprovider --durations=5
        } 2>&1 | tee "$OUT/tests-kernels.txt"
        ;;
    kernels)
        if [[ $cuda == 1 ]]; then device=cuda; else device=cpu; fi
        "$python" bench/ops.py --device "$device" --out "$OUT/kernels.json"
        ;;
    train)
        "$python" bench/train_resume.py --out "$OUT/train-resume.json"
        ;;
    throughput)
        if [[ $cuda == 1 ]]; then sizes="1b 7b"; else sizes=tiny; fi
        for size in $sizes; do
            "$python" bench/throughput.py --size "$size" --out "$OUT/throughput-$size.json"
        done
        ;;
    memory)
        "$python" bench/scaling.py --out "$OUT/scaling.json" --picture "$OUT/scaling.png"
        "$python" bench/memory.py --out "$OUT/memory.json" --picture "$OUT/memory.png"
        ;;
    quickstart)
        "$python" bench/quickstart.py --out "$OUT/quickstart.json"
        ;;
esac
