"""标准库语料：随包小模型的训练文本与留出文本，全部取自正在运行的 Python，不需要下载。

留出的模块（连同它们的测试文件）从不进入训练集，演示、验证与基准都从留出文件取真实输入。
文件顺序由相对路径决定，同一版本的 Python 上总是相同。

示例::

    from deepseek_opt.corpus import held_out_files, read_text

    longest = max(held_out_files(), key=lambda path: path.stat().st_size)
    print(longest.name, len(read_text(longest)))
"""

from __future__ import annotations

import sysconfig
import tokenize
from pathlib import Path

#: 留出的标准库模块；同名的包、``test_<模块>`` 开头的测试文件与测试目录一并留出。
HELD_OUT_MODULES: tuple[str, ...] = (
    "argparse",
    "calendar",
    "configparser",
    "dataclasses",
    "fractions",
    "heapq",
    "json",
    "shelve",
    "statistics",
    "textwrap",
    "zipfile",
)

#: 留出模块的测试所用、名字不带 ``test_`` 的辅助文件的前缀。
_HELD_OUT_PREFIXES: tuple[str, ...] = tuple(f"test_{name}" for name in HELD_OUT_MODULES) + (
    "dataclass_",
)

#: 不属于标准库本身（第三方包）或几乎全是自动生成表格的目录，既不训练也不留出。
_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


def stdlib_root() -> Path:
    """返回正在运行的 Python 的标准库目录。"""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative: Path) -> bool:
    """判断相对标准库根目录的路径是否属于留出模块。

    参数:
        relative: 相对 :func:`stdlib_root` 的路径，例如 ``Path("json/decoder.py")``。

    返回:
        任何一级目录名或去掉扩展名的文件名等于留出模块名，或以留出测试的前缀开头时为 True。
    """
    for part in relative.parts:
        stem = part.removesuffix(".py")
        if stem in HELD_OUT_MODULES or stem.startswith(_HELD_OUT_PREFIXES):
            return True
    return False


def _all_files(root: Path) -> list[Path]:
    """标准库下全部可读作文本的 .py 文件，按相对路径排序。"""
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_DIRECTORIES.intersection(relative.parts) and _is_text(path):
            files.append(path)
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _is_text(path: Path) -> bool:
    """文件能按其声明的编码读出（标准库的测试里有故意写坏的文件）。"""
    try:
        read_text(path)
    except (SyntaxError, UnicodeDecodeError, LookupError, OSError):
        return False
    return True


def held_out_files(root: Path | None = None) -> list[Path]:
    """返回留出模块的全部源文件（含测试），顺序固定。

    参数:
        root: 标准库目录；省略时取正在运行的 Python 的。
    """
    root = stdlib_root() if root is None else root
    return [path for path in _all_files(root) if is_held_out(path.relative_to(root))]


def training_files(root: Path | None = None) -> list[Path]:
    """返回可用于训练的全部源文件（不含留出模块、第三方包与字符编码表），顺序固定。

    参数:
        root: 标准库目录；省略时取正在运行的 Python 的。
    """
    root = stdlib_root() if root is None else root
    return [path for path in _all_files(root) if not is_held_out(path.relative_to(root))]


def read_text(path: Path) -> str:
    """按源文件声明的编码（PEP 263，缺省 UTF-8）读出文本，换行统一为 ``\\n``。

    异常:
        SyntaxError: 编码声明无效。
        UnicodeDecodeError: 内容与声明的编码不符。
    """
    with tokenize.open(path) as handle:
        return handle.read()
