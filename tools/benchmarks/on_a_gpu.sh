#!/bin/bash
# All tests and benchmarks that need a GPU, in parts of at most ten minutes each.
#
#   bash tools/benchmarks/on_a_gpu.sh RESULTS PART [KEY VALUE ...]
#
#   tests    the tests marked gpu, also those marked slow
#   speed    data, step and evaluation compared with plain loops; a profile (kernels.txt, trace.json)
#   compile  step and profile with RUNTIME.COMPILE; larger batches
#   search   step with RUNTIME.CUDNN_BENCHMARK, in eager mode and compiled
#   memory   recomputed activations, half the batch, scores at the size of two data sets
#   whole    the demo, and attacks on it
#   train    the three published trainings with the given keys (DATASETS.NAMES, DATASETS.ROOT_DIR,
#            SOLVER.MAX_EPOCHS ...); each resumes from an earlier call
#
# Each command writes a log and a JSON file to RESULTS when it ends. PYTHON is the interpreter.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,15s/^# \?//p' "$0"; exit 2; }
results=$(mkdir -p "$1" && cd "$1" && pwd) part=$2
shift 2
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
bench=("$python" tools/benchmark.py)
failed=0

measure() { # NAME SECONDS COMMAND...: run it for at most SECONDS; log to RESULTS/NAME.log
    local name=$1 limit=$2 code
    shift 2
    echo "== $name: $*"
    timeout --kill-after 10 "$limit" "$@" > "$results/$name.log" 2>&1
    code=$?
    tail -n 8 "$results/$name.log"
    echo "$name $code" >> "$results/exit_codes.txt"
    [ $code -eq 0 ] || failed=1
}

step() { # NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    measure "$name" "$limit" "${bench[@]}" step --device cuda --json "$results/$name.json" "$@"
}

train() { # NAME KEY VALUE...: at most 190 seconds; the same call resumes
    local name=$1 resume=False
    shift
    [ -e "$results/$name/checkpoint_latest.pth" ] && resume=True
    measure "train_$name" 190 "$python" tools/main.py --config_file=configs/AGW_baseline.yml \
        OUTPUT_DIR "$results/$name" SOLVER.RESUME $resume "$@"
}

case $part in
tests)
    measure gpu_tests 300 "$python" -m pytest -q -m "gpu and not slow" -p no:cacheprovider
    measure gpu_slow_tests 280 "$python" -m pytest -q -m "gpu and slow" -p no:cacheprovider
    ;;
speed)
    step step 120 RUNTIME.COMPILE off
    measure data 150 "${bench[@]}" data --device cuda --json "$results/data.json"
    measure eval 120 "${bench[@]}" eval --device cuda --json "$results/eval.json"
    measure eval_aead 80 "${bench[@]}" eval --device cuda --json "$results/eval_aead.json" \
        ISED.SCHEME aead
    measure profile 90 "${bench[@]}" step --device cuda --profile "$results/profile" \
        RUNTIME.COMPILE off
    ;;
search)
    step step_searched 240 RUNTIME.COMPILE off RUNTIME.CUDNN_BENCHMARK True
    step step_searched_compiled 350 RUNTIME.COMPILE on RUNTIME.CUDNN_BENCHMARK True
    ;;
compile)
    step step_compiled 300 RUNTIME.COMPILE on
    measure profile_compiled 150 "${bench[@]}" step --device cuda \
        --profile "$results/profile_compiled" RUNTIME.COMPILE on
    step step_160 120 --batch 160 RUNTIME.COMPILE off
    ;;
memory)
    step step_recomputed 120 SOLVER.GRAD_CHECKPOINT True RUNTIME.COMPILE off
    step step_40 90 --batch 40 RUNTIME.COMPILE off
    measure market 90 "${bench[@]}" retrieval --device cuda --size market \
        --json "$results/market.json"
    measure msmt17 150 "${bench[@]}" retrieval --device cuda --size msmt17 \
        --json "$results/msmt17.json"
    ;;
whole)
    measure demo 300 "$python" tools/demo.py --output "$results/demo"
    measure attack 280 "$python" tools/attack.py --checkpoint "$results/demo/full" \
        --output "$results/attacks" --budget 256 --epochs 8 --people 16
    ;;
train)
    train base "$@" MODEL.MODE C
    train without "$@"
    train full "$@" MODEL.VAL_R1 0.75
    ;;
*)
    echo "error: PART is '$part'; expected tests, speed, compile, search, memory, whole or train" >&2
    exit 2
    ;;
esac
exit $failed
