#!/usr/bin/env bash
# 全部测试：C（ASan、UBSan）、C 行覆盖率、CUDA 编译与主机模拟（ASan、UBSan）、pytest（Python 覆盖率 >= 90 %）。
# 参数原样交给 pytest。环境变量：VENV
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
log=build/pytest.log
mkdir -p build
status=0

say "[1/4] C 测试（ASan、UBSan）与 C 行覆盖率"
if [ -f tests/c/Makefile ]; then
    scripts/coverage.sh >build/coverage.log 2>&1 &
    coverage=$!
    make -C tests/c test || status=$?
    wait "$coverage" || status=$?
    cat build/coverage.log
else
    echo "没有 tests/c，跳过。"
fi

say "[2/4] 编译 CUDA 部分"
if [ "${DEEPSEEK_OPT_CUDA:-}" != 0 ] && find_nvcc; then
    DEEPSEEK_OPT_CUDA=1 "$python" build_native.py --only cuda
else
    echo "没有找到 nvcc（或 DEEPSEEK_OPT_CUDA=0）：不编译 CUDA 部分，其余照常。"
fi

say "[3/4] CUDA 核的主机模拟（ASan、UBSan）"
scripts/cuda_host.sh || status=$?

say "[4/4] pytest（覆盖率门槛见 pyproject.toml）"
"$python" -m pytest "${parallel[@]}" --cov --cov-report=term --durations=15 "$@" 2>&1 | tee "$log" || status=$?

say "测试完成：$(tail -n 1 "$log")"
echo "产物：$log、build/coverage-c.txt"
exit "$status"
