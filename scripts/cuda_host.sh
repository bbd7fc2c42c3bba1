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
# 每个进程只用得上一个核：分成两半同时跑，先一起编译好。
LD_PRELOAD="${libraries[*]}" "$python" -c 'from tests.cuda import host_library; host_library.load()'
log=build/cuda-host.log
(
    status=0
    run tests/cuda/test_{simulator,simulator_sm90,orders,paths,layer,gpu}.py \
        tests/test_{linear,swiglu_mlp,rms_norm,rope,mla_cache_write,mla_decode,mla_decode_paged}.py \
        tests/test_{mla_prefill,mla_layer_decode,mtp_verify,mtp_input,mtp_draft_head}.py || status=$?
    # 再当作 Hopper 跑一遍：形状合适的走 *_sm90.cu。
    export DSO_HOST_MAJOR=9
    run tests/cuda/test_{orders,gpu,mla_decode_sm90,mla_prefill_sm90,mla_prefill_backward_sm90}.py \
        tests/cuda/test_{gpu_moe,gpu_moe_backward,moe_orders,moe_experts_sm90}.py || status=$?
    exit "$status"
) >"$log" 2>&1 &
status=0
# any_shape、adversarial 是逐个造数据的慢测试，CPU 上跑；这里各算子的形状已经够多。
run tests/cuda/test_{gpu_mtp,gpu_moe,gpu_moe_backward,moe_orders}.py tests/test_sample.py \
    tests/test_moe_{route,experts,experts_list,errors,quantized}.py \
    -k 'not any_shape and not adversarial' || status=$?
wait $! || status=$?
cat "$log"
exit "$status"
