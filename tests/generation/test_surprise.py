"""Each token's log-probability is the model's own and the Engine's, also beyond the context."""

import pytest
import torch

from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.surprise import score_in_pieces, score_tokens
from tests.generation.models import make_model, make_prompts, transformers_model


def test_scores_are_those_of_transformers() -> None:
    model = make_model()
    (text,) = make_prompts(40)
    logits = transformers_model(model)(torch.tensor([text])).logits[0].detach()
    scored = score_tokens(model, text)
    assert [token.token_id for token in scored] == text
    assert scored[0].logprob is None and scored[0].others == []
    for place, token in enumerate(scored[1:]):
        expected = logits[place].log_softmax(dim=-1)
        assert token.logprob == pytest.approx(float(expected[text[place + 1]]), abs=1e-4)
        likeliest = [index for index in expected.argsort(descending=True).tolist() if index != token.token_id]
        assert [index for index, _ in token.others] == likeliest[:5]
        values = [value for _, value in token.others]
        assert values == pytest.approx(expected[likeliest[:5]].tolist(), abs=1e-4)


@pytest.mark.parametrize("stride", [None, 1, 7])
@pytest.mark.parametrize("n_prompt", [3, 20])
def test_scores_are_the_engines_beyond_the_context(n_prompt: int, stride: int | None) -> None:
    model = make_model(max_position_embeddings=16)
    settings = GenerationConfig(max_new_tokens=24, logprobs=True, context_stride=stride)
    prompts = make_prompts(n_prompt)
    (completion,) = generate(model, prompts, settings, eos_token_id=None)
    scored = score_tokens(model, prompts[0] + completion.token_ids, context_stride=stride)
    found = [token.logprob for token in scored[n_prompt:]]
    assert found == pytest.approx(completion.logprobs, abs=1e-4)
    text = prompts[0] + completion.token_ids
    pieces = [tokens for tokens, _ in score_in_pieces(model, text, context_stride=stride, piece=5)]
    assert max(map(len, pieces)) <= 5
    for token, expected in zip([token for tokens in pieces for token in tokens], scored, strict=True):
        assert token.token_id == expected.token_id
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [index for index, _ in token.others] == [index for index, _ in expected.others]


def test_the_model_is_left_in_its_mode() -> None:
    model = make_model(dropout=0.5).train()
    (text,) = make_prompts(9)
    assert score_tokens(model, text) == score_tokens(model, text) and model.training
    assert score_tokens(model, []) == []
