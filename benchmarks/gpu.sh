#!/usr/bin/env bash
# Everything about the vLLM engine that needs a GPU, in one go: values first, then prices.
#
#     mkdir -p benchmarks/results && benchmarks/gpu.sh > benchmarks/results/gpu-$(date +%F).txt
#
# Not run yet: no machine with a GPU could be had. Until its output is committed, no figure about a
# GPU stands anywhere in this repository. Not in it yet: a model of 8B, FP8, model runner V2.
# What fails is named and does not keep the rest from running.
set -uo pipefail
failed=0
fail() { echo "FAILED: $1"; failed=1; }
export TRITON_F32_DEFAULT=ieee  # float32 tests are of the meter, not of attention in tf32
cd "$(dirname "$0")/.."

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || { echo "not run: no GPU"; exit 1; }
make vllm || exit 1
python=.venv-vllm/bin/python
"$python" -c 'import torch, transformers, vllm; print(vllm.__version__, torch.__version__, transformers.__version__)'

echo "== values: every family, mixed and squeezed, under CUDA graphs"
"$python" -m pytest -q tests/vllm tests/engines -k vllm --ignore tests/vllm/test_parallel.py || fail values

echo "== kernels per layer (Inductor on the CPU) and time outside the graph"
"$python" -m benchmarks.vllm_meter || fail "the meter alone"

echo "== the whole service beside stock vllm serve, order turned every round"
"$python" -m benchmarks.serving --rounds 6 --concurrency 1 8 64 256 --engine-args "--max-model-len 2048 --no-enable-prefix-caching --gpu-memory-utilization 0.4" || fail serving

echo "== the same with stock on our model runner (V1): what the meter costs, without what V2 gains"
VLLM_USE_V2_MODEL_RUNNER=0 "$python" -m benchmarks.serving --rounds 6 --concurrency 1 8 64 256 --engine-args "--max-model-len 2048 --no-enable-prefix-caching --gpu-memory-utilization 0.4" || fail "serving on V1"
exit $failed
