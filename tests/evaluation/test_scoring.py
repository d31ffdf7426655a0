"""Holds scores to a plain pass over each text alone, however they are batched and spread."""

from typing import Any

import pytest
import torch

from gpt_lightning.data.tokenizer import load_tokenizer, train_bpe
from gpt_lightning.evaluation.scoring import Pair, Score, Scorer, encode_pairs
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

TOKENIZER = load_tokenizer("bytes")
TEXTS = [
    ("The cat", " sees"),
    ("The cat", " sees a dog, and then another one."),
    ("Answer:", " A"),
    ("Answer:", " B"),
    ("Answer:", " C"),
    ("", "Nothing before"),
    ("longer than the window " * 5, " so it is cut"),
    ("ends in a space ", "here"),
]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(0)
    config = GPTConfig(TOKENIZER.vocab_size, 40, n_layers=2, n_heads=2, d_model=24, dropout=0.5)
    model = GPTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.train()  # as in a fit


def plain_score(model: GPTModel, pair: Pair) -> tuple[float, bool]:
    tokens = [*pair.context, *pair.continuation][-41:]
    with torch.no_grad():
        logs = model.eval()(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
    model.train()
    places = range(len(tokens) - 1 - len(pair.continuation), len(tokens) - 1)
    chosen = [float(logs[place, token]) for place, token in zip(places, pair.continuation)]
    greedy = [int(logs[place].argmax()) for place in places]
    return sum(chosen), greedy == pair.continuation


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_scores_in_batches_are_those_of_each_text_alone(model: GPTModel, batch_tokens: int) -> None:
    pairs = encode_pairs(TOKENIZER, TEXTS)
    likely = Pair(pairs[0].context, [])
    for _ in range(3):  # what the model would write itself
        tokens = [*likely.context, *likely.continuation]
        with torch.no_grad():
            likely.continuation.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
    scores = Scorer(model.train(), TOKENIZER, batch_tokens).score([*pairs, likely])
    for score, pair in zip(scores, [*pairs, likely], strict=True):
        log_probability, is_greedy = plain_score(model, pair)
        assert score.log_probability == pytest.approx(log_probability, abs=1e-4)
        assert score.is_greedy == is_greedy
    assert scores[-1].is_greedy and not all(score.is_greedy for score in scores)
    assert model.training and model.blocks[0].dropout.training


def test_each_input_is_read_once(model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_passes(model, monkeypatch)
    Scorer(model, TOKENIZER).score(encode_pairs(TOKENIZER, TEXTS[2:5]))  # which differ in the last token
    assert shapes == [(1, len("Answer: "))]


def count_passes(model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    hidden_states = model.hidden_states

    def counted(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(input_ids.shape))
        return hidden_states(input_ids, **options)

    monkeypatch.setattr(model, "hidden_states", counted)
    return shapes


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_each_rank_scores_other_pairs_in_as_many_passes(
    model: GPTModel, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = encode_pairs(TOKENIZER, TEXTS)
    alone = Scorer(model, TOKENIZER).score(pairs)
    shapes = count_passes(model, monkeypatch)
    shares: list[dict[int, Score]] = []

    def gather(share: dict[int, Score]) -> list[dict[int, Score]]:
        shares.append(share)
        return [dict(enumerate(alone))]

    passes = []
    for rank in range(ranks):
        shapes.clear()
        Scorer(model, TOKENIZER, 50, rank, ranks, gather).score(pairs)
        passes.append(len(shapes))
    assert len(set(passes)) == 1
    assert sorted(number for share in shares for number in share) == list(range(len(pairs)))
    for number, score in (entry for share in shares for entry in share.items()):
        assert score.log_probability == pytest.approx(alone[number].log_probability, abs=1e-4)


def test_context_and_continuation_are_one_text() -> None:
    """The space before a word is a part of its token, wherever the context ends."""
    tokenizer = train_bpe(["the cat sees the cat"] * 9, 270)
    whole = tokenizer.encode("the cat sees")
    for context, continuation in (("the cat", " sees"), ("the cat ", "sees")):
        (pair,) = encode_pairs(tokenizer, [(context, continuation)])
        assert [*pair.context, *pair.continuation] == whole
        assert pair.continuation == tokenizer.encode(" sees")
    (pair,) = encode_pairs(tokenizer, [("", "the cat")])
    assert pair.context == [tokenizer.eos_token_id]


def test_what_the_model_cannot_score_is_refused(model: GPTModel) -> None:
    scorer = Scorer(model, TOKENIZER)
    with pytest.raises(ValueError, match="mine.jsonl, line 3: .* 41 tokens .*max_position_embeddings=40"):
        scorer.check(Pair([1], [2] * 41), "mine.jsonl, line 3")
    with pytest.raises(ValueError, match="no token"):
        scorer.check(Pair([1], []), "mine.jsonl, line 3")
    scorer.check(Pair([1], [2] * 40), "mine.jsonl, line 3")


def test_a_model_that_diverged_has_no_scores(model: GPTModel) -> None:
    broken = GPTModel(model.config)
    with torch.no_grad():
        broken.ln_f.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        Scorer(broken, TOKENIZER).score([Pair([1], [2])])
