"""随包小模型的中文模型卡。"""

from __future__ import annotations

from pathlib import Path

from deepseek_opt import corpus

_TEMPLATE = """\
---
language: code
library_name: transformers
license: apache-2.0
tags: [deepseek_v3, mla, moe, python]
---

# stdlib_model：在 Python 标准库源码上训练的 DeepSeek-V3 结构小模型

随 deepseek_opt 一起发布，给演示、验证与基准当真实输入：准确率、贪心续写、缓存大小都出自一个
真的会预测的模型，不需要下载。它不是编程助手。

## 用法

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "deepseek_opt/assets/stdlib_model"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("def read_lines(path):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

## 结构

| 项 | 值 |
|---|---|
| 类 | DeepseekV3ForCausalLM（MLA + MoE + 共享专家） |
| 参数 | {parameters:,}，bf16，权重文件 {file_mb:.2f} MB |
| 层 | {layers}，前 {dense} 层稠密（中间维 {intermediate}），其余 MoE |
| 隐藏维 / 词表 | {hidden} / {vocab}（字节级 BPE，任何文本无损往返） |
| 注意力 | {heads} 头，q_lora {q_lora}，kv_lora {kv_lora}，nope {nope}，rope {rope}，v {value} |
| 专家 | {experts} 个选 {top_k}，中间维 {moe_intermediate}；共享专家 {shared} 份 |
| 位置 | rope_theta {theta:g}，最长 {max_length} |

## 数据

CPython {python} 标准库的 .py 源码（`sysconfig` 的 stdlib 目录，含测试目录；不含 site-packages、
字符编码表与 pydoc 的主题表）：{training_files} 个文件、{training_mb:.1f} MB、{train_tokens_m:.2f} M token。

留出、从不参与训练的模块（连同各自的测试文件，共 {held_out_files} 个文件）：
{held_out}。

## 训练

{steps} 步，{tokens_m:.1f} M token（约 {epochs:.1f} 遍），墙上 {minutes:.0f} 分钟，2 个 CPU 核
（与别的任务共用，低优先级），没有 GPU。隐藏层矩阵用 Muon，嵌入、语言模型头、归一化权重与路由用
AdamW；计算 bf16，主权重 fp32；后 55% 的时间学习率线性降到零。上下文从 512 逐步加到 4096，并在一部分
窗口的位置编号里留随机空隙，让 16384 以内的相对距离都见过。负载均衡用无辅助损失的偏置更新，结果就是
权重里的 `e_score_correction_bias`。

## 读数

全部留出文件，每 2048 token 一段，段间不带上下文，原版 transformers：

| 类型 | token 数 | 损失 (nat/token) | 下一 token 准确率 | 比特 / 字节 |
|---|---|---|---|---|
{scores}

最长的留出文件前 16384 个 token，按位置的平均损失（fp32，带全部上文）：

| 位置 | 损失 |
|---|---|
{by_position}

## 续写样例

留出文件，贪心，fp32。`# ▼` 一行是添加的标记，之前是提示的末尾，之后是续写；参数这么小的模型
贪心续写常陷入重复。

{samples}

## 局限

参数与训练量都很小：语法、缩进与标准库的行文像样，逻辑多半不对；没见过标准库以外的代码与自然语言；
会复述训练文本里的片段。实际训练的窗口不超过 4096，更长的上下文靠位置空隙
外推，按位置的读数见上。

## 重新训练

```
python examples/train_stdlib_model.py --minutes {minutes:.0f} \\
    --state build/stdlib_train --out deepseek_opt/assets/stdlib_model
```

断点写在 `--state`，重新执行即续训。别的 Python 版本的标准库不同，结果也会略有不同。
训练文本与其许可证（PSF License）来自 CPython。
"""


def _sample(sample: dict[str, str]) -> str:
    """一个续写样例：来源、提示的最后 8 行、续写。"""
    tail = "\n".join(sample["prompt"].splitlines()[-8:]).strip("\n")
    code = f"{tail}\n# ▼ 续写\n{sample['text'].strip(chr(10))}"
    return f"`{sample['source']}`：\n\n```python\n{code}\n```"


def write_card(path: Path, figures: dict, config) -> None:
    """由导出时的读数写模型卡；卡里的数字全部来自 ``figures`` 与 ``config``。"""
    progress = figures["progress"]
    scores = "\n".join(
        f"| {name} | {s['tokens']:,} | {s['loss']:.3f} | {s['accuracy']:.2%} "
        f"| {s['bits_per_byte']:.3f} |"
        for name, s in figures["scores"].items()
    )
    positions = "\n".join(f"| {name} | {v:.3f} |" for name, v in figures["by_position"].items())
    path.write_text(
        _TEMPLATE.format(
            parameters=figures["parameters"],
            file_mb=figures["file_bytes"] / 1e6,
            layers=config.num_hidden_layers,
            dense=config.first_k_dense_replace,
            intermediate=config.intermediate_size,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            heads=config.num_attention_heads,
            q_lora=config.q_lora_rank,
            kv_lora=config.kv_lora_rank,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            moe_intermediate=config.moe_intermediate_size,
            shared=config.n_shared_experts,
            theta=config.rope_parameters["rope_theta"],
            max_length=config.max_position_embeddings,
            python=figures["python"],
            training_files=figures["training_files"],
            training_mb=figures["training_bytes"] / 1e6,
            train_tokens_m=progress["train_tokens"] / 1e6,
            held_out_files=figures["held_out_files"],
            held_out="、".join(f"`{name}`" for name in corpus.HELD_OUT_MODULES),
            steps=progress["steps"],
            tokens_m=progress["tokens"] / 1e6,
            epochs=progress["tokens"] / progress["train_tokens"],
            minutes=(progress["deadline"] - progress["started"]) / 60,
            scores=scores,
            by_position=positions,
            samples="\n\n".join(_sample(sample) for sample in figures["samples"]),
        ),
        encoding="utf-8",
    )
