"""基准：``deepseek-opt bench`` 运行的内容，随包安装，因此装好轮子之后也能用。

代码都在这里；仓库根目录的 ``benchmarks/`` 只放读数（``benchmarks/results/*.json``）和 GPU 脚本。

- :mod:`~deepseek_opt.benchmarks.cases`：一项基准（Case）、一行读数（Row）、套件的登记表；
- :mod:`~deepseek_opt.benchmarks.mla`：MLA 的套件；以后的 ``moe``、``mtp`` 同样各写一个模块登记；
- :mod:`~deepseek_opt.benchmarks.timing`：同一次运行里交替计时、测屋顶线；
- :mod:`~deepseek_opt.benchmarks.probe`：在独立子进程里实测内存峰值；
- :mod:`~deepseek_opt.benchmarks.standard`：同宽度的标准多头注意力，作对照。

示例::

    from deepseek_opt.benchmarks import run_suite

    result = run_suite("mla", quick=True)
    print(result.render())
"""

from __future__ import annotations

from deepseek_opt.benchmarks.cases import Case, Env, Row, Suite, register_suite, suite_names
from deepseek_opt.benchmarks.runner import SuiteResult, run_suite

__all__ = [
    "Case",
    "Env",
    "Row",
    "Suite",
    "SuiteResult",
    "register_suite",
    "run_suite",
    "suite_names",
]
