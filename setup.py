"""构建脚本：csrc/ 按指令集分组编译成 _C.abi3.so，有 nvcc 时再把 cuda/ 编译成 _C_cuda.so。

其余打包信息在 pyproject.toml。编译细节在 build_native.py。环境变量：

    DEEPSEEK_OPT_BUILD_ISAS=scalar,avx2   只编译列出的指令集（默认全部）
    DEEPSEEK_OPT_CUDA=0|1                 0：不编译 CUDA 部分；1：必须编译成功；默认：找到 nvcc 就编译
    DEEPSEEK_OPT_COVERAGE=1               带 gcov 插桩（--coverage -O1）
    DEEPSEEK_OPT_WERROR=1                 把编译警告当作错误
    CC、CXX、CFLAGS、CXXFLAGS、LDFLAGS、CUDA_HOME、MAX_JOBS   惯常含义
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # PEP 517 构建时仓库根目录不在 sys.path 里

import build_native  # noqa: E402  # pylint: disable=wrong-import-position

FILENAMES = {"_C": "_C.abi3.so", "_C_cuda": "_C_cuda.so"}


class BuildNative(build_ext):
    """用 build_native 编译链接，再放到 setuptools 期望的位置。"""

    def get_ext_filename(self, fullname: str) -> str:
        """两个库的文件名固定，加载器才能按名字找到它们。"""
        *package, name = fullname.split(".")
        return os.path.join(*package, FILENAMES[name])

    def build_extension(self, ext: Extension) -> None:
        """ext 只是占位：源文件、标志、依赖都由 build_native 决定。"""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            builder = build_native.Builder(ROOT)
            built = builder.build_cuda() if ext.name.endswith("_cuda") else builder.build_cpu()
        except build_native.BuildError as error:
            raise CompileError(str(error)) from error  # optional 的扩展只认这种异常
        build_native.install(built, target)


def extensions() -> list[Extension]:
    """CPU 库总是有；CUDA 库只在找到 nvcc 且没有关掉时有，编译失败时可以没有。"""
    found = [Extension("deepseek_opt._C", [], py_limited_api=True)]
    if build_native.wants_cuda(ROOT):
        optional = os.environ.get("DEEPSEEK_OPT_CUDA") != "1"
        found.append(Extension("deepseek_opt._C_cuda", [], py_limited_api=True, optional=optional))
    return found


# setuptools 不清理上一次的 build/lib：旧模块会混进轮子。每次从空目录开始（编译缓存在别处）。
PACKAGE_BUILD = Path("build") / "package"
shutil.rmtree(ROOT / PACKAGE_BUILD, ignore_errors=True)

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={
        "bdist_wheel": {"py_limited_api": "cp311"},
        "build": {"build_base": str(PACKAGE_BUILD)},
    },
)
