"""The sample order, counted by brute force."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from gpt_lightning.data import windows
from gpt_lightning.data.windows import Epochs, Ints


def epoch_targets(n_tokens: int, seq_len: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """(input, target) of every scored place of an epoch, in order; token ids are their positions."""
    tokens = np.arange(n_tokens)
    epochs = Epochs(n_tokens=n_tokens, seq_len=seq_len, seed=seed)
    count = epochs.windows
    starts, lengths = epochs.cut(np.arange(epoch * count, (epoch + 1) * count))
    inputs, targets = windows.gather([tokens] * len(starts), starts, lengths, rows=count, seq_len=seq_len)
    scored = targets != windows.IGNORED_TARGET
    return list(zip(inputs[scored].tolist(), targets[scored].tolist(), strict=True))


@pytest.mark.parametrize(
    ("n_tokens", "seq_len"), [(1, 1), (7, 3), (9, 3), (101, 8), (64, 64), (65, 64), (5, 9)]
)
def test_every_epoch_scores_every_token_once_from_its_predecessor(n_tokens: int, seq_len: int) -> None:
    for epoch in (0, 1, 2, 10**6):
        pairs = epoch_targets(n_tokens, seq_len, seed=3, epoch=epoch)
        assert sorted(target for _, target in pairs) == list(range(n_tokens))
        assert all(before == (target - 1) % n_tokens for before, target in pairs)


def test_epochs_and_seeds_differ_and_windows_are_cut_at_other_places() -> None:
    epochs = [epoch_targets(1000, 10, seed=0, epoch=epoch) for epoch in range(20)]
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert epochs[0] != epoch_targets(1000, 10, seed=1, epoch=0)
    assert epochs[5] == epoch_targets(1000, 10, seed=0, epoch=5)
    offsets = {min(target for _, target in epoch[::10]) % 10 for epoch in epochs}
    assert len(offsets) > 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    permuted = windows.permute(np.arange(size), size, key=9)
    assert sorted(permuted.tolist()) == list(range(size))
    for index in range(0, size, 7):
        assert windows.permute(np.array([index]), size, key=9).tolist() == [permuted[index]]


def test_permutation_looks_shuffled() -> None:
    size, trials = 5000, 40
    lifts = []
    for key in range(trials):
        permuted = windows.permute(np.arange(size), size, key=key).astype(float)
        lifts.append(abs(np.corrcoef(np.arange(size), permuted)[0, 1]))
        # Neighbours stay neighbours with probability 2 / size.
        assert (abs(np.diff(permuted)) == 1).sum() < 12
    assert np.mean(lifts) < 2 / np.sqrt(size)


def test_permutations_of_few_items_are_uniform() -> None:
    counts = Counter(tuple(windows.permute(np.arange(4), 4, key=key).tolist()) for key in range(2400))
    assert len(counts) == 24
    assert 60 < min(counts.values()) and max(counts.values()) < 145  # 100 expected, standard deviation 10


@pytest.mark.parametrize(("size", "stride"), [(9000, 1), (9000, 7), (4097, 1), (50, 3), (10**15, 64)])
def test_a_batch_is_permuted_as_its_windows_are(size: int, stride: int) -> None:
    """Blocks that are kept for the next batch change nothing, wherever a batch lies in them."""
    for first in (0, 1, 4000, 4090, 4096, 8990, size - 1 - 11 * stride):
        positions = np.arange(12) * stride + max(0, first)
        positions = positions[positions < size]
        epochs = Epochs(n_tokens=3 * size, seq_len=3, seed=8)
        starts, _ = epochs.cut(positions)
        one_by_one = [epochs.cut(position)[0].item() for position in positions[:, None]]
        key = windows.keyed_hash(8, 0, "order")
        offset = windows.keyed_hash(8, 0, "offset")
        permuted = windows.permute(positions, size, key=key)
        assert starts.tolist() == one_by_one == ((3 * permuted + offset) % (3 * size)).tolist()


def test_the_order_is_that_of_every_earlier_version() -> None:
    """A run that goes on under a new version must go on where it was; the digest is that of the first one."""
    positions = np.arange(30_000, 40_000)
    cut = Epochs(n_tokens=999_999, seq_len=100, seed=42).cut(positions)
    assert hashlib.sha256(np.stack(cut).tobytes()).hexdigest()[:16] == "e844f5cb4d167fdb"
    # Of sizes with an odd and an even number of bits, for which a network of another width would do, too.
    orders = {size: windows.permute(np.arange(5), size, key=7) for size in (5, 17, 100, 1000, 5000)}
    assert {size: order.tolist() for size, order in orders.items()} == {
        5: [3, 4, 0, 1, 2],
        17: [5, 7, 12, 15, 0],
        100: [16, 18, 65, 92, 34],
        1000: [555, 829, 727, 716, 667],
        5000: [4806, 2967, 4436, 2842, 1672],
    }


def test_seeking_is_instant_anywhere() -> None:
    n_tokens, began = 10**16, time.perf_counter()
    epochs = Epochs(n_tokens=n_tokens, seq_len=1024, global_batch=512, start=10**15, seed=1)
    positions = np.arange(*epochs.span(10**9))[1::64]
    starts, lengths = epochs.cut(positions)
    assert time.perf_counter() - began < 5  # walking there would take minutes
    assert len(set(starts.tolist())) == 8 and (starts < n_tokens).all() and (starts >= 0).all()
    assert lengths.tolist() == [1024] * 8


def epochs_of(count: int, global_batch: int, accumulate: int = 1, start: int = 0) -> Epochs:
    return Epochs(
        n_tokens=count, seq_len=1, global_batch=global_batch, accumulate=accumulate, start=start
    )


def walk(start: int, count: int, global_batch: int, accumulate: int) -> Iterator[tuple[int, int]]:
    """Batch after batch; an epoch goes on with empty ones until its last optimizer step is whole."""
    while True:
        epoch_end, done = (start // count + 1) * count, 0
        while start < epoch_end or done % accumulate:
            after = min(start + global_batch, epoch_end)
            yield start, after
            start, done = after, done + 1


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_batch_span_equals_walking_there(accumulate: int) -> None:
    for count, global_batch in ((10, 4), (10, 5), (3, 7), (1, 1), (12, 1)):
        for start in range(2 * count + 1):
            epochs = epochs_of(count, global_batch, accumulate, start)
            for batch, span in enumerate(islice(walk(start, count, global_batch, accumulate), 12)):
                assert epochs.span(batch) == span


def test_every_optimizer_step_of_an_epoch_is_whole() -> None:
    assert epochs_of(21, 4).epoch_batches == 6
    assert epochs_of(21, 4, 4).epoch_batches == 8
    assert epochs_of(16, 4, 4).epoch_batches == 4


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_targets_of_a_step_are_those_of_its_batches(accumulate: int, seed: int | None) -> None:
    """Also where a step, with limited epochs, has batches of two."""
    for start in (0, 3, 12):
        epochs = Epochs(
            n_tokens=103, seq_len=8, global_batch=3, accumulate=accumulate, start=start, seed=seed
        )
        each = [int(epochs.cut(np.arange(*epochs.span(batch)))[1].sum()) for batch in range(30)]
        assert len(set(each)) > 1
        for first in range(20):
            for end in range(first + 1, first + 10):
                assert epochs.n_targets(range(first, end)) == sum(each[first:end])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_scores_every_token_once_in_equally_many_batches(batch_size: int, ranks: int) -> None:
    n_tokens, seq_len = 103, 5
    tokens, epochs = np.arange(n_tokens), Epochs(n_tokens=103, seq_len=5, global_batch=batch_size * ranks)
    seen: list[int] = []
    for rank in range(ranks):
        for batch in range(epochs.epoch_batches):
            positions = np.arange(*epochs.span(batch))[rank::ranks]
            cut = epochs.cut(positions)
            inputs, targets = windows.gather([tokens] * len(cut[0]), *cut, rows=batch_size, seq_len=seq_len)
            assert inputs.shape == targets.shape == (batch_size, seq_len)
            scored = targets != windows.IGNORED_TARGET
            assert (inputs[scored] == (targets[scored] - 1) % n_tokens).all()
            assert (inputs[~scored] == 0).all()
            seen += targets[scored].tolist()
    assert sorted(seen) == list(range(n_tokens))


def ids_of(start: int, length: int, rows: int = 1) -> Ints:
    # Documents "aaE" "bE" "cccE": starts 0, 3, 5, end 9.
    return windows.document_ids(
        np.array([0, 3, 5, 9], dtype=np.uint64),
        np.array([start]),
        np.array([length]),
        n_tokens=9,
        rows=rows,
        seq_len=6,
    )


def test_document_ids_of_hand_made_windows() -> None:
    # Targets a a E b E c: the eos before `b` is the first input of b's document.
    assert ids_of(0, 6).tolist() == [[0, 0, 0, 1, 1, 2]]
    # Targets E b E c c c.
    assert ids_of(2, 6).tolist() == [[0, 1, 1, 2, 2, 2]]
    # Around the circle: c E a a E b.
    assert ids_of(7, 6).tolist() == [[0, 0, 1, 1, 1, 2]]
    # Three targets a E b, then padding.
    assert ids_of(1, 3).tolist() == [[0, 0, 1, 2, 2, 2]]
    assert ids_of(1, 3, rows=2).tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6]


def test_a_lone_document_that_meets_itself_is_two_documents() -> None:
    starts = np.array([0, 4], dtype=np.uint64)
    ids = windows.document_ids(
        starts, np.array([2]), np.array([4]), n_tokens=4, rows=1, seq_len=4
    )
    assert ids.tolist() == [[0, 0, 1, 1]]


def random_cut(draw: random.Random) -> tuple[list[int], Ints, Ints, int]:
    """A corpus' document starts, and windows in it, some of them short, some around its end."""
    n_tokens, seq_len = draw.choice([1, 5, 17, 60]), draw.choice([1, 3, 8])
    cuts = sorted(draw.sample(range(1, n_tokens), draw.randrange(n_tokens)))
    starts = [draw.randrange(n_tokens) for _ in range(draw.randrange(4))]
    lengths = [draw.choice([seq_len, draw.randrange(1, seq_len + 1)]) for _ in starts]
    short = [min(length, n_tokens) for length in lengths]
    return [0, *cuts, n_tokens], np.array(starts, dtype=np.int64), np.array(short, dtype=np.int64), seq_len


def test_windows_are_read_token_by_token() -> None:
    draw = random.Random(0)
    for _ in range(400):
        cuts, starts, lengths, seq_len = random_cut(draw)
        n_tokens, rows = cuts[-1], len(starts) + draw.randrange(1, 3)
        tokens = np.arange(100, 100 + n_tokens, dtype=draw.choice([np.uint16, np.uint32]))
        inputs, targets = windows.gather([tokens] * len(starts), starts, lengths, rows=rows, seq_len=seq_len)
        boundaries = np.array(cuts, dtype=np.uint64)
        documents = windows.document_ids(
            boundaries, starts, lengths, n_tokens=n_tokens, rows=rows, seq_len=seq_len
        )
        for row in range(rows):
            length = int(lengths[row]) if row < len(lengths) else 0
            places = [(starts[row] + step) % n_tokens for step in range(length)]
            padding = seq_len - length
            assert targets[row].tolist() == [100 + place for place in places] + [-100] * padding
            assert inputs[row].tolist() == [100 + (place - 1) % n_tokens for place in places] + [0] * padding
            changes = [0] + [int(place in cuts) for place in places[1:]] + [1] * (0 < length < seq_len)
            expected = np.cumsum(changes + [0] * seq_len)[:seq_len] if length else [0] * seq_len
            assert documents[row].tolist() == list(expected)
