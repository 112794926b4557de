#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and benchmarks of this checkout on a GPU machine, in one command; `bench/gpu.sh --help`.
set -u

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh [--device cuda|cpu] [--ops LIST] [--quick] [--tune] [--sanitize] [--profile] [--no-tests] [--no-bench]
                    [--wheels DIR] [--help]

Runs the GPU tests from this checkout, then the benchmarks, the most important first, and ends with what failed and how
fast each op is. Needs a Python with torch, triton, pytest, matplotlib and tqdm, and no network; with pytest-xdist the
tests run in eight processes. Without diffusers what needs the U-Net is left out, and the summary says so. Ends within
nine minutes.

  --device cpu   the same steps on a CPU, as a test of this script (tiny shapes)
  --ops LIST     only these of "attn norm conv unet", in benchmarks, --sanitize and --profile (which leave unet out)
  --quick        fewer samples, fewer batch sizes
  --tune         after the tests, bench/tune.py: better configurations of the kernels for this GPU
  --sanitize     after the benchmarks, compute-sanitizer memcheck and racecheck on small cases of every kernel
  --profile      after those, Nsight Compute on our kernels (clocks left alone)
  --no-tests, --no-bench    leave that step out
  --wheels DIR   use the packages in DIR that this Python lacks, out of a folder that goes again; default .whl, if there.
                 With the PY and PLATFORM of the GPU machine, such as 3.12 and manylinux_2_28_x86_64:
                 pip download -d .whl --no-deps --only-binary=:all: --python-version PY --platform PLATFORM diffusers av \
                   requests charset-normalizer urllib3 idna certifi regex importlib_metadata zipp

environment: OUT (out) where gpu.log, the benchmarks' main JSON files, and results.tar.gz with everything go; DEADLINE_S
(530) seconds for everything; PYTHON (python3); WORKERS (8) processes of the tests; SANITIZE_CASES, an expression of
pytest's -k, to choose among the cases of --sanitize
exit status: 0, or 1 if any step failed; a failed step does not stop the later ones
TEXT
}

device=cuda ops="attn norm conv unet" quick=0 tune=0 sanitize=0 profile=0 tests=1 bench=1 wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:-}; shift ;;
        --ops) ops=${2:-}; shift ;;
        --wheels) wheels=${2:-}; [ -d "$wheels" ] || { echo "gpu.sh: --wheels is '$wheels'; expected a folder" >&2; exit 2; }
            wheels=$(cd "$wheels" && pwd); shift ;;
        --quick) quick=1 ;;
        --tune) tune=1 ;;
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
[ -n "$wheels" ] || [ ! -d .whl ] || wheels=$root/.whl
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
log=$out/gpu.log
: >"$log"
# Results are written here, and bundled after each step: who runs out of time keeps what there is, in few files.
work=$(mktemp -d) && mkdir "$work/results" "$work/site" || exit 2
trap 'rm -rf "$work"' EXIT
results=$work/results
export PYTHONUNBUFFERED=1
errors=0
summary=()

say() { printf '%s\n' "$*" | tee -a "$log"; }

bundle() {
    local op name
    for name in attn norm conv unet; do
        op=$results/$name-$device.json
        [ ! -s "$op" ] || cp "$op" "$out/"
    done
    [ ! -s "$results/tune.json" ] || cp "$results/tune.json" "$out/"
    tar -C "$work" -czf "$work/results.tar.gz" results && mv "$work/results.tar.gz" "$out/results.tar.gz"
}

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
    # An interrupt, as from the keyboard: pytest then still says what it found.
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tr '\r' '\n' \
        | grep --line-buffered -v 'case/s\|s/case\|?case' | tee -a "$log" "$work/step.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("ok       $name ($((SECONDS - start)) s)") ;;
        124 | 137) summary+=("TIMEOUT  $name (after $limit s)") ;;
        *) summary+=("FAILED   $name (status $status, $((SECONDS - start)) s): $(tail -n 1 "$work/step.log" | cut -c 1-200)") ;;
    esac
    rm -f "$work/step.log"
    [ "$status" -eq 0 ] || errors=$((errors + 1))
    bundle
    return "$status"
}

skip() { # NAME REASON: what was asked for and cannot run is no success
    summary+=("SKIPPED  $1: $2")
    errors=$((errors + 1))
}

# bench OP-NAME SECONDS ARGUMENTS...: one run of a benchmark; a run cut short has its JSON, so the picture is drawn from it.
bench() {
    local name=$1 limit=$2 op=${1%%-*}
    shift 2
    case " $ops " in *" $op "*) ;; *) return ;; esac
    if [ "$op" = unet ] && [ "$has_diffusers" -eq 0 ]; then
        summary+=("SKIPPED  $name: $no_diffusers")
        return
    fi
    step "$name" "$limit" "$python" "bench/$op.py" --no-gate --device "$device" --json "$results/$name.json" "$@"
    if [ -s "$results/$name.json" ] && [ ! -s "$results/$name.png" ]; then
        step "$name picture" 30 "$python" bench/plot.py "$results/$name.json" "$results/$name.png"
    fi
}

# What is on the GPU needs no CPU extension, and minutes of a GPU are no time to compile one.
install() {
    local at
    at=$(cd / && "$python" -c 'import mmattn, os; print(os.path.dirname(os.path.dirname(mmattn.__file__)))' 2>/dev/null)
    if [ "$at" = "$root" ]; then
        say "mmattn is installed from this checkout already"
        return
    fi
    if [ "$device" = cpu ] && step install 150 \
        "$python" -m pip install -q --no-build-isolation --no-deps --disable-pip-version-check -e .; then
        return
    fi
    say "running from the source tree, without the CPU extension"
    export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
}

# Into a folder before all others on the path: so of packages that are there already, none.
install_wheels() {
    [ -n "$wheels" ] || return
    local wheel name wanted=()
    for wheel in "$wheels"/*.whl; do
        name=$(basename "$wheel")
        "$python" -c 'import sys; from importlib.metadata import version; version(sys.argv[1])' "${name%%-*}" 2>/dev/null \
            || wanted+=("$wheel")
    done
    if [ ! -e "$wheel" ] || [ ${#wanted[@]} -eq 0 ]; then
        say "no wheel in $wheels is wanted"
        return
    fi
    step wheels 60 "$python" -m pip install -q --no-deps --no-index --disable-pip-version-check --target "$work/site" \
        "${wanted[@]}" && export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
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

run_tests() { # NAME SECONDS ARGUMENTS...: a test that hangs tells where, and a process that dies is replaced
    local name=$1 limit=$2 in_parallel=()
    shift 2
    if "$python" -c 'import xdist' 2>/dev/null; then
        in_parallel=(-n "${WORKERS:-8}" --dist loadgroup --max-worker-restart 16)
    fi
    # Inductor would start a compiling process for each core in each of these.
    pytest_step "$name" "$limit" env TORCHINDUCTOR_COMPILE_THREADS=2 "$python" -m pytest --tb=short -rfE \
        -o faulthandler_timeout=90 -p no:cacheprovider --continue-on-collection-errors --durations=8 --junitxml "$results/${name// /-}.xml" "${in_parallel[@]}" "$@"
}

run_sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        skip sanitize "compute-sanitizer is not on the PATH"
        return
    fi
    local tool op cases=()
    local -A files=([attn]=attention [norm]=norm [conv]=conv)
    for op in $ops; do
        [ "$op" = unet ] || cases+=("tests/test_${files[$op]}_triton.py") # its kernels are those of the others
    done
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else one allocation of torch's pool hides accesses past the end of a tensor
    for tool in memcheck racecheck; do
        # Our kernels alone: their names begin with an underscore and a letter in lower case, C++'s with _Z.
        pytest_step "$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
            --kernel-regex 'kns=^_[a-z]' "$python" -m pytest --tb=short -x -p no:cacheprovider -p no:xdist \
            -m "gpu and sanitize" -k "${SANITIZE_CASES:-test}" "${cases[@]}"
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

run_profiler() {
    if ! command -v ncu >/dev/null; then
        skip profile "ncu is not on the PATH"
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
            --no-gate --rounds 3 --no-memory "${what[@]}" --json "$work/profiled/$op.json" # whose times are of no use
    done
}

say "$(date -u +%FT%TZ) $(uname -m) $("$python" --version 2>&1) at $python"
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader 2>&1 | tee -a "$log"
install
install_wheels
has_diffusers=0 no_diffusers="diffusers is not there (--wheels DIR brings it)"
! "$python" -c 'import diffusers' 2>/dev/null || has_diffusers=1
step "what is here" 60 "$python" -c 'import torch, mmattn; print("torch", torch.__version__, "cuda", torch.cuda.is_available(), "mmattn", mmattn.__file__)'

if [ "$device" = cpu ]; then
    [ $tests -eq 0 ] || run_tests tests 90 tests/test_bench.py -k "peer or harness"
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
    if [ $tests -eq 1 ]; then
        run_tests tests 230 -m gpu tests
        [ "$has_diffusers" -eq 1 ] || summary+=("SKIPPED  tests of the U-Net and the pipeline: $no_diffusers")
    fi
    [ $tune -eq 0 ] || step tune 240 "$python" bench/tune.py --budget-s 200 --out-tables "$results" --json "$results/tune.json"
    if [ $bench -eq 1 ]; then
        rest=(--modes forward both)
        if [ $quick -eq 1 ]; then
            bench attn-cuda 120 --quick --dtype bfloat16 --batch 1 4 --providers mmattn "SDPA over views" "full SDPA"
            bench norm-cuda 60 --quick --dtype bfloat16 --batch 1 4
            bench conv-cuda 90 --quick --dtype bfloat16 --batch 4
            bench unet-cuda 90 --quick --shapes published --dtype bfloat16 --batch 1 --breakdown
        else
            bench attn-cuda 120 "${rest[@]}" --dtype bfloat16 --batch 1 4 16 --budget 0.4 \
                --providers mmattn "SDPA over views" "SDPA over copies" "full SDPA" "frame loop"
            bench unet-cuda 110 "${rest[@]}" --dtype float16 --batch 1 4 --budget 1 --breakdown \
                --providers published mmdiffusion "published, half" "mmdiffusion, CUDA graph"
            # torch.compile takes longer than all the rest.
            bench conv-cuda 110 "${rest[@]}" --dtype bfloat16 --batch 4 16 --budget 0.3 \
                --providers eager mmattn "eager, channels last"
            bench norm-cuda 60 "${rest[@]}" --dtype bfloat16 --batch 1 4 16 --budget 0.3 \
                --providers eager mmattn "eager, channels last"
            # What is left of the time; --ops attn gives these the whole of it.
            bench attn-cuda-half-single 60 "${rest[@]}" --dtype float16 float32 --batch 4 --budget 0.4 \
                --providers mmattn "SDPA over views" "full SDPA"
            bench attn-cuda-graphs 40 "${rest[@]}" --dtype bfloat16 --batch 1 --budget 0.3 --graphs --no-memory \
                --providers mmattn "SDPA over views"
            # FlexAttention compiles anew for each shape and direction, so it has a run of its own, of few cases.
            bench attn-cuda-flex 120 "${rest[@]}" --dtype bfloat16 --batch 4 --budget 0.4 \
                --providers mmattn "SDPA over views" FlexAttention
            bench norm-cuda-compile 60 "${rest[@]}" --dtype bfloat16 --batch 1 --budget 0.3 --no-memory \
                --providers eager mmattn torch.compile
            bench conv-cuda-compile 120 "${rest[@]}" --dtype bfloat16 --batch 4 --budget 0.3 --no-memory \
                --providers eager mmattn torch.compile
        fi
    fi
    [ $sanitize -eq 0 ] || run_sanitizer
    [ $profile -eq 0 ] || run_profiler
fi

bundle
say "== after $SECONDS s"
for line in "${summary[@]}"; do say "$line"; done
say "$errors errors; results in $out"
shopt -s nullglob
"$python" bench/digest.py --characters 9000 --tests "$results"/*.xml -- "$results"/*-"$device"*.json 2>&1 | tee -a "$log"
[ "$errors" -eq 0 ]
