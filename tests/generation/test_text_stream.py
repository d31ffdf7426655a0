"""The pieces of a streamed text are, together, the text that decoding all its tokens at once gives."""

import random
import statistics
import time
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gpt_lightning.data.byte_fallback import ByteFallback
from gpt_lightning.data.tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer, train_bpe
from gpt_lightning.generation.text_stream import TextStream

TEXTS = [
    "从前有一个国王,他有三个儿子。狂人日记:今天晚上,很好的月光。",
    "Emoji: 👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪 country. naïve Ångström, e\u0301 and a\u0308.",
    "def main():\n    print('hello,  world')\n\n\treturn\r\n",
    "Once upon a time there was a little house. The cat sees the dog, and the dog likes the cat.",
]


def byte_level_bpe() -> TextTokenizer:
    return train_bpe(TEXTS * 3, 420)


def metaspace() -> TextTokenizer:
    """As T5 and its kind: ▁ begins a word, and the first one's is no space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", END_OF_TEXT], initial_alphabet=["▁"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return TextTokenizer(tokenizer, END_OF_TEXT)


def byte_fallback() -> TextTokenizer:
    """As Llama's: what no token has is written in tokens of one byte."""
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", END_OF_TEXT, *of_bytes, "▁", *"abcdehlotu", "▁a", "ca"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "a"), ("c", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(tokenizer, END_OF_TEXT)


def word_piece() -> TextTokenizer:
    words = ["[UNK]", END_OF_TEXT, "the", "cat", "##s", "##ing", "see", ",", ".", "'", "##t", "do", "n"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}))
    tokenizer.decoder = decoders.WordPiece()
    return TextTokenizer(tokenizer, END_OF_TEXT)


def bytes_in_a_sequence() -> TextTokenizer:
    """Byte-level, but not by the name of its decoder alone."""
    inner = byte_level_bpe()._tokenizer
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return TextTokenizer(inner, END_OF_TEXT)


MAKERS = [byte_level_bpe, metaspace, byte_fallback, word_piece, bytes_in_a_sequence]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    make: Callable[[], TextTokenizer] = request.param
    return make()


def streamed(tokenizer: TextTokenizer, ids: list[int], stop: list[str] = []) -> list[str]:
    """What each id adds, and what the end does."""
    stream = TextStream(tokenizer, stop)
    texts = [""]
    for index in ids:
        stream.add(index)
        texts.append(stream.text)
    texts.append(stream.end())
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:]))
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def decoded(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """The text of all ids at once."""
    if tokenizer._decoder_types == {"ByteLevel"}:
        return b"".join(tokenizer._token_bytes.get(index, b"") for index in ids).decode(errors="ignore")
    fallback = ByteFallback(tokenizer._fallback_bytes)
    certain = [index for given in ids for index in fallback.add(given)]
    return tokenizer._tokenizer.decode(certain, skip_special_tokens=True).replace("\ufffd", "")


def cut_at_stop(text: str, stop: list[str]) -> str:
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]


def until_stop(tokenizer: TextTokenizer, ids: list[int], stop: list[str]) -> list[int]:
    """By decoding the whole text after each token."""
    for n in range(1, len(ids) + 1):
        if any(text in decoded(tokenizer, ids[:n]) for text in stop):
            return ids[:n]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_whole(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_give_what_decoding_them_gives(tokenizer: TextTokenizer, seed: int) -> None:
    generator = random.Random(seed)
    # Ids beyond the vocabulary too: a model may know more than its tokenizer.
    ids = [generator.randrange(tokenizer.vocab_size + 5) for _ in range(200)]
    for n in (1, 2, 3, 10, 50, 200):
        assert "".join(streamed(tokenizer, ids[:n])) == decoded(tokenizer, ids[:n])


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_and_characters_mixed(seed: int) -> None:
    """Cut characters, characters of two to four bytes, and bytes that make none, in all neighbourhoods."""
    generator = random.Random(seed)
    for tokenizer in (load_tokenizer("bytes"), byte_fallback()):
        first = tokenizer._fallback_bytes or {byte: byte for byte in range(256)}
        id_of = {byte: index for index, byte in first.items()}
        data = b"".join(
            generator.choice(["é", "你", "👍🏽", "a", " "]).encode()[: generator.randint(1, 9)]
            if generator.random() < 0.8
            else generator.randbytes(1)
            for _ in range(100)
        )
        ids = [id_of[byte] for byte in data]
        assert tokenizer.decode(ids).lstrip(" ") == data.decode(errors="ignore").lstrip(" ")
        assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_cut_where_cutting_the_whole_text_cuts(tokenizer: TextTokenizer, seed: int) -> None:
    generator = random.Random(seed)
    ids = [generator.randrange(tokenizer.vocab_size) for _ in range(120)]
    text = decoded(tokenizer, ids)
    starts = [generator.randrange(len(text)) for _ in range(3)]
    stop = [found for start in starts if (found := text[start : start + generator.randint(1, 6)])]
    stop.append("never written")
    ids = until_stop(tokenizer, ids, stop)
    pieces = streamed(tokenizer, ids, stop)
    assert "".join(pieces) == cut_at_stop(decoded(tokenizer, ids), stop)
    assert not any(end in "".join(pieces) for end in stop)


def test_no_piece_holds_a_part_of_a_character() -> None:
    tokenizer = load_tokenizer("bytes")
    assert streamed(tokenizer, list("a你👍".encode())) == ["a", "", "", "你", "", "", "", "👍", ""]
    assert streamed(tokenizer, list("你".encode())[:2]) == ["", "", ""]


def test_byte_fallback_gives_characters_as_they_are_complete() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("你好 a")
    pieces = streamed(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["你", "好", " a"]
    # One byte that makes no character takes none of its neighbours along.
    assert tokenizer.decode([*ids[:-1], 2 + 0xFF, *ids[1:]]) == "你好你好 a"


def test_the_beginning_of_a_stop_string_waits_for_its_end() -> None:
    tokenizer = load_tokenizer("bytes")
    assert streamed(tokenizer, list(b"ab\n\nc"), ["\n\n\n"]) == ["a", "b", "", "", "\n\nc", ""]
    assert streamed(tokenizer, list(b"ab\n\n\nc"), ["\n\n\n"]) == ["a", "b", "", "", "", "", ""]
    assert streamed(tokenizer, list(b"ab\n"), ["\n\n"]) == ["a", "b", "", "\n"]
    # A beginning that fails may hold another one.
    assert streamed(tokenizer, list(b"aab"), ["aab"]) == ["", "", "", ""]
    assert streamed(tokenizer, list(b"aaab"), ["aab"]) == ["", "", "a", "", ""]


def test_spaces_between_words_of_a_metaspace_tokenizer() -> None:
    tokenizer = metaspace()
    ids = tokenizer.encode("the cat  sees the dog")
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)
    assert tokenizer.decode(ids).startswith("the cat")


def test_a_token_costs_the_same_at_the_end_of_a_long_text(tokenizer: TextTokenizer) -> None:
    generator = random.Random(0)
    ids = [generator.randrange(tokenizer.vocab_size) for _ in range(4000)]
    stream = TextStream(tokenizer, ["never written"])
    seconds = []
    for start in range(0, 4000, 500):
        begin = time.process_time()
        for index in ids[start : start + 500]:
            stream.add(index)
        seconds.append(time.process_time() - begin)
    assert statistics.median(seconds[4:]) < 5 * statistics.median(seconds[:4]) + 0.05 and sum(seconds) < 2


def test_the_text_stops_with_the_token_that_completes_a_stop_string() -> None:
    tokenizer = byte_level_bpe()
    ids = tokenizer.encode("The cat sees the dog")
    for stop in (["at s"], ["t sees the d", "zzz"], ["猫"]):
        stream = TextStream(tokenizer, stop)
        for n, index in enumerate(ids, start=1):
            assert stream.add(index) == any(text in decoded(tokenizer, ids[:n]) for text in stop)
    assert not any(map(TextStream(tokenizer, []).add, ids))


def test_a_replacement_character_that_was_written_is_text() -> None:
    """The library's own stream would give it for bytes that make no character, too."""
    for tokenizer in (load_tokenizer("bytes"), byte_level_bpe(), bytes_in_a_sequence()):
        assert "".join(streamed(tokenizer, tokenizer.encode("a\ufffdb"))) == "a\ufffdb"


@pytest.mark.parametrize(
    "text, stop, kept",
    [
        ("one. two. three", ["."], "one"),
        ("one. two", ["!", "two"], "one. "),
        ("one", ["x"], "one"),
        ("a.b", [], "a.b"),
    ],
)
def test_a_completion_ends_before_its_stop_string(text: str, stop: list[str], kept: str) -> None:
    tokenizer = load_tokenizer("bytes")
    assert "".join(streamed(tokenizer, tokenizer.encode(text), stop)) == kept


def test_a_stop_string_over_many_tokens_without_text_is_a_stop() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = [*tokenizer.encode("aS"), *[0xC3] * 12, *tokenizer.encode("TOP and more")]
    stream = TextStream(tokenizer, ["STOP"])
    assert [stream.add(index) for index in ids].index(True) == 16  # at the P
    assert stream.end() == "a"
