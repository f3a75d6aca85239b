#!/usr/bin/env bash
# All that needs a GPU, in calls of less than ten minutes: docs/results/gpu.md says how to use it.
#
#     benchmarks/gpu_run.sh [SECTION...]
#
# Without names it goes on with the first section that has not ended, as long as there is time.
#
#   check      versions, driver, imports          ops        every op against torch and a copy
#   build      the CUDA module, carried or made   layers     layers against what else computes them
#   kernels    correctness, and the record        steps      whole training steps
#   decode     one token per sample               tests      tests/gpu
# By name only: compiled (layers with compiled rivals), sanitize, tune.
#
# Variables: OUT, folder of results, logs and state [benchmarks/results]; PYTHON [python3.12 or
# python3]; CALL_SECONDS, length of a call [570]; REHEARSE=1, all in small on the CPU.
# Exit status: 0 all is done and right, 1 a section failed, 2 bad name, 3 right so far, call again.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results}
CALL_SECONDS=${CALL_SECONDS:-570}
PYTHON=${PYTHON:-$(command -v python3.12 || command -v python3)}
state=$OUT/gpu_run
plan=(check build kernels decode ops layers steps tests)
by_name="compiled sanitize tune"
margin=60 # seconds in which a part that has begun may end
mkdir -p "$state"

export PYTHONPATH=$PWD/.dev/packages:$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${SAPT_FAST_COMMIT:-}" ] && [ -f .dev/commit ]; then
    SAPT_FAST_COMMIT=$(cat .dev/commit)
fi
export SAPT_FAST_COMMIT=${SAPT_FAST_COMMIT:-}
rehearse=()
if [ -n "${REHEARSE:-}" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    rehearse=(--rehearse)
fi

left() { echo $((CALL_SECONDS - SECONDS)); }

check() {
    nvidia-smi || [ -n "${REHEARSE:-}" ] || return
    "$PYTHON" benchmarks/gpu_machine.py
}

build() {
    local name
    name=_C$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    if [ ! -f ".dev/sapt_fast/$name" ]; then
        if [ -n "${REHEARSE:-}" ]; then return 0; fi
        SAPT_FAST_BUILD=cuda SAPT_FAST_CUDA_ARCHS=${SAPT_FAST_CUDA_ARCHS:-90a} \
            timeout -k 10 "$(left)" "$PYTHON" setup.py build_ext --build-lib .dev || return
    fi
    cp ".dev/sapt_fast/$name" sapt_fast/ && "$PYTHON" benchmarks/gpu_machine.py --build
}

gpu_check() { # SECTION OPTION...
    local seconds
    seconds=$(left)
    timeout -k 10 "$seconds" "$PYTHON" benchmarks/gpu_check.py --out "$OUT" --only "$1" \
        --budget $((seconds > 2 * margin ? seconds - margin : margin)) "${rehearse[@]}" "${@:2}"
}

tests() {
    local report=$state/tests.xml
    # Without the options of plugins that the machine need not have.
    timeout -k 10 "$(left)" "$PYTHON" -m pytest -q -p no:cacheprovider --import-mode=importlib \
        -o addopts=--strict-markers --junitxml "$report" tests/gpu || return
    # A test that is skipped on a GPU has shown nothing.
    [ -n "${REHEARSE:-}" ] || grep -q 'skipped="0"' "$report"
}

section() {
    case $1 in
    check | build | tests) "$1" ;;
    kernels)
        if [ -n "${REHEARSE:-}" ]; then gpu_check correctness; else gpu_check correctness --record; fi
        ;;
    decode | ops | layers | steps) gpu_check "$1" ;;
    # In folders of their own: they must not replace what the plan has measured.
    compiled) gpu_check layers --compiled --out "$OUT/compiled" ;;
    sanitize) gpu_check decode --sanitize --out "$OUT/sanitizer" ;;
    tune) SAPT_FAST_ROUTES=$OUT/routes timeout -k 10 "$(left)" "$PYTHON" -m sapt_fast bench tune ;;
    esac
}

ended() { # a state of "again" had less than a whole call
    [ -f "$state/$1" ] && [ "$(cat "$state/$1")" != again ]
}

for name in "$@"; do
    if [[ " ${plan[*]} $by_name " != *" $name "* ]]; then
        echo "gpu_run.sh: got section '$name', expected one of ${plan[*]} $by_name" >&2
        exit 2
    fi
done
first=yes
for name in "${@:-${plan[@]}}"; do
    if [ $# -eq 0 ] && ended "$name"; then continue; fi
    began=$SECONDS
    if [ -z "$first" ] && [ "$(left)" -lt $((2 * margin)) ]; then break; fi
    first=
    echo "== $name"
    section "$name" 2>&1 | tee "$state/$name.log"
    status=${PIPESTATUS[0]}
    if [ "$began" -gt "$margin" ] && { [ "$status" = 3 ] || [ "$status" = 124 ]; }; then
        status=again
    fi
    echo "$status" >"$state/$name"
done

failed=() missing=()
for name in "${plan[@]}"; do
    if ! ended "$name"; then missing+=("$name"); fi
done
for file in "$state"/*; do
    name=${file##*/}
    case $name in *.*) continue ;; esac
    case $(cat "$file") in
    0 | again) ;;
    3) echo "$name: right, but the time ended before all was measured" ;;
    124 | 137) failed+=("$name (ended after its time)") ;;
    *) failed+=("$name") ;;
    esac
done
if [ ${#missing[@]} -gt 0 ]; then echo "to do: ${missing[*]}"; fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
if [ ${#missing[@]} -gt 0 ]; then exit 3; fi
echo "all sections are done and right"
