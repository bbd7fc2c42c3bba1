"""在标准库源码上训练的字节级 BPE 分词器，任何文本都能无损往返。"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

#: 文档之间的分隔，同时是序列的开始与结束标记。
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
VOCAB_SIZE = 4096

# 标识符连同前导空格、至多两位数字、一串符号、缩进（留下最后一个空格给后面的词）。
# 不设英文缩写一类：代码里的撇号几乎总是字符串的引号。
_SPLIT = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """训练词表大小为 ``VOCAB_SIZE`` 的字节级 BPE；0 号是文档分隔，1 号是填充。"""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """写出 tokenizer.json 与 tokenizer_config.json，供 AutoTokenizer 直接载入。"""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    ).save_pretrained(folder)


def encode_files(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """把若干文本接成一条 uint16 token 流，每篇之前有一个文档分隔。"""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    pieces: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(texts)):
        pieces.append(separator)
        pieces.extend(encoding.ids)
    return np.asarray(pieces, dtype=np.uint16)
