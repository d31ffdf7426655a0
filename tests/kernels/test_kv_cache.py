"""Cached hidden states equal those of the whole sequence, whatever the rows' lengths and places."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gpt_lightning.kernels.attention import KVCache
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from tests.shapes import SHAPES

CONFIG = GPTConfig(vocab_size=101, max_position_embeddings=23, n_layers=2, n_heads=3, d_model=36)


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPTModel:
    """Weights large enough that attention looks at particular tokens."""
    model = GPTModel(dataclasses.replace(CONFIG, **SHAPES[request.param])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.requires_grad_(False)


def make_ids(*shape: int) -> Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(1))


def whole(model: GPTModel, ids: Tensor, last: int) -> Tensor:
    return model.hidden_states(ids[None])[0, -last:]


@pytest.mark.parametrize("steps", [[17], [1] * 17, [5, 1, 7, 4], [16, 1]])
def test_cached_hidden_states_equal_uncached(model: GPTModel, steps: list[int]) -> None:
    ids = make_ids(3, 17)
    cache = KVCache(3, 20)
    pieces = [model.hidden_states(piece, kv_cache=cache) for piece in ids.split(steps, dim=1)]
    assert cache.lengths.tolist() == [17, 17, 17]
    assert_close(torch.cat(pieces, dim=1), model.hidden_states(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_new", [1, 3])
def test_rows_of_unequal_length_equal_uncached(model: GPTModel, n_new: int) -> None:
    lengths = [4, 0, 11, 19]
    ids = make_ids(4, 23)
    cache = KVCache(4, 23)
    for row, length in enumerate(lengths):
        if length:
            model.hidden_states(ids[row : row + 1, :length], kv_cache=cache.rows(row, row + 1))
    assert cache.lengths.tolist() == lengths
    new = torch.stack([ids[row, length : length + n_new] for row, length in enumerate(lengths)])
    hidden = model.hidden_states(new, kv_cache=cache)
    for row, length in enumerate(lengths):
        assert_close(hidden[row], whole(model, ids[row, : length + n_new], n_new), atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [length + n_new for length in lengths]


def test_cached_logits_and_loss_equal_uncached(model: GPTModel) -> None:
    ids, targets = make_ids(2, 9), make_ids(2, 10)[:, 1:]
    cache = KVCache(2, 9)
    model(ids[:, :5], kv_cache=cache)
    assert_close(model(ids[:, 5:], kv_cache=cache).logits, model(ids).logits[:, 5:], atol=1e-5, rtol=1e-5)
    cache.lengths.fill_(5)
    scored = targets.index_fill(1, torch.arange(5), -100)
    assert_close(model(ids[:, 5:], targets[:, 5:], kv_cache=cache).loss, model(ids, scored).loss)


def test_a_cleared_row_forgets_its_tokens(model: GPTModel) -> None:
    ids = make_ids(2, 12)
    cache = KVCache(2, 20)
    model.hidden_states(ids, kv_cache=cache)
    cache.lengths[0] = 0
    assert cache.lengths.tolist() == [0, 12]
    model.hidden_states(ids[1:, :5], kv_cache=cache.rows(0, 1))
    hidden = model.hidden_states(torch.stack([ids[1, 5], ids[0, 0]])[:, None], kv_cache=cache)
    assert_close(hidden[0], whole(model, ids[1, :6], 1), atol=1e-5, rtol=1e-5)
    assert_close(hidden[1], whole(model, torch.cat([ids[1], ids[0, :1]]), 1), atol=1e-5, rtol=1e-5)


def test_a_moved_row_goes_on_at_its_new_place(model: GPTModel) -> None:
    ids = make_ids(3, 10)
    cache = KVCache(3, 20)
    for row, length in enumerate([9, 2, 5]):
        model.hidden_states(ids[row : row + 1, :length], kv_cache=cache.rows(row, row + 1))
    cache.copy_row(2, 0, 5)
    assert cache.lengths.tolist()[:2] == [5, 2]
    hidden = model.hidden_states(torch.stack([ids[2, 5], ids[1, 2]])[:, None], kv_cache=cache.rows(0, 2))
    assert_close(hidden[0], whole(model, ids[2, :6], 1), atol=1e-5, rtol=1e-5)
    assert_close(hidden[1], whole(model, ids[1, :3], 1), atol=1e-5, rtol=1e-5)


def test_row_views_nest_and_share_their_lengths(model: GPTModel) -> None:
    ids = make_ids(1, 4)
    cache = KVCache(4, 8)
    inner = cache.rows(1, 4).rows(1, 2)
    model.hidden_states(ids, kv_cache=inner)
    assert cache.lengths.tolist() == [0, 0, 4, 0]
    inner.lengths[0] = 0
    assert cache.lengths.tolist() == [0, 0, 0, 0]


def test_storage_is_allocated_once_with_the_dtype_of_the_model() -> None:
    model = GPTModel(CONFIG).to(torch.bfloat16).eval()
    cache = KVCache(2, 23)
    pointers = set()
    with torch.no_grad():
        for _ in range(5):
            model.hidden_states(make_ids(2, 1), kv_cache=cache)
            new = torch.ones(2, 3, 1, 12, dtype=torch.bfloat16)
            cache.begin(1, new.device)
            keys, values = cache.write(new, new)
            pointers.add((keys.data_ptr(), values.data_ptr()))
            assert keys.dtype == torch.bfloat16
    assert len(pointers) == 1
