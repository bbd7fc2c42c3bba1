#!/usr/bin/env bash
# C 行覆盖率：tests/c 的插桩测试，用 gcovr 汇总（这台机器没有的指令集算没有执行）。
# --html 另外让插桩的本地库跑全部 pytest，生成 C 与 Python 的两份 HTML 报告。
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
html=${1:-}
object_dir=build/native-coverage-$(uname -m)

find build tests/c -name '*.gcda' -delete 2>/dev/null || true
make -C tests/c coverage
search=(tests/c build/c-tests)
if [ "$html" = --html ]; then
    DEEPSEEK_OPT_COVERAGE=1 "$python" build_native.py --no-install --only cpu
    DEEPSEEK_OPT_LIBRARY=$object_dir/_C.abi3.so \
        "$python" -m pytest -q "${parallel[@]}" --cov --cov-report=html:build/coverage-python
    search+=("$object_dir")
fi

# 汇总；release 构建没有插桩，不在搜索范围里。
gcov=gcov
case ${CC:-gcc} in *clang*) gcov="llvm-cov gcov" ;; esac
existing=()
for path in "${search[@]}"; do [ -d "$path" ] && existing+=("$path"); done
# 标量原语在全部测试里执行几十亿次，超过 gcovr 的“可疑次数”界（2^32），不是错误：关掉这项检查。
report() {
    "$python" -m gcovr --root . --filter csrc/ --exclude 'csrc/binding.*' --gcov-executable "$gcov" \
        --merge-mode-functions merge-use-line-min --gcov-ignore-errors=no_working_dir_found \
        --gcov-suspicious-hits-threshold 0 \
        "$@" "${existing[@]}"
}
mkdir -p build/coverage-c
report --txt build/coverage-c.txt --print-summary
if [ "$html" = --html ]; then
    report --html-details build/coverage-c/index.html
    echo "覆盖率报告：build/coverage-c/index.html、build/coverage-python/index.html"
fi
