#!/usr/bin/env bash
# One part of what a machine with a GPU should run: bench/suite.sh PART
# docs/gpu.md says what the parts do. Each ends within 470 s, needs no network, no installation and no git (say
# COMMIT=... where there is none), and leaves a few small files in OUT (by default bench/results). PYTHON names the
# interpreter.
set -euo pipefail

part=${1:-} parts="tests|kernels|train|throughput|close|sizes|memory|profile|quickstart|forgetting|ranks|fp8-products|fp8-close|fp8-rivals"
if [[ ! $part =~ ^($parts)$ ]]; then
    echo "usage: bench/suite.sh $parts" >&2
    exit 2
fi

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
measure() { "$python" bench/throughput.py --size "$2" --limit 60 --out "$OUT/throughput-$1.json" "${@:3}"; }

if [[ $cuda == 0 && ($part == close || $part == sizes || $part == fp8-close || $part == fp8-rivals) ]]; then
    echo "bench/suite.sh $part: its models are for a GPU, and PyTorch finds none" >&2
    exit 2
fi
best=ours,hf-liger-flash4-bf16,hf-liger-bf16 best_rival=hf-liger-flash4-bf16

case $part in
    tests)
        {
            "$python" bench/common.py
            # Workers that each take all threads of the machine wait for each other.
            if "$python" -c "import xdist" 2>/dev/null; then
                workers=(-n 8)
                export OMP_NUM_THREADS=$((($(nproc) + 7) / 8))
            else
                workers=()
            fi
            "$python" -m pytest kernels tests/model/test_block_gradients.py tests/model/test_block_eight_bits.py -q \
                -p no:cacheprovider --durations=5 \
                "${workers[@]}"
        } 2>&1 | tee "$OUT/tests-kernels.txt"
        ;;
    kernels)
        "$python" bench/ops.py --out "$OUT/kernels.json"
        ;;
    train)
        "$python" bench/train_resume.py --out "$OUT/train-resume.json"
        ;;
    throughput)
        if [[ $cuda == 1 ]]; then
            measure 7b 7b --budget 400
        else
            measure tiny tiny
            measure cpu cpu
        fi
        ;;
    close)
        measure 7b-close 7b --rounds 3 --contestants $best,hf-compile-bf16 --budget 250
        measure 7b-packed 7b --document 1024 --contestants $best,hf-liger-flash4 --budget 90
        ;;
    fp8-products)
        "$python" bench/fp8.py products --out "$OUT/fp8-products.json"
        "$python" bench/fp8.py gradients --out "$OUT/fp8-gradients.json" # the packaged base
        ;;
    fp8-close)
        measure 7b-fp8-close 7b --rounds 5 --steps 10 --contestants ours,ours-fp8,$best_rival --budget 330
        "$python" bench/step_profile.py --size 7b --contestant ours-fp8 --out "$OUT/step-profile-fp8.json"
        ;;
    fp8-rivals)
        fp8=hf-compile-fp8-bf16,hf-compile-fp8-rowwise-bf16,hf-liger-flash4-compile-fp8-bf16
        "$python" bench/throughput.py --size 7b --limit 120 --budget 340 --out "$OUT/throughput-7b-fp8.json" \
            --contestants "ours-fp8,hf-compile-bf16,$fp8,hf-liger-flash4-compile-fp8-rowwise-bf16"
        ;;
    sizes)
        measure 7b-32k 7b --seq 32768 --micro-batch 1 --steps 3 --contestants ours-planned --budget 50
        measure 8b 8b --contestants $best,hf-liger --budget 110
        measure 1b 1b --contestants $best,hf-liger --budget 110
        ;;
    memory)
        "$python" bench/scaling.py --out "$OUT/scaling.json"
        "$python" bench/memory.py --out "$OUT/memory.json"
        ;;
    profile)
        if [[ $cuda == 1 ]]; then size=7b; else size=tiny; fi
        "$python" bench/step_profile.py --size $size --out "$OUT/step-profile.json" --trace "$OUT/step-profile.trace.json.gz"
        ;;
    ranks)
        "$python" bench/ranks.py --out "$OUT/ranks.json"
        ;;
    quickstart)
        "$python" bench/quickstart.py --out "$OUT/quickstart.json"
        ;;
    forgetting)
        size=$([[ $cuda == 1 ]] && echo gpu || echo cpu)
        cp -n "bench/results/forgetting-$size.json" "$OUT/" 2>/dev/null || true # goes on with what is missing
        "$python" bench/forgetting.py --size $size --budget 420 --work "${WORK:?with base/ and texts/, see docs/gpu.md}" \
            --out "$OUT/forgetting-$size.json"
        ;;
esac
