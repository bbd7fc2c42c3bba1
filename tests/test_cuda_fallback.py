"""CUDA 上缺少核的部分由原实现计算，报告里写明缺什么；不会中途出错。"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepseek_opt import (
    DenseConfig,
    MLAConfig,
    MOEConfig,
    MTPConfig,
    OptimizationProfile,
    _native,
    attach_mtp,
    driver,
    generate,
    ops,
    optimize,
)
from deepseek_opt.errors import UnsupportedError
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.optimize import find_state
from tests.fake_cuda import CUDA, Watch, fake_cuda, move
from tests.tiny_models import make_model

DENSE = DenseConfig(ffn=True, lm_head=True, projections=True, norms=True)
ABSENT = "设备 cuda 上一个核都没有"


def absent(device: str, _names: tuple, _grad: bool = False) -> str | None:
    """代替 ``_native.missing``：有没有 GPU 的机器上都一样。"""
    return None if device == "cpu" else ABSENT


def reasons(model) -> set[str]:
    return {reason for _, reason in find_state(model).runtime.fallbacks}


def test_missing_says_what_is_missing(monkeypatch):
    every = ("linear", "rms_norm", "mla_prefill")
    assert _native.missing("cpu", every, True) is None
    assert _native.missing("xpu", ("linear",)) == "设备 xpu 上还没有 linear 的核"
    if torch.version.cuda is None:
        assert "torch 不带 CUDA" in _native.missing("cuda", every)
    registered = {"linear", "linear_backward", "mla_prefill"}
    monkeypatch.setattr(_native, "cuda_loaded", lambda: True)
    monkeypatch.setattr(_native, "_has_kernel", lambda name, device: name in registered)
    _native._missing.cache_clear()
    try:
        assert _native.missing("cuda", ("linear", "mla_prefill")) is None
        assert _native.missing("cuda", ("linear",), True) is None
        text = _native.missing("cuda", every, True)
        assert text == "设备 cuda 上还没有 rms_norm、rms_norm_backward、mla_prefill_backward 的核"
    finally:
        _native._missing.cache_clear()
    monkeypatch.setattr(_native, "load", lambda: False)
    monkeypatch.setattr(_native, "load_error", lambda: "没有找到。")
    assert _native._missing.__wrapped__("cuda", every, False) == "本地算子库不可用：没有找到。"


def test_old_gpu_is_named(monkeypatch):
    """太旧的 GPU 上由原实现计算，原因说出是哪一块。"""
    monkeypatch.setattr(_native, "cuda_loaded", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["T4", "A100"][i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(7, 5), (8, 0)][i])
    text = _native._missing.__wrapped__("cuda", ("linear",), False)
    assert "T4（sm_75） 太旧" in text and "A100" not in text and "CUDA_VISIBLE_DEVICES" in text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(_native, "_has_kernel", lambda name, device: True)
    assert _native._missing.__wrapped__("cuda", ("linear",), False) is None


@pytest.mark.parametrize("version", [(12, 8), (13, 0), (13, 2), (14, 0), (0, 0)])
def test_old_driver_is_named(monkeypatch, version):
    """驱动老一个大版本：库能载入，核却启动不了。没有驱动时照常：没有 CUDA 张量。"""
    library = SimpleNamespace(dso_cuda_runtime_version=lambda: 13000)
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda path: library)
    monkeypatch.setattr(_native, "driver_version", lambda: version)
    reason = _native._old_driver(Path("_C_cuda.so"))
    if version == (12, 8):
        assert "CUDA 13.0 编译的" in reason and "最高支持 CUDA 12.8：请升级驱动" in reason
    else:
        assert reason is None


@pytest.mark.parametrize("code, want", [(0, (13, 2)), (3, (0, 0))])
def test_driver_is_asked(monkeypatch, code, want):
    def ask(version):
        version._obj.value = 13020
        return code

    library = SimpleNamespace(cuDriverGetVersion=ask)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
    assert driver.driver_version() == want


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    assert driver.driver_version() == (0, 0)


def test_whole_model_runs_without_kernels(monkeypatch):
    model = make_model("youtu")
    optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DENSE))
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(_native, "missing", absent)
        ids = torch.empty(2, 9, dtype=torch.int64, device=CUDA)
        out = move(model)(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert out.logits.device == CUDA
    assert reasons(model) == {ABSENT}


def test_projections_on_a_gpu_are_the_modules_own(monkeypatch):
    """投影走 nn.Linear 自己，注意力照样用本库的。"""
    model = make_model("youtu")
    optimize(model, OptimizationProfile(mla=MLAConfig()))
    with fake_cuda(monkeypatch), Watch() as watch:
        ids = torch.empty(2, 9, dtype=torch.int64, device=CUDA)
        move(model)(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert not reasons(model) and "linear" not in watch.ops and "mla_decode" in watch.ops


class _Recorder:
    """原实现的替身：专家的原实现要看词元分给了谁，假的张量做不到。"""

    def __init__(self):
        self.calls = 0

    def __call__(self, hidden, *_args, **_kwargs):
        self.calls += 1
        return hidden


@pytest.mark.parametrize("training", [False, True])
def test_moe_falls_back(monkeypatch, training):
    model = make_model("deepseek_v3").train(training)
    optimize(model, OptimizationProfile(moe=MOEConfig()))
    patches = [p for m in model.modules() for p in m.__dict__.values() if isinstance(p, Patch)]
    patches = [p for p in patches if p.kind == "moe"]
    assert {type(p).__name__ for p in patches} == {"ExpertsPatch", "MoeBlockPatch", "RouterPatch"}
    with fake_cuda(monkeypatch):
        hidden = torch.empty(6, 64, device=CUDA)
        indices = torch.empty(6, 2, dtype=torch.int64, device=CUDA)
        move(model)
        monkeypatch.setattr(_native, "missing", absent)
        for patch in patches:
            recorder = _Recorder()
            monkeypatch.setattr(patch, "call_original", recorder)
            extra = (indices, hidden[:, :2]) if type(patch).__name__ == "ExpertsPatch" else ()
            assert patch(hidden, *extra).device == CUDA and recorder.calls == 1
    assert reasons(model) == {ABSENT}


def test_mtp_falls_back(monkeypatch):
    model = make_model("youtu")
    attach_mtp(model, config=MTPConfig(), fresh=True)
    optimize(model, OptimizationProfile(mla=MLAConfig(), mtp=MTPConfig()))
    patch = model.generate
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(_native, "missing", absent)
        move(model)
        ids = torch.empty(1, 4, dtype=torch.int64, device=CUDA)
        monkeypatch.setattr(patch, "call_original", lambda *_args, **_kwargs: "原来的")
        assert patch(ids, max_new_tokens=2) == "原来的"
        with pytest.raises(UnsupportedError, match="不能用 MTP 生成：设备 cuda"):
            generate(model, ids)
    assert reasons(model) == {f"没有用 MTP：{ABSENT}"}


def test_operators_name_what_differs():
    """没有核时的报错：一个设备说没有核，几个设备说哪个参数在哪里。"""
    x, weight = torch.ones(2, 3, device="meta"), torch.ones(4, 3)
    with pytest.raises(ValueError, match="linear：.*x 在 meta，weight 在 cpu"):
        ops.linear(x, weight)


def test_dispatch_failure_names_the_argument(monkeypatch):
    class Refusing:
        _schema = torch.ops.deepseek_opt.linear.default._schema

        def __call__(self, *_args):
            raise NotImplementedError("Could not run")

    class Packet:
        default = Refusing()

    monkeypatch.setattr(ops._run, "_OPS", type("Ops", (), {"linear": Packet}))
    with pytest.raises(ValueError, match="linear：.*x 在 cpu，weight 在 meta"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 3, device="meta"))


def test_module_of_other_types_is_untouched(monkeypatch):
    """RMSNorm、Linear 的补丁在没有核的设备上给出原实现的结果（形状、设备）。"""
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-6))
    optimize(model, OptimizationProfile(dense=DENSE))
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(_native, "missing", absent)
        out = move(model)(torch.empty(3, 8, device=CUDA))
        assert out.shape == (3, 8) and out.device == CUDA
    assert len(find_state(model).runtime.fallbacks) == 2
