#!/bin/sh
# The whole GPU matrix: the tests marked gpu, every cell against every peer, the table. Run it in the checkout, in an
# environment with a CUDA build of PyTorch, Triton and fastory. It ends itself after eight minutes.
set -eu
cd "$(dirname "$0")/.."
python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "bench/gpu.sh: no CUDA device")'
log=bench/results/gpu.log
status=0
timeout 200 python -m pytest tests/test_grca_numbers.py tests/test_banded_numbers.py tests/test_kernels_gpu.py \
    tests/test_cuda_graphs.py -m gpu -q --benchmark-disable -o addopts=--strict-markers >"$log" 2>&1 || status=$?
tail -n 3 "$log"
timeout 270 python -m pytest bench/ --benchmark-only -q --save --note "bench/gpu.sh" >>"$log" 2>&1 || status=$?
tail -n 3 "$log"
for file in bench/results/kernels-*.json; do
    case "$file" in *-cpu.json) ;; *) python bench/table.py "$file" ;; esac
done
exit "$status"
