#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes: the kernel tests on the device, the log-prob
# benchmark, the gather kernels, the host loop's tile sizes, the 4-bit layer, the DPO step where its
# packages are.
#
#     OUT=folder bash benchmarks/gpu.sh        # JSON and logs go to OUT, or benchmarks/results
#
# Needs torch, triton and transformers, no network. Peers come as wheels in ./wheels, if that folder
# is there; one that cannot be imported is recorded as absent. Every part has a time limit, and JSON
# is written after each figure, so what was measured before a limit stays.
# Exit: 0 all parts ran, 1 one failed or ran out of time, 2 no GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
total=530
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $python finds no GPU through torch on this machine, so nothing was run."
    exit 2
fi
mkdir -p "$out"
failed=()
SECONDS=0

has() { # whether all these modules can be imported
    "$python" - "$@" 2>/dev/null <<'PY'
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
PY
}

part() { # name, seconds at most, command: runs it, with less time if less is left
    local name=$1 limit=$2 left=$((total - SECONDS))
    shift 2
    if ((left < 10)); then
        echo "=== $name: left out, no time"
        failed+=("$name")
        return
    fi
    ((limit > left)) && limit=$left
    echo "=== $name: at most $limit s, began at $SECONDS s"
    timeout -k 5 "$limit" "$@"
    local code=$?
    ((code == 124 || code == 137)) && echo "$name: stopped at its limit of $limit s"
    ((code == 0)) || failed+=("$name ($code)")
    echo "=== $name: ended with $code at $SECONDS s"
}

if compgen -G 'wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # One by one: a wheel that does not fit this Python must not keep the others away.
    for wheel in wheels/*.whl; do
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheel" ||
            echo "wheel not installed: $wheel"
    done
    export PYTHONPATH="$PYTHONPATH:$site"
else
    echo "no wheels/*.whl: peers that are not installed here will be recorded as absent"
fi

"$python" - <<'PY'
import importlib.metadata as m, platform, torch
def of(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return "absent"
print(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0), "Python", platform.python_version())
print(", ".join(f"{n} {of(n)}" for n in ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")))
PY

run_tests() { # log in $out/gpu_kernel_tests.txt
    local workers=()
    has xdist && workers=(-n 8)
    timeout -k 5 "$1" "$python" -m pytest tests/test_kernels_*.py tests/test_logprobs.py -q \
        -p no:cacheprovider -W default --durations=5 "${workers[@]}" >"$out/gpu_kernel_tests.txt" 2>&1
    local code=$?
    tail -n 30 "$out/gpu_kernel_tests.txt"
    return $code
}
export -f run_tests has
export python out

if ! compgen -G 'tests/test_kernels_*.py' >/dev/null; then
    echo "kernel tests: left out, no tests/test_kernels_*.py"
elif has pytest hypothesis; then
    part "kernel tests" 150 bash -c 'run_tests 145'
else
    echo "kernel tests: left out, they need pytest and hypothesis"
fi

bench() { "$python" benchmarks/bench_logprob.py --device cuda "$@"; }
export -f bench

part "gather" 45 bash -c 'bench --parts gather --budget 35 --out "$out/gpu_gather.json"'
part "4-bit" 40 "$python" benchmarks/bench_nf4.py --device cuda --parts linear dequantise quantise \
    --rounds 5 --shortest 0.005 --out "$out/gpu_nf4.json"
part "log-probs" 215 bash -c \
    'bench --parts time error recompile --budget 195 --out "$out/gpu_logprob.json"'
part "tiles" 45 bash -c 'bench --parts tiles --dtypes bfloat16 --heads frozen trained --entropy no \
    --rows 8192 --tile_cases 8 --case_seconds 2 --budget 35 --out "$out/gpu_tiles.json"'

data=
for file in shared/data/hh_harmless.jsonl.gz ../shared/data/hh_harmless.jsonl.gz; do
    [[ -f $file ]] && data=$file
done
if [[ -n $data ]] && has trl peft datasets tokenizers accelerate; then
    # Both sides of that comparison run on the processor.
    part "DPO step" 60 "$python" benchmarks/bench_dpo_step.py "$data" --rounds 1 --steps 1 \
        --dtypes bfloat16 --out "$out/gpu_machine_dpo_step.json"
else
    echo "DPO step: left out, it needs trl, peft, datasets, tokenizers, accelerate and the pairs"
fi

echo "took $SECONDS s; results in $out"
if ((${#failed[@]})); then
    printf 'not complete: %s\n' "${failed[@]}"
    exit 1
fi
