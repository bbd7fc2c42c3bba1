"""几个进程的测试共用。"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from torch import distributed as dist


@contextmanager
def one_process(folder: Path, backend: str = "gloo") -> Iterator[None]:
    """块内有只含本进程的组；用到它的（DDP）要在出块之前放掉。

    组的最后一个引用留在这里：它析构时让出 GIL。DDP 的不让，而 gloo 的线程可能正等着 GIL，就都停在那里。
    """
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()
        del group


def leave() -> NoReturn:
    """各进程一起结束：先走的会让另一个的 gloo 线程中止。

    也不再析构：DDP、FSDP 还拿着进程组，析构时要等 gloo 的线程，偶尔一直等不到。
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
