"""``deepseek-opt demo``：在随包的小模型与真实的留出源文件上，把主要功能跑一遍并写出报告。

- :mod:`~deepseek_opt.demo.data`：模型与留出文本；
- :mod:`~deepseek_opt.demo.compare`：同一进程里原实现与优化后的对照（词元、准确率、速度）；
- :mod:`~deepseek_opt.demo.lengths`：各长度的内存与延迟，每种实现一个子进程；
- :mod:`~deepseek_opt.demo.chart`、:mod:`~deepseek_opt.demo.page`：图与 HTML 报告；
- :mod:`~deepseek_opt.demo.run`：按顺序运行以上各步。
"""

from __future__ import annotations

from deepseek_opt.demo.run import DemoOptions, DemoResult, run_demo

__all__ = ["DemoOptions", "DemoResult", "run_demo"]
