#!/usr/bin/env bash
# 全部测试：C（ASan、UBSan）、CUDA 编译与主机模拟（ASan、UBSan）、pytest（Python 覆盖率 >= 90 %）、C 行覆盖率。
# 参数原样交给 pytest。环境变量：VENV
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
log=build/pytest.log
mkdir -p build

say "[1/5] C 测试（ASan、UBSan）"
if [ -f tests/c/Makefile ]; then
    make -C tests/c test
else
    echo "没有 tests/c，跳过。"
fi

say "[2/5] 编译 CUDA 部分"
if [ "${DEEPSEEK_OPT_CUDA:-}" != 0 ] && find_nvcc; then
    DEEPSEEK_OPT_CUDA=1 "$python" build_native.py --only cuda
else
    echo "没有找到 nvcc（或 DEEPSEEK_OPT_CUDA=0）：不编译 CUDA 部分，其余照常。"
fi

say "[3/5] CUDA 核的主机模拟（ASan、UBSan）"
status=0
scripts/cuda_host.sh || status=$?

say "[4/5] pytest（覆盖率门槛见 pyproject.toml）；同时在另一个核上量 C 行覆盖率"
scripts/coverage.sh >build/coverage.log 2>&1 &
coverage=$!
"$python" -m pytest --cov --cov-report=term --durations=15 "$@" 2>&1 | tee "$log" || status=$?

say "[5/5] C 行覆盖率"
wait "$coverage" || status=$?
cat build/coverage.log

say "测试完成：$(tail -n 1 "$log")"
echo "产物：$log、build/coverage-c.txt"
exit "$status"
