"""指标的去处：JSON Lines 文件、TensorBoard、Prometheus。"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from deepseek_opt.errors import UnsupportedError
from deepseek_opt.metrics.record import PerformanceMetrics


class JSONLSink:
    """每次 write 在文件末尾加一行 JSON（时间、步数与全部字段）；可多线程使用。

    示例
    ----
    >>> import tempfile, pathlib
    >>> from deepseek_opt import PerformanceMetrics
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with JSONLSink(path) as sink:
    ...     sink.write(PerformanceMetrics(calls=3), step=1)
    >>> '"calls": 3' in path.read_text()
    True
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        # 文件随对象一直打开，由 close 或 with 关闭
        self._file = self.path.open("a", encoding="utf-8")  # pylint: disable=consider-using-with

    def write(self, metrics: PerformanceMetrics, step: int | None = None) -> None:
        """写一行；立即落盘，进程中断也不丢已写的。"""
        entry = {"time": time.time(), "step": step, **metrics.to_dict()}
        with self._lock:
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """关闭文件。"""
        self._file.close()

    def __enter__(self) -> JSONLSink:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class TensorBoardSink:
    """写入 TensorBoard：target 为日志目录，或已有的 SummaryWriter（任何有 add_scalar 的对象）。

    抛出 :class:`~deepseek_opt.errors.UnsupportedError`：给了目录而没有安装 tensorboard。
    """

    def __init__(self, target: Any, prefix: str = "deepseek_opt/"):
        self.prefix = prefix
        self.writer = target if hasattr(target, "add_scalar") else _summary_writer(target)

    def write(self, metrics: PerformanceMetrics, step: int | None = None) -> None:
        """每个有值的标量写一个点。"""
        for name, value in metrics.scalars().items():
            self.writer.add_scalar(self.prefix + name, value, step)

    def close(self) -> None:
        """关闭 writer。"""
        self.writer.close()


class PrometheusSink:
    """Prometheus 仪表（Gauge），登记在自己的 CollectorRegistry 里，不碰全局的。

    ``start_http_server(port, registry=sink.registry)`` 即可被抓取；没有值的指标不出现。
    抛出 :class:`~deepseek_opt.errors.UnsupportedError`：没有安装 prometheus_client。
    """

    def __init__(self, registry: Any = None, namespace: str = "deepseek_opt"):
        try:
            import prometheus_client
        except ImportError as error:
            raise UnsupportedError(
                "PrometheusSink 需要 prometheus_client：pip install prometheus_client"
            ) from error
        self._gauge = prometheus_client.Gauge
        self.registry = prometheus_client.CollectorRegistry() if registry is None else registry
        self.namespace = namespace
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()

    def write(self, metrics: PerformanceMetrics, step: int | None = None) -> None:
        """更新各仪表；Prometheus 自己记时间，step 不用。"""
        del step
        with self._lock:
            for name, value in metrics.scalars().items():
                if name not in self._gauges:
                    self._gauges[name] = self._gauge(
                        name,
                        f"{name}，见 PerformanceMetrics",
                        namespace=self.namespace,
                        registry=self.registry,
                    )
                self._gauges[name].set(value)


def _summary_writer(path: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnsupportedError(
            "TensorBoardSink 需要 tensorboard：pip install tensorboard"
        ) from error
    return SummaryWriter(str(path))
