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
# 每个进程只用得上一个核：分成两半（MLA 与其余）同时跑，先一起编译好；再当作 Hopper 跑一遍，形状合适的走 *_sm90.cu。
# 算子的测试里 fp16 与 bf16 是同样的模板，tests/cuda 里两种都有；any_shape 等逐个造数据的慢测试 CPU 上跑。
LD_PRELOAD="${libraries[*]}" "$python" -c 'from tests.cuda import host_library; host_library.load()'
few='not float16 and not any_shape and not adversarial'
half() {
    local -n cuda_tests=$1_cuda operators=$1_operators hopper_tests=$1_hopper
    local status=0
    run "${cuda_tests[@]/#/tests/cuda/test_}" || status=$?
    run -k "$few" "${operators[@]/#/tests/test_}" || status=$?
    DSO_HOST_MAJOR=9 run "${hopper_tests[@]/#/tests/cuda/test_}" || status=$?
    return "$status"
}
# shellcheck disable=SC2034  # half 里按名字取
{
    mla_cuda=({simulator,simulator_sm90,orders,paths,layer,gpu}.py)
    mla_operators=({linear,swiglu_mlp,rms_norm,rope,mla_cache_write,mla_decode,mla_prefill}.py
        mla_layer_decode.py)
    mla_hopper=({orders,mla_decode_sm90,mla_prefill_sm90,mla_prefill_backward_sm90}.py)
    rest_cuda=({gpu_mtp,gpu_moe,gpu_moe_backward,moe_orders}.py)
    rest_operators=({mtp_verify,mtp_input,mtp_draft_head,moe_route,moe_experts,moe_errors}.py)
    rest_hopper=({gpu_moe_backward,moe_orders,moe_experts_sm90}.py)
}
log=build/cuda-host.log
half mla >"$log" 2>&1 &
status=0
half rest || status=$?
wait $! || status=$?
cat "$log"
exit "$status"
