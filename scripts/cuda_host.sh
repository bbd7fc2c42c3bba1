#!/usr/bin/env bash
# 没有 GPU 也检查 CUDA 核：用主机编译器把 cuda/ 编成带 ASan、UBSan 的库（tests/cuda/host 模拟 CUDA），
# 再跑模拟器自己的测试与各算子的测试。参数原样交给 pytest；不带参数时跑全部。环境变量：VENV
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
cxx=${CXX:-g++}
libraries=("$("$cxx" -print-file-name=libasan.so)" "$("$cxx" -print-file-name=libubsan.so)")
# 泄漏不查：Python 自己就有；链接次序也不查：libasan 由 LD_PRELOAD 装上。
export DSO_HOST=1 DSO_HOST_SANITIZE=1
export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:detect_stack_use_after_return=0
run() { LD_PRELOAD="${libraries[*]}" "$python" -m pytest -q -p no:cacheprovider "$@"; }
if [ "$#" -gt 0 ]; then
    run "$@"
    exit
fi
tests=(tests/cuda/test_{simulator,simulator_sm90,orders,paths,layer,gpu,gpu_mtp,gpu_moe,moe_orders}.py)
for op in linear swiglu_mlp rms_norm rope mla_cache_write mla_decode mla_decode_paged mla_prefill \
    mla_layer_decode mtp_verify mtp_input mtp_draft_head sample moe_route moe_experts \
    moe_experts_list moe_errors moe_quantized; do
    tests+=("tests/test_$op.py")
done
run "${tests[@]}"
# 再当作 Hopper 跑一遍：形状合适的走 *_sm90.cu。
export DSO_HOST_MAJOR=9
run tests/cuda/test_{orders,gpu,gpu_moe,mla_decode_sm90,mla_prefill_sm90}.py \
    tests/cuda/test_{mla_prefill_backward_sm90,moe_experts_sm90}.py
