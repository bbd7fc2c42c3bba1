#!/usr/bin/env bash
# 没有 GPU 也检查 CUDA 核：用主机编译器把 cuda/ 编成带 ASan、UBSan 的库（tests/cuda/host 模拟 CUDA），
# 再跑模拟器自己的测试与各算子的测试。参数原样交给 pytest；不带参数时跑全部。环境变量：VENV
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
cxx=${CXX:-g++}
libraries=("$("$cxx" -print-file-name=libasan.so)" "$("$cxx" -print-file-name=libubsan.so)")
# 泄漏不查：Python 自己就有；链接次序也不查：libasan 由 LD_PRELOAD 装上。
# 模拟是串行的：参考结果也只用一个线程，不与另一个进程争。
export DSO_HOST=1 DSO_HOST_SANITIZE=1 OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:detect_stack_use_after_return=0
run() { LD_PRELOAD="${libraries[*]}" "$python" -m pytest -q -p no:cacheprovider "$@"; }
if [ "$#" -gt 0 ]; then
    run "$@"
    exit
fi
# 先一起编译好，再分给两个进程；再当作 Hopper 跑一遍，形状合适的走 *_sm90.cu。
# fp16 与 bf16 是同样的模板：算子的测试里只跑 bf16，tests/cuda 里两种都有（MoE 反向的 fp16 只在 Hopper 那一遍，MLA 的只在
# sm_80 那一遍，采样前的处理只在不带 top-k、top-p 时）。写 torch.float16：float16 也会选中 bfloat16。
# 逐个造数据的、CPU 线程数的、看分布的、很大的只在 CPU 上跑；MoE 的各种布局与奇数形状 tests/cuda 里有。
LD_PRELOAD="${libraries[*]}" "$python" -c 'from tests.cuda import host_library; host_library.load()'
cuda=({simulator,simulator_sm90,simulator_rings,orders,paths,layer,linear_small,mla_heads}.py
    {gpu,gpu_mtp,gpu_moe,gpu_moe_backward,gpu_training,moe_orders}.py)
operators=({linear,swiglu_mlp,rms_norm,rope,mla_cache_write,mla_decode,mla_prefill}.py
    {mla_layer_decode,mtp_verify,mtp_input,mtp_draft_head,moe_route,moe_experts,moe_errors}.py)
hopper=({orders,mla_decode_sm90,mla_decode_paged_sm90,mla_prefill_sm90,mla_prefill_backward_sm90}.py
    {gpu_moe_backward,moe_orders,moe_experts_sm90,moe_codes_sm90}.py)
# 整个模型与各层的用法：替换、训练、生成都走到同样的绑定与核。
models=({moe_layer,moe_optimize,transformers_models}.py)
once='not (moe_backward and torch.float16) and not (sample_filter and torch.float16 and top)'
few='not torch.float16 and not any_shape and not adversarial and not thread_count and not distribution'
few+=' and not biased and not sampled_drafts and not activation_no_less and not 400-dtype'
few+=' and not (moe_experts and (every_layout or odd_shapes or wide_blocks or anything or block_boundaries))'
# fp32、量化的在 Hopper 上也走第一遍跑过的核；int4 的常驻核默认不用，只跑几种，单独运行那个文件时才全跑。
wgmma='(not torch.float16 or moe) and not torch.float32 and not int8 and not fp8'
wgmma+=' and not (moe_codes and (shared or tokens or zero_points or activations or grid or order or pieces))'
status=0
run "${parallel[@]}" -k "$once" "${cuda[@]/#/tests/cuda/test_}" || status=$?
run "${parallel[@]}" -k "$few" "${operators[@]/#/tests/test_}" || status=$?
DSO_HOST_MAJOR=9 run "${parallel[@]}" -k "$wgmma" "${hopper[@]/#/tests/cuda/test_}" || status=$?
DSO_HOST_MAJOR=9 run "${parallel[@]}" "${models[@]/#/tests/test_}" || status=$?
exit "$status"
