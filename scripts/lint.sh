#!/usr/bin/env bash
# 格式与静态检查。--fix 只改格式（clang-format、ruff format），不做检查。环境变量：VENV
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
mapfile -t c_files < <(git ls-files --cached --others --exclude-standard \
    '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')
python_paths=(deepseek_opt tests benchmarks examples docs setup.py build_native.py build_cuda_report.py)
mapfile -t python_paths < <(ls -d "${python_paths[@]}" 2>/dev/null)

if [ "${1:-}" = --fix ]; then
    "$venv/bin/clang-format" -i "${c_files[@]}"
    "$venv/bin/ruff" format "${python_paths[@]}"
    exit
fi

failed=()
# 一项不过也继续，最后一起报告：一次改完。
check() {
    say "$1"
    shift
    "$@" || failed+=("$*")
}
check "[1/5] clang-format" "$venv/bin/clang-format" --dry-run -Werror "${c_files[@]}"
check "[2/5] C 编译警告（-Wall -Wextra -Wpedantic -Werror）" \
    env DEEPSEEK_OPT_WERROR=1 "$python" build_native.py --no-install --only cpu
check "[3/5] flake8" "$venv/bin/flake8" "${python_paths[@]}"
check "[4/5] pylint" "$venv/bin/pylint" -j 2 "${python_paths[@]}"
check "[5/5] ruff format" "$venv/bin/ruff" format --check "${python_paths[@]}"

if [ "${#failed[@]}" -gt 0 ]; then
    printf '没有通过：%s\n' "${failed[@]%% *}" >&2
    exit 1
fi
say "检查通过：${#c_files[@]} 个 C/C++/CUDA 文件，Python 路径 ${python_paths[*]}"
