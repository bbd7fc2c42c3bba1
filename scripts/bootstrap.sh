#!/usr/bin/env bash
# 准备开发环境：虚拟环境、torch、依赖、本地库、可编辑安装。由 Makefile 调用，可重复运行。
#   bootstrap.sh <虚拟环境目录> <附加依赖组，如 dev>
# 环境变量：PYTHON（建虚拟环境用的 Python）、TORCH（torch 的版本要求）
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
extra=$2
torch=${TORCH:-torch==2.13.0}
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

# 版本够新的 Python：用户指定的优先。
find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "需要 Python >= 3.11：请安装，或用 make PYTHON=/路径/python3.11 指定。" >&2
    return 1
}

# 有的发行版把 ensurepip 拆成另一个包；没有它就借系统的 pip 装。
make_venv() {
    local python
    python=$(find_python)
    "$python" -m venv "$venv" 2>/dev/null && return
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install pip
}

if [ ! -x "$venv/bin/python" ]; then
    say "[1/5] 建立虚拟环境 $venv"
    make_venv
else
    say "[1/5] 使用虚拟环境 $venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

say "[2/5] 安装构建工具"
pip install -q "setuptools>=77" wheel
say "[3/5] 安装 $torch（第一次要下载，几分钟）"
pip install "$torch"
say "[4/5] 编译本地库"
"$venv/bin/python" build_native.py
say "[5/5] 安装 deepseek_opt 与依赖（$extra）"
# 再写一次 torch：不让任何依赖换掉它。已经满足的依赖不必逐行列出。
pip install "$torch" --no-build-isolation -e ".[$extra]" | { grep -v 'already satisfied' || true; }
"$venv/bin/python" - <<'PY'
from deepseek_opt import _native

print("环境就绪：" + (f"指令集 {_native.isa()}" if _native.load() else _native.load_error()))
PY
