"""文档的分界与填充。"""

import pytest
import torch

from deepseek_opt.errors import InputError
from deepseek_opt.mtp.documents import document_runs, places

TOKENS = torch.zeros(1, 6, dtype=torch.long)


def runs(**given):
    found = document_runs(TOKENS, **{name: torch.tensor([v]) for name, v in given.items()})
    return None if found is None else found[0].tolist()


def test_one_document_needs_nothing():
    assert runs() is None and runs(position_ids=[3, 4, 5, 6, 7, 8]) is None
    assert runs(attention_mask=[1] * 6) is None and runs(document_ids=[7] * 6) is None


def test_positions_that_stop_growing_start_a_document():
    assert runs(position_ids=[0, 1, 2, 0, 1, 0]) == [0, 0, 0, 1, 1, 2]
    assert runs(position_ids=[0, 0, 1, 2, 3, 4]) == [0, 1, 1, 1, 1, 1]  # 只有一个词元的文档
    assert runs(position_ids=[0, 1, 900, 901, 902, 903]) is None  # 空隙不是分界


def test_document_ids_win_and_equal_numbers_apart_are_two_documents():
    assert runs(document_ids=[5, 5, 2, 2, 5, 5], position_ids=[0] * 6) == [0, 0, 1, 1, 2, 2]


def test_padding_is_marked_on_both_sides():
    assert runs(attention_mask=[0, 0, 1, 1, 1, 0]) == [-1, -1, 1, 1, 1, -1]
    assert runs(attention_mask=[0] * 6) == [-1] * 6


def test_places_count_from_the_start_of_each_run():
    found = places(torch.tensor([[-1, -1, 0, 0, 0, 1], [3, 3, 3, 3, 3, 3]]))
    assert found.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_wrong_shape():
    with pytest.raises(InputError, match="position_ids"):
        document_runs(TOKENS, torch.zeros(1, 7))
