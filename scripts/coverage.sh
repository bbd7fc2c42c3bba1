#!/usr/bin/env bash
# C 行覆盖率：插桩的本地库跑算子测试，加上 tests/c 的插桩测试，用 gcovr 汇总。
# 算子之外的 pytest 不碰 C，再跑一遍只会更慢。--html 另外生成两份 HTML 报告。
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
html=${1:-}
object_dir=build/native-coverage-$(uname -m)

find build tests/c -name '*.gcda' -delete 2>/dev/null || true
DEEPSEEK_OPT_COVERAGE=1 "$python" build_native.py --no-install --only cpu
if [ -f tests/c/Makefile ] && grep -q '^coverage:' tests/c/Makefile; then
    make -C tests/c coverage
fi

# 直接用到算子或加载器的测试文件；只经过它们的（文档、基准、命令行、设备）不必再跑。
mapfile -t files < <(grep -lE 'deepseek_opt( import .*|\.)\b(ops|_native)\b|torch\.ops\.deepseek_opt' \
    tests/test_*.py | grep -vE 'test_(packaging|docs|bench|cli|cuda|device_memory|log)')
if [ "${#files[@]}" -gt 0 ]; then
    DEEPSEEK_OPT_LIBRARY=$object_dir/_C.abi3.so \
        "$python" -m pytest -q -p no:cacheprovider "${files[@]}"
fi

# 汇总；release 与 werror 构建没有插桩，不在搜索范围里。
gcov=gcov
case ${CC:-gcc} in *clang*) gcov="llvm-cov gcov" ;; esac
search=("$object_dir")
[ -d tests/c ] && search+=(tests/c build/c-tests)
existing=()
for path in "${search[@]}"; do [ -d "$path" ] && existing+=("$path"); done
# 标量原语在全部测试里执行几十亿次，超过 gcovr 的“可疑次数”界（2^32），不是错误：关掉这项检查。
report() {
    "$python" -m gcovr --root . --filter csrc/ --exclude 'csrc/binding.*' --gcov-executable "$gcov" \
        --merge-mode-functions merge-use-line-min --gcov-ignore-errors=no_working_dir_found \
        --gcov-suspicious-hits-threshold 0 \
        "$@" "${existing[@]}"
}
report --txt build/coverage-c.txt --print-summary
if [ "$html" = --html ]; then
    mkdir -p build/coverage-c
    report --html-details build/coverage-c/index.html
    "$python" -m pytest -q --cov --cov-report=html:build/coverage-python
    echo "覆盖率报告：build/coverage-c/index.html、build/coverage-python/index.html"
fi
