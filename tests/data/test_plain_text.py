"""Every kind of tokenizer: text is text, like a special token or not, and a cut changes no id."""

from collections.abc import Callable
from itertools import product

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gpt_lightning.data import documents, encoding
from gpt_lightning.data.documents import Piece
from gpt_lightning.data.encoding import encode_pieces
from gpt_lightning.data.tokenizer import TextTokenizer, train_bpe
from gpt_lightning.exit_codes import UserError

LINES = ("The cat sat on the mat.", "ate  the rat, 42 times!", "</s> is text; <s> too", "...", "/a/b", " x")
TEXT = "\n".join(first + second for first, second in product(LINES, LINES))
SPECIAL = ["<unk>", "</s>", "<s>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def unigram(**parts: object) -> Tokenizer:
    tokenizer = with_parts(Tokenizer(models.Unigram()), parts)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def bpe(**parts: object) -> Tokenizer:
    """Is trained on text that holds its special tokens, so that its merges make them."""
    tokenizer = with_parts(Tokenizer(models.BPE(unk_token="<unk>")), parts)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL[:1], show_progress=False)
    tokenizer.train_from_iterator([TEXT + "</s>" * 200], trainer)
    tokenizer.add_special_tokens(["</s>", "<s>"])
    return tokenizer


def words(**parts: object) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *TEXT.split()]))}
    return with_parts(Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), parts)


def word_pieces(**parts: object) -> Tokenizer:
    pieces = [*SPECIAL, *sorted(set(TEXT)), *(f"##{character}" for character in sorted(set(TEXT)))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return with_parts(Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>")), parts)


def with_parts(tokenizer: Tokenizer, parts: dict[str, object]) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    if tokenizer.get_vocab_size():
        tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def llama_2(**parts: object) -> Tokenizer:
    as_words = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return bpe(normalizer=normalizers.Sequence(as_words), **parts)


def split_by(pattern: str) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return bpe(pre_tokenizer=pre_tokenizers.Sequence([split, as_bytes]))


def byte_level(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def by_words(then: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), then])


def with_added(content: str, **options: bool) -> Tokenizer:
    tokenizer = bpe(pre_tokenizer=byte_level())
    tokenizer.add_tokens([AddedToken(content, **options)])
    return tokenizer


# Those that may be cut, as the ids of a document's pieces are the document's.
CUT: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: bpe(pre_tokenizer=byte_level()),
    "GPT-2 by digits": lambda: bpe(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]),
        normalizer=normalizers.NFC(),
    ),
    "Llama 3": lambda: split_by(LLAMA_3),
    "words": lambda: words(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "BERT": lambda: word_pieces(
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(), normalizer=normalizers.BertNormalizer()
    ),
    "with a word": lambda: with_added("mat"),
    "old T5": lambda: unigram(pre_tokenizer=by_words(pre_tokenizers.Metaspace(prepend_scheme="always"))),
}
WHOLE: dict[str, Callable[[], Tokenizer]] = {
    "T5": lambda: unigram(pre_tokenizer=pre_tokenizers.Metaspace()),
    "first": lambda: unigram(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "never": lambda: unigram(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "first word": lambda: unigram(pre_tokenizer=by_words(pre_tokenizers.Metaspace(prepend_scheme="first"))),
    "Unigram alone": unigram,
    "Llama 2": llama_2,
    "BPE alone": bpe,
    "WordLevel alone": words,
    "prefix space": lambda: bpe(pre_tokenizer=byte_level(add_prefix_space=True)),
    "no pattern": lambda: bpe(pre_tokenizer=byte_level(use_regex=False)),
    "o200k": lambda: split_by(LLAMA_3.replace(r"+[\r\n]*", r"+[\r\n/]*")),
    "strip": lambda: bpe(pre_tokenizer=byte_level(), normalizer=normalizers.Strip()),
    "cleaned": lambda: bpe(pre_tokenizer=byte_level(), normalizer=normalizers.BertNormalizer()),
    "replace": lambda: bpe(
        pre_tokenizer=byte_level(), normalizer=normalizers.Replace(Regex(r"\n(?=T)"), "!")
    ),
    "with a line": lambda: with_added("\nThe"),
    "stripping": lambda: with_added("The", lstrip=True, rstrip=True),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 40)


def cut(text: str) -> list[Piece]:
    return list(documents._pieces([Piece(text, ends_document=True)]))


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_a_long_document_has_the_ids_of_the_whole(name: str) -> None:
    tokenizer = TextTokenizer({**CUT, **WHOLE}[name](), "</s>")
    texts = [TEXT, "The " * 50, TEXT.replace("\n", "\r\n"), "a\n\n" * 30, "x", "cat\x1csat\x85" * 20]
    pieces = [("train", piece) for text in texts for piece in cut(text)]
    assert len(pieces) > 50
    expected = [index for text in texts for index in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    found = [index for text in encode_pieces(pieces, tokenizer) for index in text.tokens.tolist()]
    assert found == expected
    assert tokenizer.may_be_cut is (name in CUT)


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_text_never_yields_a_special_token(name: str) -> None:
    raw = {**CUT, **WHOLE}[name]()
    special = {raw.token_to_id(token) for token in ("</s>", "<s>")}
    tokenizer = TextTokenizer(raw, "</s>")
    texts = ["</s>", "<s>", " </s> ", "a</s>b", "The cat </s> sat <s> on", "＜/s＞", "</s></s>", TEXT]
    copy = TextTokenizer.from_dict(tokenizer.state)
    for text, batched in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert special.isdisjoint(batched), text
        assert tokenizer.encode(text) == batched == copy.encode(text)
    for text, ids in zip(texts, tokenizer.corpus_encoder()(texts), strict=True):
        assert special.isdisjoint(ids.tolist()), text


def test_text_that_holds_none_has_the_library_s_ids() -> None:
    """What keeps special tokens out changes no other id, that of the unknown included."""
    text = TEXT.replace("</s>", "").replace("<s>", "") + "鲁迅"
    for name in ("T5", "words", "BERT", "Llama 2"):
        raw = {**CUT, **WHOLE}[name]()
        expected = raw.encode(text, add_special_tokens=False).ids
        assert TextTokenizer(raw, "</s>").encode(text) == expected
        assert "Llama" in name or raw.token_to_id("<unk>") in expected


def test_the_ids_of_other_added_tokens_stay() -> None:
    raw = unigram(pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    raw.add_special_tokens(["<pad>"])
    raw.add_tokens(["<user>"])
    tokenizer = TextTokenizer(raw, "</s>")
    ids = tokenizer.encode("a <user> </s> <pad> b")
    assert raw.token_to_id("<user>") in ids and raw.token_to_id("<pad>") not in ids
    assert tokenizer.decode(tokenizer.encode("is </s> text; <s>")) == "is </s> text; <s>"


def test_unknown_text_that_would_be_the_end_is_refused() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TextTokenizer(raw, "</s>")
    assert tokenizer.encode("a a") == [0, 0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="eos_token='</s>' is also what .* makes of some text; give"):
            encode("a b")


def test_a_character_of_texts_as_the_end_is_refused() -> None:
    tokenizer = TextTokenizer(train_bpe([TEXT], 300)._tokenizer, "!")
    assert tokenizer.decode(tokenizer.encode("no end")) == "no end"
    for encode in (tokenizer.encode, lambda text: tokenizer.corpus_encoder()([text])):
        with pytest.raises(UserError, match="eos_token='!' is also what .* makes of some text; give"):
            encode("an end!")


def test_a_document_too_long_to_be_encoded_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_LONGEST_WHOLE", 100)
    pieces = [("train", piece) for piece in cut(TEXT)]
    with pytest.raises(UserError, match="is longer than 100 characters, .*; give data.document_sep"):
        list(encode_pieces(pieces, TextTokenizer(llama_2(), "</s>")))
    assert list(encode_pieces(pieces, TextTokenizer(CUT["GPT-2"](), "</s>")))


def test_a_word_that_merges_make_may_be_the_end() -> None:
    raw = train_bpe(["hello " * 50], 300)._tokenizer
    tokenizer = TextTokenizer(raw, "hello")
    assert raw.token_to_id("hello") == tokenizer.eos_token_id
    texts = ["hello", " hello hello", "hell", "say hello, hellos"]
    found = [ids.tolist() for ids in tokenizer.corpus_encoder()(texts)]
    assert found == tokenizer.encode_batch(texts)
    for text, ids in zip(texts, found, strict=True):
        assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.encode(" hello") == raw.encode(" hello", add_special_tokens=False).ids
