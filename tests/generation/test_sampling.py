"""The filters against those of transformers; the draw against the distribution it is drawn from."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt_lightning.generation.processors import penalize_repetition
from gpt_lightning.generation.sampling import (
    GenerationConfig,
    Sampler,
    min_p_filter,
    pick,
    top_k_filter,
    top_p_filter,
)

NO_IDS = torch.LongTensor([[0]])
GPT2_VOCAB_SIZE = 50257


def probabilities_of(logits: Tensor, settings: GenerationConfig) -> Tensor:
    """What is drawn from [B, V], whatever the texts are."""
    for keep_likely in Sampler(settings).filters:
        logits = keep_likely(logits)
    return logits.softmax(dim=-1)


def random_logits(seed: int, vocab_size: int = 101) -> Tensor:
    """Rows that are flat, usual and peaked."""
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(seed))
    return logits * torch.tensor([0.1, 2.0, 8.0]).repeat(8)[:, None]


@pytest.mark.parametrize("k", [1, 2, 50, 101, 1000])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    logits = random_logits(seed=k)
    assert torch.equal(top_k_filter(logits, k), TopKLogitsWarper(k)(NO_IDS, logits))


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = random_logits(seed=0).round()
    kept = top_k_filter(logits, 5)
    assert torch.equal(kept, TopKLogitsWarper(5)(NO_IDS, logits))
    assert (kept.isfinite().sum(dim=1) > 5).any()


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocab_size", [101, GPT2_VOCAB_SIZE])
def test_top_p_keeps_what_transformers_keeps(p: float, vocab_size: int) -> None:
    logits = random_logits(seed=1, vocab_size=vocab_size)
    assert torch.equal(top_p_filter(logits, p), TopPLogitsWarper(p)(NO_IDS, logits))


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    assert top_p_filter(logits, 0.4).isfinite().tolist() == [[False, True, False]]
    assert top_p_filter(logits, 0.6).isfinite().tolist() == [[False, True, True]]
    assert top_p_filter(logits, 0.9).isfinite().tolist() == [[True, True, True]]


def test_top_p_drops_a_token_where_the_likelier_ones_hold_exactly_p() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert logits.softmax(dim=-1).tolist() == [[0.25, 0.5, 0.25]]  # without rounding
    kept = top_p_filter(logits, 0.5).isfinite()
    assert kept.tolist() == [[False, True, False]]
    assert torch.equal(kept, TopPLogitsWarper(0.5)(NO_IDS, logits).isfinite())


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    logits = random_logits(seed=2)
    assert torch.equal(min_p_filter(logits, min_p), MinPLogitsWarper(min_p)(NO_IDS, logits))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    logits = random_logits(seed=3)
    ids = torch.randint(101, (24, 13), generator=torch.Generator().manual_seed(4))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, ids.tolist(), penalty), expected)


@pytest.mark.parametrize(
    "options, reference",
    [
        ({"temperature": 0.8}, TemperatureLogitsWarper(0.8)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
)
def test_each_setting_alone_is_that_of_transformers(options: dict[str, Any], reference: Any) -> None:
    logits = random_logits(seed=15)
    neutral: dict[str, Any] = {"temperature": 1.0, "top_k": None}
    actual = probabilities_of(logits, GenerationConfig(**{**neutral, **options}))
    assert torch.equal(actual, reference(NO_IDS, logits).softmax(dim=-1))
    assert not torch.equal(actual, probabilities_of(logits, GenerationConfig(**neutral)))


def test_all_settings_together_follow_the_order_of_transformers() -> None:
    settings = GenerationConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    logits = random_logits(seed=5)
    ids = torch.LongTensor(24, 40)
    ids.random_(101, generator=torch.Generator().manual_seed(6))
    reference = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    expected = reference(ids, logits).softmax(dim=-1)
    actual = probabilities_of(penalize_repetition(logits, ids.tolist(), 1.2), settings)
    assert torch.equal(actual, expected)
    uniforms = torch.rand(24, generator=torch.Generator().manual_seed(7))
    chosen = Sampler(settings).choose(logits, ids.tolist(), [0] * 24, uniforms.tolist())
    assert torch.equal(chosen[:, 0].long(), pick(expected, uniforms))


@pytest.mark.parametrize("settings", [GenerationConfig(temperature=0.0), GenerationConfig(do_sample=False)])
def test_greedy_takes_the_likeliest_token(settings: GenerationConfig) -> None:
    logits = random_logits(seed=7)
    tokens = Sampler(settings).choose(logits, [[0]] * 24, [1] * 24, [0.999] * 24)[:, 0]
    assert torch.equal(tokens.long(), logits.argmax(dim=1))


def test_smallest_temperature_stays_finite() -> None:
    probabilities = probabilities_of(random_logits(seed=8) * 100, GenerationConfig(temperature=1e-5))
    assert_close(probabilities.sum(dim=1), torch.ones(24))


def test_a_token_without_probability_is_never_picked() -> None:
    """Neither at the ends of the vocabulary, nor in gaps, nor where float32 sums round up or down."""
    generator = torch.Generator().manual_seed(9)
    uniforms = torch.cat([torch.tensor([0.0, 1e-45, 0.5, 1 - 2**-24]), torch.rand(60, generator=generator)])
    for n_kept in (1, 2, 40, 5000):
        logits = torch.randn(64, GPT2_VOCAB_SIZE, generator=generator) * 3
        logits[:, :7] = logits[:, -7:] = -100.0
        probabilities = top_k_filter(logits, n_kept).softmax(dim=-1)
        picked = pick(probabilities, uniforms)
        assert (probabilities.gather(1, picked[:, None]) > 0).all()


def test_the_ends_of_the_unit_interval_pick_the_first_and_last_possible_token() -> None:
    probabilities = torch.zeros(2, GPT2_VOCAB_SIZE)
    probabilities[:, 100:50000] = 1 / 49900
    picked = pick(probabilities, torch.tensor([0.0, 1 - 2**-24]))
    assert picked[0] == 100
    assert 49990 < picked[1] < 50000


def test_a_uniform_that_rounds_to_one_does_not_pick_past_the_end() -> None:
    probabilities = torch.zeros(64, 9)
    probabilities[:, 2] = torch.arange(64) * 2**-23 + 0.5
    probabilities[:, 5] = 0.5
    assert (pick(probabilities, torch.full((64,), 1 - 2**-40, dtype=torch.float64)) == 5).all()


def test_sampled_tokens_follow_the_distribution() -> None:
    settings = GenerationConfig(temperature=1.3, top_k=12, top_p=0.95)
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(10)) * 1.5
    probabilities = probabilities_of(logits, settings)
    n_draws = 50_000
    uniforms = torch.rand(n_draws, generator=torch.Generator().manual_seed(11))
    picked = pick(probabilities.expand(n_draws, -1), uniforms)
    possible = probabilities[0] > 0
    counts = torch.bincount(picked, minlength=20)[possible]
    expected = probabilities[0, possible] * n_draws
    assert counts.sum() == n_draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    n_possible = int(possible.sum())
    assert 5 <= n_possible <= 12
    assert chi_square < 31.3  # the 99.9% quantile at 11 degrees of freedom, the most there can be


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_p": 0.0}, {"top_k": None, "top_p": 1.0}, {}])
def test_filters_that_are_off_leave_the_whole_distribution(off: dict[str, Any]) -> None:
    settings = GenerationConfig(temperature=1.0, **off)
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    left = logits
    for keep in Sampler(settings).filters:
        left = keep(left)
    assert torch.equal(left, logits)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("max_new_tokens", 0, "is below 1"),
        ("temperature", -1.0, "is below 0"),
        ("temperature", float("nan"), "or infinite"),
        ("temperature", 1e-9, "use 0 for greedy"),
        ("top_k", -1, "is below 0"),
        ("top_p", -0.1, "is not in [0, 1]"),
        ("top_p", 1.1, "is not in [0, 1]"),
        ("min_p", -0.1, "is not in [0, 1]"),
        ("repetition_penalty", 0.0, "is not above 0"),
        ("no_repeat_ngram_size", 0, "is below 1"),
        ("stop", ["\n", ""], "empty string"),
        ("stop", "END", "is one string"),
        ("num_samples", 0, "is below 1"),
        ("context_stride", 0, "is below 1"),
        ("quantize", "int4", "is unknown"),
    ],
)
def test_errors_name_option_value_rule_and_remedy(option: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(GenerationConfig(), **{option: value})  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith(f"generation.{option}={value!r} ")
    assert rule in message and ";" in message and "\n" not in message


def test_limits_of_the_ranges_are_allowed() -> None:
    GenerationConfig(max_new_tokens=1, temperature=0, top_k=None, top_p=1, min_p=1, repetition_penalty=0.1)
