#!/bin/sh
# What a GPU is asked, in three calls of at most 590 seconds: bench/gpu.sh 1 OUT, then 2 and 3. Rows and logs go to OUT as
# they are made; OUT/call-N.txt says what ran, with its exit code and seconds, and what was skipped.
#
# A bare machine suffices: Python 3.12, torch 2.11, Triton 3.6, transformers and pytest. Packages it lacks come from the folder
# of wheels WHEELS (.whl), which is made beforehand where there is a network:
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \
#     diffusers==0.42.1 pydantic pydantic-core annotated-types typing-inspection importlib-metadata lazy-importer
#
# PYTHON, WORKERS (of the tests), SECONDS_A_CALL, CACHE (of compiled kernels, kept between the calls). REHEARSE=1: the same
# commands with small models on a CPU, whose rows say so.
set -u
cd "$(dirname "$0")/.."
began=$(date +%s)
call=${1:-}
case "$call" in 1 | 2 | 3) ;; *)
    echo "bench/gpu.sh: wanted which call, 1, 2 or 3, then a folder; got '${1:-}'" >&2
    exit 2
    ;;
esac
mkdir -p "${2:-bench-out}"
out=$(cd "${2:-bench-out}" && pwd)
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} rehearse=${REHEARSE:-}
limit=${SECONDS_A_CALL:-590} workers=${WORKERS:-14}
case "$python" in
*/*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
said=$out/call-$call.txt
: >"$said"

# kernels/ and export/ install into the package; without an editable install they are copied into it.
mkdir "$work/tree" "$work/site"
cp -r fastory bench tests pyproject.toml "$work/tree"
cp -r kernels export "$work/tree/fastory/"
if ! "$python" -c 'import diffusers, pydantic' 2>/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || {
        echo "bench/gpu.sh: diffusers is missing, and $wheels has no wheels that install; see the head of this file" | tee -a "$said" >&2
        exit 1
    }
fi
cd "$work/tree" || exit 1
export PYTHONPATH="$work/tree:$work/site" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${CACHE:-/tmp/fastory-bench}/triton" TORCHINDUCTOR_CACHE_DIR="${CACHE:-/tmp/fastory-bench}/inductor"
if [ -z "$rehearse" ] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: PyTorch sees no CUDA device here; REHEARSE=1 runs the same on a CPU" | tee -a "$said" >&2
    exit 1
fi

status=0
run() { # name, at most so many seconds, command: never beyond the end of the call
    name=$1 most=$2
    shift 2
    left=$((limit - ($(date +%s) - began)))
    if [ "$left" -lt 5 ]; then
        echo "$name: skipped, the call's $limit seconds are over" | tee -a "$said"
        return
    fi
    [ "$most" -lt "$left" ] || most=$left
    started=$(date +%s)
    timeout -k 5 "$most" "$@" >"$out/$call-$name.log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || status=1
    why=
    [ "$code" -ne 124 ] || why=", stopped after $most seconds"
    echo "$name: exit code $code, $(($(date +%s) - started)) seconds$why" | tee -a "$said"
}
script() { # name of a file in bench/, its seconds and its minutes; the rest are its arguments
    file=$1 seconds=$2 minutes=$3
    shift 3
    run "$file${part:-}" "$seconds" "$python" "bench/$file.py" --out "$out" --minutes "$minutes" "$@"
}

if [ -n "$rehearse" ]; then
    models="small-sd15" few="--frames 1 --steps 2 --dtypes fp32" some="--cells 1" tests=tests/sampling/test_cuda_graphs.py
    sweep="--candidates 1 --shapes 1" shorter="--steps 2 --frames 1 --iterations 0 --dtypes fp32"
    variants="nchw diffusers" parallel="-p no:cacheprovider" types=fp32 cell="grca SD1.5 2x256x160x8 fp16 77+4"
else
    models="sd15 sdxl" few="--frames 1 8 --dtypes fp16" some="" tests=tests
    sweep="--candidates 16" shorter="--steps 20 --frames 8 --iterations 1"
    variants="benchmark compile diffusers diffusers-compile channels_last" parallel="-n $workers -p no:cacheprovider"
    types=bf16 cell="grca SDXL 2x4096x64x10 fp16 77+80"
fi

# The order is that of worth. Unquoted on purpose: these are lists of arguments.
case "$call" in
1)
    run doctor 40 "$python" -m fastory doctor
    script ceilings 60 0.5
    script step 220 3 $models $few --graphs on off --share
    run tests 330 "$python" -m pytest $tests -m gpu -q $parallel -o addopts=--strict-markers --junitxml="$out/tests.xml"
    ;;
2)
    script step 320 4.5 $models $few --variants $variants
    script story 180 2.5 $models $shorter
    part=-types script step 90 1 $models $few --dtypes $types
    ;;
3)
    script sweep 270 4 $sweep
    script kernels 220 3 $some
    if command -v ncu >/dev/null; then
        run ncu 90 ncu --clock-control none --set full -k "regex:grca_kernel" -c 3 -o "$out/grca" "$python" bench/one.py "$cell"
    else
        echo "ncu: skipped, it is not installed" | tee -a "$said"
        run one 60 "$python" bench/one.py "$cell"
    fi
    ;;
esac
exit "$status"
