#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and benchmarks of this checkout on a GPU machine, in one command; `bench/gpu.sh --help`.
set -u

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh [--device cuda|cpu] [--ops LIST] [--quick] [--sanitize] [--profile] [--no-tests] [--no-bench] [--help]

Installs this checkout without network (or sets PYTHONPATH where pip fails), runs the GPU tests, then the benchmarks.
Needs a Python with torch, triton, pytest, matplotlib and tqdm; works without registry. Ends within nine minutes.

  --device cpu   the same steps on a CPU, as a test of this script (tiny shapes)
  --ops LIST     only these of "attn norm conv unet", in benchmarks, --sanitize and --profile (which leave unet out)
  --quick        fewer samples, fewer batch sizes
  --sanitize     after the benchmarks, compute-sanitizer memcheck and racecheck on small cases
  --profile      after those, Nsight Compute on our kernels (clocks left alone)
  --no-tests, --no-bench    leave that step out

environment: OUT (out) where results, pictures and log go; DEADLINE_S (530) seconds for everything; PYTHON (python3)
exit status: 0, or 1 if any step failed; a failed step does not stop the later ones
TEXT
}

device=cuda ops="attn norm conv unet" quick=0 sanitize=0 profile=0 tests=1 bench=1
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:-}; shift ;;
        --ops) ops=${2:-}; shift ;;
        --quick) quick=1 ;;
        --sanitize) sanitize=1 ;;
        --profile) profile=1 ;;
        --no-tests) tests=0 ;;
        --no-bench) bench=0 ;;
        --help | -h) usage; exit 0 ;;
        *) echo "gpu.sh: unknown argument '$1'" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
case $device in cuda | cpu) ;; *) echo "gpu.sh: --device is '$device'; expected cuda or cpu" >&2; exit 2 ;; esac
for op in $ops; do
    case $op in attn | norm | conv | unet) ;; *) echo "gpu.sh: --ops has '$op'; expected attn, norm, conv or unet" >&2; exit 2 ;; esac
done

cd "$(dirname "$0")/.." || exit 2
root=$PWD
out=${OUT:-out}
python=${PYTHON:-$(command -v python3 || command -v python)}
deadline=${DEADLINE_S:-530}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
log=$out/gpu.log
: >"$log"
export PYTHONUNBUFFERED=1
errors=0
summary=()

say() { printf '%s\n' "$*" | tee -a "$log"; }

# step NAME SECONDS COMMAND...: runs it within its limit and what is left of the deadline, logs it, counts a failure.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status
    shift 2
    if [ "$left" -lt 10 ]; then
        summary+=("SKIPPED  $name: no time left")
        errors=$((errors + 1))
        return 1
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    say "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tr '\r' '\n' | grep --line-buffered -v 'case/s\|s/case\|?case' | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("ok       $name ($((SECONDS - start)) s)") ;;
        124 | 137) summary+=("TIMEOUT  $name (after $limit s)") ;;
        *) summary+=("FAILED   $name (status $status, $((SECONDS - start)) s)") ;;
    esac
    [ "$status" -eq 0 ] || errors=$((errors + 1))
    return "$status"
}

# bench OP-NAME SECONDS ARGUMENTS...: one run of a benchmark; a run cut short has its JSON, so the picture is drawn from it.
bench() {
    local name=$1 limit=$2 op=${1%%-*}
    shift 2
    case " $ops " in *" $op "*) ;; *) return ;; esac
    step "$name" "$limit" "$python" "bench/$op.py" --device "$device" --json "$out/$name.json" "$@"
    if [ -s "$out/$name.json" ] && [ ! -s "$out/$name.png" ]; then
        step "$name picture" 30 "$python" bench/plot.py "$out/$name.json" "$out/$name.png"
    fi
}

install() {
    local at
    at=$(cd / && "$python" -c 'import mmattn, os; print(os.path.dirname(os.path.dirname(mmattn.__file__)))' 2>/dev/null)
    if [ "$at" = "$root" ]; then
        say "mmattn is installed from this checkout already"
        return
    fi
    if ! step install 150 "$python" -m pip install -q --no-build-isolation --no-deps --disable-pip-version-check -e .; then
        say "pip failed: running from the source tree, without the CPU extension"
        export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
    fi
}

pytest_step() { # NAME SECONDS COMMAND...: status 5 says that no test was selected, which is worth a line, not a failure
    local before=$errors
    step "$@"
    if [ $? -eq 5 ]; then
        errors=$before
        summary[${#summary[@]} - 1]="NOTE     $1: no test selected"
        return 5
    fi
}

run_sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        summary+=("SKIPPED  sanitize: compute-sanitizer is not on the PATH")
        errors=$((errors + 1))
        return
    fi
    local tool op small=(--device cuda --shapes small --batch 1 --providers mmattn --modes both)
    small+=(--dtype float32 bfloat16 --rounds 1 --no-memory)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else one allocation of torch's pool hides accesses past the end of a tensor
    for tool in memcheck racecheck; do
        local run=(compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all)
        pytest_step "$tool tests" 150 "${run[@]}" "$python" -m pytest -q -x -m gpu -k "${SANITIZE_CASES:-small}" tests
        if [ $? -eq 5 ]; then
            for op in $ops; do
                [ "$op" != unet ] || continue # its kernels are those of the others
                step "$tool $op" 150 "${run[@]}" "$python" "bench/$op.py" "${small[@]}" --json "$out/sanitized/$op.json"
            done
            rm -rf "$out/sanitized" # times under a sanitizer are of no use
        fi
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

run_profiler() {
    if ! command -v ncu >/dev/null; then
        summary+=("SKIPPED  profile: ncu is not on the PATH")
        errors=$((errors + 1))
        return
    fi
    local op case shape launches what
    # Launches: no fewer than a forward and a backward have, so that as many in a row show each kernel.
    for case in attn:4,4,16,1024,6400,1,64:3 attn:4,8,16,64,400,8,64:3 norm:4,128,25600:8 conv:4,256,256,6400,16:24; do
        IFS=: read -r op shape launches <<<"$case"
        what=()
        [ "$op" != conv ] || what=(--what block)
        case " $ops " in *" $op "*) ;; *) continue ;; esac
        # Our kernels begin with an underscore, which neither torch's nor the compiler's do.
        step "profile $op $shape" 90 ncu --clock-control none --target-processes all \
            --kernel-name 'regex:^_[a-z0-9_]+_kernel' --launch-skip "$launches" --launch-count "$launches" \
            --section SpeedOfLight --section Occupancy --section LaunchStats --section MemoryWorkloadAnalysis \
            --section WarpStateStats --section ComputeWorkloadAnalysis \
            "$python" "bench/$op.py" --device cuda --dtype bfloat16 --shape "$shape" --providers mmattn --modes both \
            --rounds 3 --no-memory "${what[@]}" --json "$out/profiled/$op.json"
        rm -rf "$out/profiled" # nor are times under the profiler
    done
}

say "$(date -u +%FT%TZ) $(uname -m) $("$python" --version 2>&1) at $python"
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader 2>&1 | tee -a "$log"
install
step "what is here" 60 "$python" -c 'import torch, mmattn; print("torch", torch.__version__, "cuda", torch.cuda.is_available(), "mmattn", mmattn.__file__)'

if [ "$device" = cpu ]; then
    [ $tests -eq 0 ] || pytest_step tests 90 "$python" -m pytest -q tests/test_bench.py -k "peer or harness"
    small=(--shapes small)
    [ $quick -eq 0 ] || small+=(--quick)
    if [ $bench -eq 1 ]; then
        bench attn-cpu 120 "${small[@]}"
        bench norm-cpu 90 "${small[@]}"
        bench conv-cpu 150 "${small[@]}"
        bench unet-cpu 120 "${small[@]}" --rounds 2 --breakdown
    fi
    [ $((sanitize + profile)) -eq 0 ] || say "--sanitize and --profile need --device cuda"
else
    [ $tests -eq 0 ] || pytest_step tests 200 "$python" -m pytest -q -m gpu tests
    if [ $bench -eq 1 ]; then
        rest=(--modes forward both)
        if [ $quick -eq 1 ]; then
            bench attn-cuda 120 --quick --dtype bfloat16 --batch 1 4 --providers mmattn "SDPA over views" "full SDPA"
            bench norm-cuda 60 --quick --dtype bfloat16 --batch 1 4
            bench conv-cuda 90 --quick --dtype bfloat16 --batch 4
            bench unet-cuda 90 --quick --shapes published --dtype bfloat16 --batch 1 --breakdown
        else
            bench attn-cuda 150 "${rest[@]}" --dtype bfloat16 --batch 1 4 16 --budget 0.4 \
                --providers mmattn "SDPA over views" "SDPA over copies" "full SDPA" "frame loop"
            bench norm-cuda 80 "${rest[@]}" --dtype bfloat16 --batch 1 16 --budget 0.3
            bench conv-cuda 160 "${rest[@]}" --dtype bfloat16 --batch 4 --budget 0.3
            bench unet-cuda 120 "${rest[@]}" --dtype bfloat16 --batch 1 4 --budget 1 --breakdown \
                --providers release mmdiffusion "release, autocast" "mmdiffusion, CUDA graph"
            # What is left of the time; --ops attn gives these the whole of it.
            bench attn-cuda-half-single 60 "${rest[@]}" --dtype float16 float32 --batch 4 --budget 0.4 \
                --providers mmattn "SDPA over views" "full SDPA"
            bench attn-cuda-graphs 40 "${rest[@]}" --dtype bfloat16 --batch 1 --budget 0.3 --graphs --no-memory \
                --providers mmattn "SDPA over views"
            # FlexAttention compiles anew for each shape and direction, so it has a run of its own, of few cases.
            bench attn-cuda-flex 120 "${rest[@]}" --dtype bfloat16 --batch 4 --budget 0.4 \
                --providers mmattn "SDPA over views" FlexAttention
        fi
    fi
    [ $sanitize -eq 0 ] || run_sanitizer
    [ $profile -eq 0 ] || run_profiler
fi

say "== after $SECONDS s"
for line in "${summary[@]}"; do say "$line"; done
say "$errors errors; results in $out"
[ "$errors" -eq 0 ]
