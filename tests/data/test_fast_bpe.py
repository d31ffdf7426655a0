"""Fast ids: always those of tokenizers, and none where that is not certain."""

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from gpt_lightning.data.fast_bpe import FastBPE, _CharacterClasses, byte_alphabet, fast_bpe
from gpt_lightning.data.tokenizer import TextTokenizer, train_bpe

TEXT = "The cat doesn't sit on 42 mats; it's where they'll nap.\n\n  鲁迅写了《呐喊》。 Größe <|endoftext|>\n"
BOUNDARIES = (
    "'s't're've'm'll'd yZ09 éß中文١٢\t\n\r\x0b\x0c\x00\x1c\x1d\x1e\x1f\x85\xa0\xad\u1680\u180e\u2003\u2028"
    "\u2029\u200b\u200d\u202f\u205f\u3000\ufeff\ufffd\uffff\u0301\u2167\xbd😀\U0001f1e9\U0002ebf0\U0010ffff"
)


def byte_level(merges: list[tuple[str, str]], extra_tokens: tuple[str, ...] = ()) -> Tokenizer:
    tokens = dict.fromkeys([*byte_alphabet(), *map("".join, merges), *extra_tokens])
    ids = random.Random(len(merges)).sample(range(2 * len(tokens)), len(tokens))
    tokenizer = Tokenizer(models.BPE(vocab=dict(zip(tokens, ids, strict=True)), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same_ids(tokenizer: Tokenizer, texts: list[str], fast: FastBPE | None = None) -> None:
    fast = fast or fast_bpe(tokenizer)
    assert fast is not None
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, theirs in zip(texts, fast.encode_batch(texts), expected, strict=True):
        assert ids is not None and ids.tolist() == theirs.ids, text


def random_texts(letters: str, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randrange(40))) for _ in range(count)]


def random_merges(count: int, seed: int) -> list[tuple[str, str]]:
    """Of any two tokens so far, or of parts that no merge makes: what no training would give."""
    draw = random.Random(seed)
    tokens = ["a", "b"]
    merges: dict[tuple[str, str], None] = {}
    while len(merges) < count:
        pair = (draw.choice(tokens), draw.choice(tokens))
        if len("".join(pair)) < 7:
            merges[pair] = None
            tokens.append("".join(pair))
    shuffled = list(merges)
    draw.shuffle(shuffled)
    return shuffled


def test_odd_strings() -> None:
    tokenizer = train_bpe([TEXT, BOUNDARIES] * 5, 400)._tokenizer
    texts = ["", " ", "'", "\n" * 50, TEXT, BOUNDARIES, *random_texts(BOUNDARIES, 2000, seed=0)]
    any_character = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts += random_texts("".join(random.Random(0).sample(any_character, 3000)), 300, seed=1)
    assert_same_ids(tokenizer, texts)


@pytest.mark.parametrize("seed", range(8))
def test_trained_on_small_alphabets(seed: int) -> None:
    letters = ["ab", "aab ", "abc 1", "é中a", "-- a"][seed % 5]
    texts = random_texts(letters, 200, seed)
    tokenizer = train_bpe(texts, 257 + 40 * seed)._tokenizer
    assert_same_ids(tokenizer, texts + random_texts(letters, 300, seed + 1))


def test_merges_that_no_training_gives() -> None:
    """Each table is refused for two ways to one token, or gives the same ids."""
    outcomes = Counter[str]()
    for seed in range(24):
        merges = random_merges(count=2 + seed % 8, seed=seed)
        tokenizer = byte_level(merges)
        made = ["".join(pair) for pair in merges]
        fast = fast_bpe(tokenizer)
        if fast is None:
            assert len(set(made)) < len(made)
            outcomes["refused"] += 1
        else:
            assert_same_ids(tokenizer, random_texts("ab", 200, seed), fast)
            outcomes["taken"] += 1
            outcomes["with unreachable"] += any(len(tokenizer.encode(token).ids) > 1 for token in made)
    assert min(outcomes.values()) > 3, outcomes


def test_two_ways_to_one_token_are_refused() -> None:
    assert fast_bpe(byte_level([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])) is None
    assert fast_bpe(byte_level([("a", "b"), ("b", "c"), ("ab", "c")])) is not None


def test_tokens_that_nothing_becomes_are_not_made() -> None:
    """abc is in the list of merges, but its b goes to a first; and xyz is in the vocabulary alone."""
    tokenizer = byte_level([("a", "b"), ("b", "c"), ("a", "bc")], extra_tokens=("xyz", "xy", "abcd"))
    assert_same_ids(tokenizer, ["abc", "bc", "ab", "xyz", "xy", "abcd", "aabcbc xyzabc"])
    assert len(tokenizer.encode("abc").ids) == 2 and len(tokenizer.encode("xyz").ids) == 3


def changed(change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    description = json.loads(byte_level([("a", "b")]).to_str())
    change(description)
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        lambda json: json.update(normalizer={"type": "NFC"}),
        lambda json: json["pre_tokenizer"].update(add_prefix_space=True),
        lambda json: json["pre_tokenizer"].update(use_regex=False),
        lambda json: json.update(pre_tokenizer=None),
        lambda json: json.update(pre_tokenizer={"type": "Whitespace"}),
        lambda json: json["model"].update(dropout=0.5),
        lambda json: json["model"].update(ignore_merges=True),
        lambda json: json["model"].update(end_of_word_suffix="b"),
        lambda json: json["model"]["vocab"].pop("z"),
        lambda json: json["model"]["vocab"].update(z=json["model"]["vocab"]["y"]),
        lambda json: json.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        lambda json: json.update(
            post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
        ),
    ],
)
def test_what_is_not_plain_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    assert fast_bpe(changed(lambda json: None)) is not None
    assert fast_bpe(changed(change)) is None


def test_only_tokens_that_are_never_found_in_text_may_be_added() -> None:
    tokenizer = byte_level([("a", "b")])
    tokenizer.add_special_tokens([AddedToken("<end>"), AddedToken(" <pad>", normalized=True, lstrip=True)])
    assert_same_ids(tokenizer, ["ab<end>ab", "ab  <pad>ab", "<|special|>"])
    tokenizer.encode_special_tokens = False
    assert fast_bpe(tokenizer) is None
    tokenizer.encode_special_tokens = True
    tokenizer.add_tokens([AddedToken("b<")])
    assert fast_bpe(tokenizer) is None


def without_letters(letters: str) -> Tokenizer:
    """An edition of Unicode that does not know them."""
    tokenizer = byte_level([("a", "b")])
    letter = rf"[\p{{L}}&&[^{letters}]]"
    pattern = rf"'(?:[sdmt]|ll|ve|re)| ?{letter}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+|."
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    return tokenizer


def test_characters_that_are_seen_differently_are_found() -> None:
    classes = _CharacterClasses(without_letters("éz"))
    assert classes.agree("bcd 1! ë中😀\u2028")
    assert not classes.agree("é") and not classes.agree("z") and not classes.agree("ëé")
    assert classes.agree("ë" + BOUNDARIES.replace("é", ""))


def test_a_text_with_such_a_character_is_left_to_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_bpe(byte_level([("a", "b")]))
    assert fast is not None
    fast._classes = _CharacterClasses(without_letters("é"))
    found = fast.encode_batch(["ab", "abé", "中ab"])
    assert [ids is None for ids in found] == [False, True, False]


def test_endless_pieces() -> None:
    tokenizer = TextTokenizer(byte_level([("a", "a"), ("aa", "aa"), ("Ġ", "Ġ")]), "<end>")
    encode = tokenizer.corpus_encoder()
    texts = ["a" * 50_001, "中" * 20_000, " " * 9999 + "x", "\n" * 9999 + "x"]
    for ids, text in zip(encode(texts), texts, strict=True):
        assert ids.tolist() == tokenizer.encode(text)
    (pair,), (space,) = tokenizer.encode("  "), tokenizer.encode(" ")
    ids = encode([" " * 1_000_001 + "x"])[0].tolist()  # more than the fast one can remember
    assert ids == [pair] * 500_000 + [space, *tokenizer.encode("x")]
