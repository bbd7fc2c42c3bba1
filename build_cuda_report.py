"""CUDA 核用了多少寄存器、共享内存，有没有溢出：读 ptxas -v 的输出，写成记录与表，按名单把关。

溢出（寄存器不够，改放显存）与栈帧（下标编译时不定的数组也在显存里）通常是几倍的慢，又不报错，
所以没有写进 cuda/spills.txt 的都算编译失败；wgmma 不能重叠、setmaxnreg 没有生效的也是。build_native.py 用它。
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

SPILL_LIST = "cuda/spills.txt"

_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\w+)'$")
_PROPERTIES = re.compile(r"ptxas info\s*: Function properties for (\S+)$")
_FRAME = re.compile(
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers\b")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SHARED = re.compile(r"(\d+) bytes smem")
# wgmma 被排成一条接一条（C7510 等）、setmaxnreg 没有生效（C7508）：ptxas 只当作提示，却是几倍的慢。
_LOSS = re.compile(r"ptxas info\s*: (\(C75\d\d\) (?:.*function '(\S+)')?.*)")
_NOISE = re.compile(r"ptxas info\s*: (\d+ bytes gmem\b|Compile time = )")


@dataclass(frozen=True)
class Usage:
    """一个函数在一种架构上的用量；registers 为 None：没有读到，或不是核（没有内联的函数）。"""

    source: str
    name: str
    arch: str
    kernel: bool = True
    registers: int | None = None
    static_shared: int = 0
    barriers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    loss: str = ""  # ptxas 说 wgmma、setmaxnreg 没有照写的那样用上

    @property
    def local_bytes(self) -> int:
        """名单里的“至多几字节”比的数：栈帧、溢出写、溢出读里最大的。"""
        return max(self.stack, self.spill_stores, self.spill_loads)


@dataclass(frozen=True)
class Allowed:
    """名单的一行：核名与架构是通配（fnmatch）。"""

    pattern: str
    arch: str
    limit: int
    reason: str
    line: int

    def covers(self, usage: Usage) -> bool:
        """说的是不是这个核（不看字节数）。"""
        pattern = self.pattern.replace("[", "[[]")  # 只有 * 与 ? 通配
        return fnmatchcase(usage.name, pattern) and fnmatchcase(usage.arch, self.arch)


@dataclass
class SpillList:
    """cuda/spills.txt：允许的核，以及核对这份名单时的 nvcc（空：什么版本都按它把关）。"""

    allowed: list[Allowed] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def applies_to(self, release: str) -> bool:
        """寄存器怎样分配随 nvcc 的版本变：别的版本只提示，不让安装失败。"""
        return not self.releases or release in self.releases


# ---- 读 ptxas 的输出 ----


class _Parser:
    def __init__(self, source: str):
        self.source = source
        self.found: dict[tuple[str, str], Usage] = {}
        self.rest: list[str] = []  # 不认识的行：要给人看
        self.entry = ("", "")  # 正在编译的核与架构
        self.frame_of = ("", "")  # 下一行栈帧说的是谁

    def _update(self, key: tuple[str, str], **values) -> None:
        usage = self.found.get(key) or Usage(self.source, *key, kernel=key == self.entry)
        self.found[key] = replace(usage, **values)

    def line(self, text: str) -> None:
        if match := _ENTRY.match(text):
            self.entry = (match[1], match[2])
            self._update(self.entry, kernel=True)
        elif match := _PROPERTIES.match(text):
            self.frame_of = (match[1], self.entry[1])
        elif match := _FRAME.match(text):
            stack, stores, loads = map(int, match.groups())
            self._update(self.frame_of, stack=stack, spill_stores=stores, spill_loads=loads)
        elif match := _USED.match(text):
            shared, barriers = _SHARED.search(text), _BARRIERS.search(text)
            self._update(
                self.entry,
                registers=int(match[1]),
                static_shared=int(shared[1]) if shared else 0,
                barriers=int(barriers[1]) if barriers else 0,
            )
        elif not _NOISE.match(text):
            if match := _LOSS.match(text):  # 在说编译哪个核之前；有的不说是哪个函数
                self._update((match[2] or "?", "sm_90a"), loss=match[1])
            self.rest.append(text)


def parse(text: str, source: str) -> tuple[list[Usage], str]:
    """编译一个文件的输出 → 各函数的用量（名字还没有还原），与其余要给人看的输出。"""
    parser = _Parser(source)
    for line in text.splitlines():
        parser.line(line)
    return list(parser.found.values()), "\n".join(parser.rest).strip()


def architectures(command: Iterable[str]) -> list[str]:
    """编译命令的 -gencode 会让 ptxas 编译哪些架构。"""
    codes = [word.partition("code=")[2] for word in command if word.startswith("-gencode")]
    return [arch for code in codes for arch in re.findall(r"sm_\w+", code)]


def unread(usages: list[Usage], expected: Iterable[str]) -> list[str]:
    """有核、却没有读到用量的架构（换了 nvcc、输出的写法变了时，不能当作没有溢出）。"""
    read = {usage.arch for usage in usages if usage.kernel and usage.registers is not None}
    bad = {usage.arch for usage in usages if usage.kernel and usage.registers is None}
    return [arch for arch in expected if arch not in read or arch in bad]


def demangle(usages: list[Usage]) -> list[Usage]:
    """名字还原成 C++ 的写法，不带参数与匿名命名空间；没有工具时原样。

    先找 c++filt（gcc 少不了 binutils）：cu++filt 把实参写成 (int)8，名单就要有两种写法。
    """
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not usages:
        return usages
    names = [usage.name for usage in usages]
    done = subprocess.run([tool, "-p", *names], capture_output=True, text=True, check=False)
    plain = done.stdout.splitlines()
    if done.returncode or len(plain) != len(names):
        return usages
    # nvcc 给没有内联的函数加的前缀带着随路径变的散列。
    drop = re.compile(r"\(anonymous namespace\)::|\b_INTERNAL_\w+?::")
    return [replace(u, name=drop.sub("", name)) for u, name in zip(usages, plain, strict=True)]


def nvcc_release(nvcc: str) -> str:
    """nvcc 的版本，如 13.0；看不出时是空串。"""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match[1] if match else ""


# ---- 每个目标文件旁的记录 ----


def save(path: Path, usages: list[Usage], missing: list[str]) -> None:
    """增量编译时没有重编的文件就靠这份记录。"""
    document = {"functions": [asdict(usage) for usage in usages], "unread": missing}
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")


def load(path: Path) -> tuple[list[Usage], list[str]]:
    """save 写的记录。"""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [Usage(**values) for values in document["functions"]], document["unread"]


# ---- 名单与把关 ----


def read_list(path: Path) -> SpillList:
    """读 cuda/spills.txt；没有这个文件就是一个核都不许溢出。"""
    found = SpillList()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if release := re.fullmatch(r"nvcc (\d+\.\d+)", text):
            found.releases.append(release[1])
        elif text and not text.startswith("#"):
            _read_line(found, text, number)
    return found


def _read_line(found: SpillList, text: str, number: int) -> None:
    parts = [part.strip() for part in text.split("|")]
    if len(parts) != 4 or not all(parts) or not parts[2].isdecimal():
        found.problems.append(
            f"{SPILL_LIST} 第 {number} 行应当是“核名 | 架构 | 至多几字节 | 理由”，现在是：{text}"
        )
        return
    found.allowed.append(Allowed(parts[0], parts[1], int(parts[2]), parts[3], number))


def problems(usages: list[Usage], spills: SpillList) -> list[str]:
    """不在名单里的溢出与栈帧，没用上的 wgmma，以及名单自己的毛病（写错的、已经没有用的行）。"""
    found = list(spills.problems)
    found += [f"{u.source}：核 {u.name} 在 {u.arch} 上：{u.loss}" for u in usages if u.loss]
    spilling = [usage for usage in usages if usage.local_bytes]
    for usage in spilling:
        limits = [entry.limit for entry in spills.allowed if entry.covers(usage)]
        if usage.local_bytes > max(limits, default=0):
            found.append(_describe(usage, max(limits, default=None)))
    for entry in spills.allowed:
        if not any(entry.covers(usage) for usage in spilling):
            found.append(
                f"{SPILL_LIST} 第 {entry.line} 行（{entry.pattern} | {entry.arch}）"
                "没有对应的溢出，已经过时，请删去。"
            )
    return found


def _describe(usage: Usage, limit: int | None) -> str:
    what = "核" if usage.kernel else "函数"
    spilled = usage.spill_stores or usage.spill_loads
    why = "溢出寄存器" if spilled else "用了栈帧（数组的下标在编译时不定，或调用了没有内联的函数）"
    listed = "" if limit is None else f"，{SPILL_LIST} 只允许 {limit} 字节"
    return (
        f"{usage.source}：{what} {usage.name} 在 {usage.arch} 上{why}：栈帧 {usage.stack} 字节，"
        f"溢出写 {usage.spill_stores} 字节、读 {usage.spill_loads} 字节{listed}。"
    )


# ---- 汇总 ----


def write_summary(usages: list[Usage], release: str, document: Path, table: Path) -> None:
    """全部核的用量：JSON 给程序读，表给人读。"""
    rows = sorted(usages, key=lambda usage: (usage.source, usage.name, usage.arch))
    content = {"nvcc": release, "functions": [asdict(usage) for usage in rows]}
    document.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    table.write_text(f"nvcc {release}\n" + "\n".join(_table(rows)) + "\n", encoding="utf-8")


def _table(usages: list[Usage]) -> Iterator[str]:
    head = ("架构", "寄存器", "共享内存", "屏障", "栈帧", "溢出写", "溢出读", "文件", "核")
    rows = [head]
    for u in usages:
        name = u.name if u.kernel else f"{u.name}（没有内联的函数）"
        registers = "-" if u.registers is None else u.registers
        numbers = (registers, u.static_shared, u.barriers, u.stack, u.spill_stores, u.spill_loads)
        rows.append((u.arch, *map(str, numbers), u.source, name))
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell + " " * (w - _width(cell)) for cell, w in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
