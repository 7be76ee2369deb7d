#!/usr/bin/env bash
# Everything that needs a GPU, on a bare CUDA machine and without network: build, `pytest -m gpu`,
# compute-sanitizer, the benches. Leaves rows, pictures, a log and a summary in a folder.
#
#   bench/gpu.sh OUT             all of that, in under 9 minutes
#   bench/gpu.sh --profile OUT   build, and look at the scatter kernels with ncu
#
# Wants torch, pybind11, CMake, and pytest, hypothesis, typer and rich; pip and scikit-build-core
# where they are. What is missing is named, and its step fails; the others run nevertheless. Without
# a repository, the commit can be named in HOTGRAFT_COMMIT.
set -uo pipefail

profile=
if [ "${1:-}" = --profile ]; then
    profile=yes
    shift
fi
if [ $# -ne 1 ]; then
    echo "usage: bench/gpu.sh [--profile] OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TMPDIR="$work" TRITON_CACHE_DIR="$work/triton" XDG_CACHE_HOME="$work/cache" CUDA_CACHE_PATH="$work/nv"
log="$out/log.txt"
: >"$log"
summary=()
failed=0
TOTAL=525 # seconds for all steps together

# step SECONDS NAME COMMAND...: run it under a time limit, note how it ended, go on.
step() {
    local limit=$1 name=$2 begin=$SECONDS status left=$((TOTAL - SECONDS))
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -le 0 ]; then
        absent "$name" "no time is left"
        return
    fi
    printf '\n==== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed=1
    note "$status" "$((SECONDS - begin)) s" "$name"
}

note() { summary+=("$(printf '%-4s %6s  %s' "$1" "$2" "$3")"); }

absent() { # absent NAME WHY: a step that cannot run
    printf '\n==== %s: %s\n' "$1" "$2" | tee -a "$log"
    failed=1
    note 127 "0 s" "$1: $2"
}

find_tool() { # find_tool NAME: on the PATH, or where Nsight Compute and the toolkit are put
    command -v "$1" && return
    local path
    for path in /opt/nvidia/nsight-compute/*/"$1" /usr/local/cuda*/bin/"$1"; do
        [ -x "$path" ] && echo "$path" && return
    done
}

sanitize() { # sanitize TOOL BACKEND SECONDS: every verb of a backend, watched
    local program options=()
    program=$(find_tool compute-sanitizer)
    if [ -z "$program" ]; then
        absent "$1, $2" "no compute-sanitizer here"
        return
    fi
    if [ "$1" = memcheck ]; then options=(--report-api-errors no); fi
    # Each tensor an allocation of its own, so that what lies beside it is nobody's.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$3" "$1, $2" \
        "$program" --tool "$1" "${options[@]}" --error-exitcode 99 "$python" -m bench.gpu.verbs "$2"
}

measure() { # measure CASE
    step 60 "bench gpu_$1" "$python" -m bench run "gpu_$1" --results "$out"
}

tests() {
    local ignored=() parallel=()
    mapfile -t ignored < <("$python" -m bench.gpu.preflight 2> >(tee -a "$log" >&2))
    if [ ${#ignored[@]} -gt 0 ]; then
        note - - "left out of the tests: ${ignored[*]#--ignore=}"
    fi
    # Compiling Triton's kernels is what takes time, and can be shared out. The workers have to
    # collect the same tests, whatever order sets have.
    export PYTHONHASHSEED=0
    if "$python" -c "import xdist" 2>/dev/null; then parallel=(-n 6 -p no:benchmark); fi
    step 130 "pytest -m gpu" "$python" -m pytest -m gpu -v --tb=short -W default -p no:cacheprovider \
        --continue-on-collection-errors --durations 5 "${parallel[@]}" "${ignored[@]}" tests
    unset PYTHONHASHSEED
}

step 140 build "$python" bench/gpu/build.py "$work/site"
step 60 doctor "$python" -c \
    "import hotgraft; print(hotgraft.__file__); from hotgraft.cli import main; main()" doctor
if [ -n "$profile" ]; then
    ncu=$(find_tool ncu)
    if [ -z "$ncu" ]; then
        absent profile "no ncu here"
    else
        # The clocks are left as they are: the card is shared.
        step 240 profile "$ncu" --clock-control none --set full --kernel-name regex:scatter \
            --launch-count 12 --log-file "$out/profile.txt" "$python" -m bench.gpu.profile
    fi
else
    tests
    sanitize memcheck cuda 50
    sanitize racecheck cuda 40
    for case in switch load; do measure "$case"; done
    sanitize memcheck triton 50
    for case in density scale; do measure "$case"; done
    step 15 "table and pictures" "$python" -m bench gpu "$out"
fi

{
    printf '\nstatus  took  step (0: fine, 124 or 137: out of time, 127: not there)\n'
    printf '%s\n' "${summary[@]}"
    printf '%s s in all: %s\n' "$SECONDS" "$([ $failed -eq 0 ] && echo "all fine" || echo "SOMETHING FAILED")"
} | tee "$out/summary.txt"
exit $failed
