"""专家负载的计数：前向里原地累加，随时可读。"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deepseek_opt.errors import InputError


def in_backward() -> bool:
    """当前线程是否正处在反向之中。

    激活检查点在反向里重算前向，重算的那一遍不应再计数。torch.utils.checkpoint 自己也用这个编号区分。
    """
    return torch._C._current_graph_task_id() != -1


_local = threading.local()
_lock = threading.Lock()  # 累加与读取都很短，全部计数器合用一把


@contextmanager
def uncounted() -> Iterator[None]:
    """块内（本线程）的前向不计数：核对一个写法用的几个词元不是用户的。"""
    before = _is_paused()
    _local.paused = True
    try:
        yield
    finally:
        _local.paused = before


def _is_paused() -> bool:
    return getattr(_local, "paused", False)


@contextmanager
def gathered() -> Iterator[None]:
    """块内（本线程）不是训练的计数先记着，出块时一起加：一步几十层，在 CUDA 上只用一个核。中途出错的不加。"""
    before = getattr(_local, "later", None)
    later: list[tuple[LoadCounter, Tensor]] = []
    _local.later = later
    try:
        yield
    finally:
        _local.later = before
    _add_all(later)


def _add_all(later: list[tuple[LoadCounter, Tensor]]) -> None:
    with _lock:
        apart = len({id(counter) for counter, _ in later}) == len(later)
        for counter, counts in later:
            counter._follow(counts.device)
            if not apart:  # 同一个计数器用了两次：不能同时加
                counter._total.add_(counts)
        if apart and later:
            totals = [counter._total for counter, _ in later]
            torch._foreach_add_(totals, [counts for _, counts in later])


class LoadCounter:
    """各专家分到的词元数，int64。

    两套计数：累计的（:meth:`snapshot`，供统计，eval 也计）与待用的（:meth:`pending`，只有训练时的前向
    才计，:func:`~deepseek_opt.update_expert_bias` 用过即清零）。激活检查点在反向里的重算两套都不计。
    累加只是一次 O(E) 的原地加法：不求导，不同步设备，可以在多个线程里调用
    （几个 CUDA 流同时加同一个计数器时可能少计）。深拷贝、pickle 得到清零的新计数器。

    参数
    ----
    num_experts : 专家数 E。

    抛出 InputError：num_experts 不是正整数；counts 的长度不是 E。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt.load import LoadCounter
    >>> load = LoadCounter(3)
    >>> load.add_indices(torch.tensor([[0, 2], [2, 3]]))  # 3 是哨兵，不计
    >>> load.snapshot()
    tensor([1, 0, 2])
    """

    def __init__(self, num_experts: int):
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
            raise InputError.expected("num_experts", "正整数", num_experts)
        self.num_experts = num_experts
        self._allocate(torch.device("cpu"))

    def _allocate(self, device: torch.device) -> None:
        # 第 0 行累计，第 1 行待用：训练时一次广播加法更新两行。末列是被丢弃的个数。
        with torch.inference_mode(False):
            self._table = torch.zeros(2, self.num_experts, dtype=torch.int64, device=device)
            self._dropped = torch.zeros((), dtype=torch.int64, device=device)
            self._total = self._table[0]  # 每层每步都要，不必每次取视图

    def add(
        self, counts: Tensor, *, dropped: Tensor | None = None, training: bool | None = None
    ) -> None:
        """加上一次前向的计数。

        counts : [E] 整数。dropped : 这次因超出容量被丢弃的（词元，专家）对数，标量，可以没有。
        training : 是否训练中的前向（计入待用的）；None 时看是否记录梯度。
        """
        if in_backward() or _is_paused():
            return
        if counts.shape != (self.num_experts,) or counts.is_floating_point():
            raise InputError.expected("counts", f"形状 [{self.num_experts}] 的整数张量", counts)
        if training is None:
            training = torch.is_grad_enabled()
        later = getattr(_local, "later", None)
        if later is not None and not training and dropped is None:
            later.append((self, counts))
            return
        with _lock:  # 整数张量没有梯度，不必另外关掉求导
            self._follow(counts.device)
            (self._table if training else self._total).add_(counts)
            if dropped is not None:
                self._dropped.add_(dropped)

    def add_indices(self, indices: Tensor, *, training: bool | None = None) -> None:
        """由专家下标（任意形状的整数，大于等于 E 的是哨兵）计数并加上。"""
        if in_backward() or _is_paused():
            return
        flat = indices.reshape(-1).clamp(max=self.num_experts)
        # 不用 bincount：它在 CUDA 上要同步设备才知道输出的长度
        counts = flat.new_zeros(self.num_experts + 1, dtype=torch.int64)
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
        self.add(counts[:-1], training=training)

    def _follow(self, device: torch.device) -> None:
        """计数随模型走：模型换了设备，计数器跟着搬一次。"""
        if self._table.device != device:
            with torch.inference_mode(False):
                self._table = self._table.to(device)
                self._dropped = self._dropped.to(device)
                self._total = self._table[0]

    @property
    def address(self) -> int:
        """累计的计数此刻在哪里；搬到别的设备就变了。"""
        return self._table.data_ptr()

    def snapshot(self) -> Tensor:
        """累计的计数 [E]，一份拷贝。"""
        with _lock:
            return self._total.clone()

    def pending(self) -> Tensor:
        """上次 :meth:`clear_pending` 以来训练前向的计数 [E]，一份拷贝。"""
        with _lock:
            return self._table[1].clone()

    def dropped(self) -> int:
        """因超出容量被丢弃的（词元，专家）对的累计个数。"""
        with _lock:
            found = self._dropped.clone()
        return int(found)  # 要等设备，所以放在锁外

    def clear_pending(self) -> None:
        """待用的计数清零。"""
        with _lock:
            self._table[1].zero_()

    def reset(self) -> None:
        """全部清零。"""
        with _lock:
            self._table.zero_()
            self._dropped.zero_()

    def __reduce__(self):
        return type(self), (self.num_experts,)

    def __repr__(self) -> str:
        return f"LoadCounter(num_experts={self.num_experts}, 计数={self.snapshot().tolist()})"


def load_holders(module: object) -> list[object]:
    """module 自身与它的 forward 补丁之中，持有 ``load_counter`` 的。"""
    patch = getattr(module, "__dict__", {}).get("forward")
    return [
        holder
        for holder in (module, patch)
        if isinstance(getattr(holder, "load_counter", None), LoadCounter)
    ]
