"""A tokenizer's training on text without separators: bounded, and as ever for all other text."""

import logging
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt_lightning.data import endless_text
from gpt_lightning.data.endless_text import LONGEST_WORD, with_little_endless_text
from gpt_lightning.data.tokenizer import END_OF_TEXT, train_bpe


def bases(n: int) -> str:
    return "".join(random.Random(n).choices("ACGT", k=n))


def plainly_trained(texts: list[str], vocab_size: int) -> dict[str, int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def test_a_word_is_cut_at_its_longest_length() -> None:
    endless = bases(20_000)
    parts = [endless[first : first + LONGEST_WORD] for first in range(0, len(endless), LONGEST_WORD)]
    assert train_bpe([endless], 400)._tokenizer.get_vocab() == plainly_trained(parts, 400)


def test_texts_of_shorter_words_give_the_same_tokenizer() -> None:
    draw = random.Random(0)
    words = ["the", " quick", "鲁迅，", "\n\n", "=" * 80, bases(700), "1" * 900, "é" * 500, "🙂"]
    words.append("x" * (LONGEST_WORD - 1))  # and a space before it
    texts = ["".join(draw.choice(words) + " " for _ in range(200)) for _ in range(5)]
    trained = train_bpe(texts, 420)
    assert trained._tokenizer.get_vocab() == plainly_trained(texts, 420)
    assert '"FixedLength"' not in trained.state["tokenizer_json"]


def test_beyond_a_limit_endless_text_is_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gpt_lightning")
    monkeypatch.setattr(endless_text, "_MOST", 2048)
    prose = "Words of a language, separated. " * 300
    texts = [prose, bases(1500) + prose, prose + bases(5000) + "7" * 3000 + prose, ".(" * 1024]
    seen = "".join(with_little_endless_text(texts))
    assert len("".join(texts)) - len(seen) == pytest.approx(1500 + 5000 + 3000 + 2048 - 2048, abs=1500)
    assert seen.count("Words of a language, separated.") == 4 * 300
    (line,) = [record.getMessage() for record in caplog.records]
    assert "characters of text without separators were left out of the training" in line
    assert list(with_little_endless_text([prose, ""])) == [prose]
