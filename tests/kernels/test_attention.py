"""Each way to keep attention within documents: its mask pair by pair, when it is taken, and what it keeps.

The dense mask and document by document are held to plain products, gradients too, in test_expressions.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing import assert_close

from gpt_lightning.kernels import attention
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from tests.shapes import GROUPED

# Rows of one length that differ: one document; a boundary after the first token and one before the last;
# boundaries on, just before and just after those of FlexAttention's blocks.
ROWS = [[300], [1, 298, 1], [128, 128, 44], [127, 2, 127, 44], [1] * 40 + [100, 60, 100]]


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows])


def pairs(rows: list[list[int]]) -> Tensor:
    """Who sees whom [B, T, T], filled document by document."""
    seen = torch.zeros(len(rows), sum(rows[0]), sum(rows[0]), dtype=torch.bool)
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            for query in range(begin, begin + length):
                seen[row, query, begin : query + 1] = True
            begin += length
    return seen


def positions_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def q_k_v(B: int, T: int, K: int = 16) -> Tensor:
    """Queries, keys and values [3, B, H, T, K]."""
    return torch.randn(3, B, 2, T, K, generator=torch.Generator().manual_seed(3))


def test_positions_restart_with_each_document() -> None:
    assert torch.equal(attention.document_positions(ids_of(ROWS)), positions_of(ROWS))
    # Ids name runs: only that they change counts.
    assert attention.document_positions(torch.tensor([[7, 7, 0, 7]])).tolist() == [[0, 1, 0, 0]]


def test_the_dense_mask_is_that_of_the_pairs() -> None:
    assert torch.equal(attention.dense_mask(positions_of(ROWS))[:, 0], pairs(ROWS))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no backward pass on a CPU."""
    monkeypatch.setattr(attention, "document_mask", lambda positions, *rest: attention.block_mask(positions))
    q, k, v = q_k_v(len(ROWS), 300)
    attend = attention.Attend(q, ids_of(ROWS), head_dim=16, dropout_p=0.0)
    assert torch.equal(attend.positions, positions_of(ROWS))
    actual = attend(*(x.transpose(1, 2) for x in (q, k, v)), 0.0).transpose(1, 2)
    assert_close(actual, F.scaled_dot_product_attention(q, k, v, attn_mask=pairs(ROWS)[:, None]))


@pytest.mark.parametrize("T", [1, 127, 128, 129, 256, 300])
def test_blocks_are_marked_by_what_their_pairs_see(T: int) -> None:
    """FlexAttention's kernels skip what is not marked, and do not look into what is marked as whole."""
    rows = [[T], [1] * T, [min(T, 128), T - 128] if T > 128 else [T], ROWS[3] if T == 300 else [T]]
    mask, seen = attention.block_mask(positions_of(rows)), pairs(rows)
    assert mask.seq_lengths == (T, T) and mask.full_kv_num_blocks is not None
    for row in range(len(rows)):
        for i, queries in enumerate(seen[row].split(128)):
            blocks = [block for block in queries.split(128, dim=1)]
            whole = [j for j, block in enumerate(blocks) if block.all()]
            partly = [j for j, block in enumerate(blocks) if block.any() and j not in whole]
            found = [
                indices[row, 0, i, : counts[row, 0, i]].tolist()
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            ]
            assert sorted(found[0] + found[1]) == sorted(partly + whole)
            # The last block of a row that 128 does not divide may go either way.
            assert set(found[1]) <= set(whole) and (T % 128 or found[1] == whole)


def test_blocks_are_those_of_pytorch() -> None:
    rows = [[256], [128, 128], [1, 255], [100, 100, 56], [1] * 256]
    ids = ids_of(rows)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (ids[b, query] == ids[b, key]) & (query >= key)

    expected = create_block_mask(sees, len(rows), None, 256, 256, device="cpu")
    actual = attention.block_mask(positions_of(rows))
    for part in ("kv", "full_kv", "q", "full_q"):  # q: the backward pass goes by columns
        counts, expected_counts = (getattr(mask, f"{part}_num_blocks") for mask in (actual, expected))
        assert torch.equal(counts, expected_counts), part
        indices, expected_indices = (getattr(mask, f"{part}_indices") for mask in (actual, expected))
        for place in counts.nonzero():
            n = counts[tuple(place)]
            assert torch.equal(indices[tuple(place)][:n], expected_indices[tuple(place)][:n]), part


@pytest.mark.parametrize("shape", [{}, GROUPED])
def test_long_rows_equal_each_document_alone(shape: dict[str, Any]) -> None:
    model = GPTModel(GPTConfig(50, 600, n_layers=2, n_heads=2, d_model=16, **shape)).eval()
    rows = [[600], [1, 598, 1], [127, 2, 127, 344]]
    ids = torch.randint(50, (len(rows), 600), generator=torch.Generator().manual_seed(0))
    packed = model.hidden_states(ids, document_ids=ids_of(rows))
    for row, lengths in enumerate(rows):
        alone = [model.hidden_states(piece[None])[0] for piece in ids[row].split(lengths)]
        assert_close(packed[row], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_long_rows_keep_no_mask_for_the_backward_pass() -> None:
    T = 1024
    q, k, v = q_k_v(2, T).requires_grad_()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = attention.document_mask(positions_of([[T], [T // 2, T // 2]]), 16, 0.1)
    assert isinstance(mask, attention.Documents)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        mask.attend(q, k, v, 0.0)
    assert sum(kept.values()) < 6 * q.nbytes < 2 * T * T


def test_dropout_is_that_of_attention() -> None:
    """With one-hot values the outputs are the attention weights: dropped, or larger by 1 / (1 - p)."""
    T = 512
    q, k, _ = q_k_v(1, T)
    v = torch.eye(T).expand(1, 2, T, T)
    documents = attention.Documents(positions_of([[T // 2, T // 2]]))
    torch.manual_seed(0)
    weights, dropped = documents.attend(q, k, v, 0.0), documents.attend(q, k, v, 0.25)
    left = dropped != 0
    assert_close(dropped[left], weights[left] / 0.75)
    assert abs(left.sum() / (weights != 0).sum() - 0.75) < 0.01


@pytest.mark.parametrize(
    ("device", "T", "head_dim", "dropout_p", "triton", "kind"),
    [
        ("cuda", 1024, 64, 0.0, True, "flex"),
        ("cuda", 256, 64, 0.0, True, "flex"),
        ("cuda", 1024, 64, 0.1, True, "dense"),  # FlexAttention knows no dropout
        ("cuda", 1024, 8, 0.0, True, "dense"),
        ("cuda", 1024, 64, 0.0, False, "dense"),
        ("cpu", 1024, 64, 0.1, False, "documents"),
        ("cpu", 256, 64, 0.0, False, "dense"),
        ("mps", 1024, 64, 0.0, False, "dense"),
    ],
)
def test_the_way_is_chosen_by_device_and_shape(
    device: str,
    T: int,
    head_dim: int,
    dropout_p: float,
    triton: bool,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "can_compile_for_cuda", lambda: triton)
    for name, way in (("block_mask", "flex"), ("dense_mask", "dense"), ("Documents", "documents")):
        monkeypatch.setattr(attention, name, lambda positions, way=way: way)
    positions = SimpleNamespace(device=torch.device(device), shape=(3, T))
    assert attention.document_mask(positions, head_dim, dropout_p) == kind  # type: ignore[arg-type]
