"""Where documents begin, and how they are cut."""

from __future__ import annotations

import torch

from hopescale.ops.documents import Documents

IDS = torch.tensor([[7, 7, 3, 3, 3, 7], [1, 1, 1, 1, 1, 2]], dtype=torch.int32)


def test_a_document_begins_where_the_id_changes_and_with_each_sequence():
    documents = Documents.of(IDS)
    assert documents.bounds == (0, 2, 5, 6, 11, 12)
    assert documents.offsets.tolist() == list(documents.bounds)
    assert documents.first.tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 0, 5]]
    assert documents.lengths == [2, 3, 1, 5, 1]
    assert documents.last == [2, 4]


def test_pieces_are_counted_from_the_first_token_of_a_document():
    pieces = Documents.of(IDS).cut(2)
    assert pieces.bounds == (0, 2, 4, 5, 6, 8, 10, 11, 12)
    assert pieces.offsets.tolist() == list(pieces.bounds)
    assert pieces.first.tolist() == [[0, 0, 2, 2, 4, 5], [0, 0, 2, 2, 4, 5]]


def test_a_document_may_have_begun_in_an_earlier_piece():
    documents = Documents.of(IDS, begun=torch.tensor([[3], [0]]))
    assert documents.first.tolist() == [[-3, -3, 2, 2, 2, 5], [0, 0, 0, 0, 0, 5]]
    assert documents.before == [3, 0, 0, 0, 0] and documents.begun == (3, 0)
    pieces = documents.cut(2)
    assert pieces.bounds == (0, 1, 2, 4, 5, 6, 8, 10, 11, 12) and pieces.begun == (1, 0)
    assert pieces.first.tolist() == [[-1, 1, 2, 2, 4, 5], [0, 0, 2, 2, 4, 5]]


def test_documents_of_some_sequences():
    documents = Documents.of(IDS, begun=torch.tensor([[3], [0]])).rows([1])
    assert documents.bounds == (0, 5, 6) and documents.begun == (0,)
    assert documents.offsets.tolist() == [0, 5, 6] and documents.first.tolist() == [[0, 0, 0, 0, 0, 5]]


def test_a_sequence_may_be_one_document():
    whole, same = Documents.whole(2, 6, IDS.device), Documents.of(torch.zeros_like(IDS))
    assert whole.bounds == same.bounds == (0, 6, 12)
    assert torch.equal(whole.offsets, same.offsets)
    assert torch.equal(whole.first, same.first)
