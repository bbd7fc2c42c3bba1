"""套件 mtp：各种项目在随包模型上跑几个词元，读数齐全、结果相同；加宽的模型输出不变。"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
# pylint: disable=wrong-import-position

from deepseek_opt.benchmarks import mtp, mtp_models, mtp_training, run_suite  # noqa: E402
from deepseek_opt.config import MTPConfig  # noqa: E402


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(mtp, "_new", lambda env: 6)
    monkeypatch.setattr(mtp_models, "WIDEN", 2)
    monkeypatch.setattr(mtp_training, "_LENGTH", 16)
    monkeypatch.setattr(mtp_training, "_ROWS", 1)
    for cached in (mtp_models.original, mtp_models.widened, mtp_models.for_use_mtp):
        cached.cache_clear()
    yield
    for cached in (mtp_models.original, mtp_models.widened, mtp_models.for_use_mtp):
        cached.cache_clear()


def test_every_kind_of_case():
    only = ("mtp.fp32.b1", "mtp.b1.loop", "mtp.b1.hf", "acceptance", "exact.b1", "wide.b1", "train")
    result = run_suite("mtp", quick=True, only=only)
    rows = {row.key: row for row in result.rows}
    assert len(rows) == len(result.rows) == 11
    for key in ("mtp.fp32.b1.use_mtp", "mtp.b1.loop", "mtp.b1.hf", "mtp.wide.b1"):
        row = rows[key]
        assert row.ratio > 0 and row.roofline > 0
        assert 0 <= row.details["equal_tokens"] <= 1 <= row.details["tokens_per_step"]
    assert rows["mtp.fp32.b1.use_mtp"].details["equal_tokens"] == 1
    assert rows["mtp.exact.b1"].ours == 100 and rows["mtp.exact.b1"].met
    assert all(0 <= rows[f"mtp.acceptance.{k}"].ours <= 100 for k in range(1, 5))
    assert rows["mtp.train.shipped"].details["slower"] > 0
    assert "词元/步" in result.render()


def test_all_rows_of_the_table_are_there():
    keys = [case.key for case in mtp._build(None)]
    assert len(keys) == len(set(keys))
    assert {f"mtp.table.b{b}.d{d}" for b in (1, 4, 16, 32) for d in range(1, 9)} <= set(keys)


def test_widened_model_computes_the_same():
    plain, wide = mtp_models.original(torch.float32), mtp_models.widened(torch.float32)
    ids = mtp_models.prompts(2, 16)
    with torch.no_grad():
        wanted, got = plain(ids).logits, wide(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in wide.parameters()) > 1.3 * sum(
        p.numel() for p in plain.parameters()
    )
    fast = mtp_models.optimized(wide, MTPConfig(draft_length=2, fixed_draft_length=True))
    assert torch.equal(mtp_models.run(fast, ids, 5), mtp_models.run(plain, ids, 5))
