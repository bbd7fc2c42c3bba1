#!/usr/bin/env bash
# 在有 GPU 的机器上：编译、跑全部 CUDA 算子的测试与基准，8 分钟以内。
#   scripts/gpu.sh [结果.json]
# 用当前环境的 Python（PYTHON 可指定），不联网、不安装：需要带 CUDA 的 torch >= 2.10、nvcc、pytest。
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${1:-benchmarks/results/gpu.json}
say() { printf '==> %s\n' "$*"; }

"$python" - <<'PY'
import torch

assert torch.cuda.is_available(), "没有可用的 CUDA 设备"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
PY
say "[1/3] 编译"
DEEPSEEK_OPT_CUDA=1 "$python" build_native.py
say "[2/3] 测试"
status=0
timeout 200 "$python" -m pytest -q -p no:cacheprovider tests/cuda || status=$?
say "[3/3] 基准"
timeout 200 "$python" benchmarks/gpu.py --output "$output" || status=$?
if [ "$status" = 0 ]; then say "完成：测试全部通过，读数在 $output"; else say "有失败（退出码 $status）"; fi
exit "$status"
