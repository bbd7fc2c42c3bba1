"""int4 的 MoE 模型对稠密模型的基准：小形状上两个模型算得对、读数齐全；没有对时间的断言。"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
# pylint: disable=wrong-import-position

from deepseek_opt import cli, restore  # noqa: E402
from deepseek_opt.benchmarks import counts, runner, shapes, sparse_dense  # noqa: E402
from deepseek_opt.errors import InputError  # noqa: E402
from deepseek_opt.quantize import dequantize  # noqa: E402
from tests.tolerances import tol  # noqa: E402

TINY = shapes.TINY_SPARSE
_IDS = torch.arange(24).view(2, 12)


pytestmark = pytest.mark.usefixtures("small_buffers")


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """整个模型的 logits：误差的均方根按它们自己的大小比较（两边的 bf16 舍入不同）。"""
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= tol(torch.int8)["rtol"]


def test_sparse_model_never_has_dense_experts_and_computes_what_they_say():
    model = sparse_dense.build_sparse(TINY)
    inner = [m for m in model.modules() if hasattr(m, "gate_up_proj")]
    assert len(inner) == TINY.config["num_hidden_layers"]
    assert all(p.is_meta for m in inner for p in (m.gate_up_proj, m.down_proj))
    with torch.inference_mode():
        actual = model(_IDS).logits
    restore(model, dequantize=True)
    with torch.inference_mode():
        expected = model(_IDS).logits
    assert expected.std() > 0
    _close(actual, expected)


def test_dense_model_computes_what_its_weights_say():
    model = sparse_dense.build_dense(TINY)
    ffn = model.model.layers[0].mlp
    gate, up = dequantize(ffn.gate_up)[0].chunk(2)
    down = dequantize(ffn.down)[0]
    assert gate.shape == (9 * 32, 64) and gate.std() == pytest.approx(shapes.STD, rel=0.05)
    x = torch.randn(2, 3, 64).bfloat16()
    with torch.inference_mode():
        hidden = torch.nn.functional.silu(x.float() @ gate.T) * (x.float() @ up.T)
        _close(ffn(x), hidden @ down.T)
        assert model(_IDS).logits.isfinite().all()


def test_both_models_have_the_same_size_and_the_counts_agree_with_them():
    for shape in (TINY, shapes.SPARSE_13B):
        total, active = sparse_dense.parameter_counts(shape.config)
        dense = sparse_dense.parameter_counts(sparse_dense.dense_config(shape.config))
        router = shape.config["hidden_size"] * shape.config["num_hidden_layers"]
        routers = router * (shape.config["n_routed_experts"] - 1)
        assert dense[0] == dense[1] == total - routers and active < total
    assert total == pytest.approx(13e9, rel=0.02) and active == pytest.approx(1.3e9, rel=0.02)
    model = shapes.build_on_meta(shapes.make_config(shapes.SPARSE_13B), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == total


def test_decode_counts_follow_the_touched_experts():
    config = TINY.config
    cost = counts.model_decode(config, 1, 8, 2)
    layers, expert = config["num_hidden_layers"], 3 * 64 * 32
    same = counts.model_decode(config, 1, 8, 2, touched=layers * 2)
    assert cost == same
    fewer = counts.model_decode(config, 1, 8, 2, expert_itemsize=0.5, touched=3)
    assert (
        cost.read_bytes - fewer.read_bytes
        == ((layers * 2 + layers) * 2 - (3 + layers) * 0.5) * expert
    )
    assert cost.flops == fewer.flops


def test_suite_on_the_tiny_shape(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["bench", "moe", "--shape", TINY.name, "--quick", "--json", str(file)]
    assert cli.run(arguments) == 0
    assert "int4" in capsys.readouterr().out
    (one, many, memory) = runner.run_suite("moe", shape=TINY, quick=True).rows
    assert (one.key, many.key) == ("whole.decode.1", "whole.decode.3")
    for row in (one, many):
        assert row.ours > 0 and row.peer > 0 and row.target == 1.3 and "bf16" in row.note
        assert row.details["read_bytes"][0] < row.details["read_bytes"][1]
    assert memory.unit == "MiB" and memory.ours > 0
    assert memory.peer == pytest.approx(one.details["parameters"] * 2 / 2**20)


def test_shape_belongs_to_one_suite():
    with pytest.raises(InputError, match="只用于套件 moe"):
        runner.run_suite("mla", shape=TINY)
