#!/usr/bin/env bash
# Everything that only a GPU can show, in at most eight minutes: tests, kernels against their lower bounds, whole runs.
#
#   benchmarks/gpu.sh --fetch WHEELS 3.12      # with a network: fetches the wheels for that Python (x86-64 Linux)
#   benchmarks/gpu.sh WHEELS [OUT]             # on the machine with the GPU, PyTorch with CUDA and no network; OUT is ./gpu-results
#
# Start it in the root of a checkout. It installs beside PyTorch, into a folder of its own. Each part writes its figures to OUT as it goes
# and has a time limit, and the most important comes first, so a script that was cut off still leaves figures.
# IMAGES_PER_CORE (1250) is the size of a whole run; TIMES=2 gives every part twice the time. Without a GPU it runs on the processor: a rehearsal, whose figures mean nothing.
set -u
here=$(cd "$(dirname "$0")" && pwd)
if [ "${1:-}" = --fetch ]; then
    wheels=$2 python=$3; mkdir -p "$wheels"
    platforms=(--platform any --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    for glibc in 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    exec python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp --abi "cp${python/./}" \
        --abi abi3 --abi none "${platforms[@]}" -c "$here/../constraints.txt" -r "$here/gpu_wheels.txt" -d "$wheels"
fi
wheels=${1:?the folder of wheels}
out=${2:-gpu-results}; mkdir -p "$out"; out=$(cd "$out" && pwd)
scratch=$(mktemp -d "${TMPDIR:-/tmp}/featuremaps-gpu.XXXXXX"); trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$(dirname "$here"):$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export FEATUREMAPS_BENCHMARKS="${FEATUREMAPS_BENCHMARKS:-$scratch/images}"
times=${TIMES:-1} began=$SECONDS; total=$((475 * times))

part() { # part NAME SECONDS COMMAND...: runs it within its limit and what is left of the total
    local name=$1 limit=$(($2 * times)) left=$((total - SECONDS + began)); shift 2
    [ "$left" -gt 5 ] || { echo "== $name: left out, no time is left"; return; }
    [ "$limit" -lt "$left" ] || limit=$left
    local started=$SECONDS code
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1; code=$?
    tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
    echo "   $name ended with $code after $((SECONDS - started)) s"
    printf '{"part": "%s", "code": %d, "seconds": %d, "limit_s": %d}\n' "$name" "$code" $((SECONDS - started)) "$limit" >>"$out/parts.jsonl"
}
install() {
    local pip="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $scratch/site"
    $pip "$wheels"/*.whl && $pip --no-build-isolation "$here/.." || return
    cp "$scratch"/site/pipeline/extract/_kernel* "$here/../pipeline/extract/" || echo "no C compiler: torch does the processors' work"
    rm -rf "$scratch/site/pipeline"  # the checkout's is used
    python3 -m pipeline doctor || true
}
tests() { # a line for each test as it ends
    python3 -m pytest -v -p no:cacheprovider -o addopts= tests/extract/test_gpu.py tests/run/test_shared_gpu.py
}
export -f install tests; export wheels scratch here

cd "$here/.."; rm -f "$out/parts.jsonl"
for name in install machine tests accuracy kernels limit runs sweep resume report; do rm -f "$out/$name.json" "$out/$name.log"; done
part install 90 bash -c install
part machine 30 python3 -m benchmarks.gpu machine "$out"
part tests 130 bash -c tests
part accuracy 40 python3 -m benchmarks.gpu accuracy "$out"
part kernels 50 python3 -m benchmarks.gpu kernels "$out"
part limit 40 python3 -m benchmarks.gpu_runs limit "$out"
part runs 150 python3 -m benchmarks.gpu_runs runs "$out"
part sweep 70 python3 -m benchmarks.gpu sweep "$out"
part resume 60 python3 -m benchmarks.gpu_runs resume "$out"
total=$((total + 15)) LINES_SHOWN=200 part report 20 python3 -m benchmarks.gpu_report "$out"
