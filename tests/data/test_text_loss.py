"""What a tokenizer loses of a text is measured, is said in a line, and no bits per byte are shown of it."""

import json
import logging
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.documents import Piece
from gpt_lightning.data.text_loss import TextSample
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule

ENGLISH = "The cat sat on the mat. "
CHINESE = "鲁迅写了呐喊，我也读过。"


def lost_share(tokenizer: TextTokenizer, *texts: str) -> float:
    sample = TextSample()
    for text in texts:
        sample.add(Piece(text, ends_document=True))
    return sample.lost_share(tokenizer)


def words() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *ENGLISH.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def normalized(normalizer: normalizers.Normalizer) -> TextTokenizer:
    tokenizer = Tokenizer.from_str(train_bpe([ENGLISH], 300).state["tokenizer_json"])
    tokenizer.normalizer = normalizer
    return TextTokenizer(tokenizer, "<|endoftext|>")


def test_the_share_of_what_is_lost() -> None:
    word_level = TextTokenizer(words(), "</s>")
    assert lost_share(word_level, ENGLISH.strip()) == 0
    assert lost_share(word_level, CHINESE * 500) == 1
    assert lost_share(word_level, "The cat", "a dog ") == pytest.approx(6 / 13)  # and the space of "a dog "
    assert lost_share(word_level, "The\ncat") == pytest.approx(1 / 7)
    lower = normalized(normalizers.Lowercase())
    assert lost_share(lower, "the cat") == 0 and lost_share(lower, "The cat") == pytest.approx(1 / 7)
    composed = normalized(normalizers.NFC())
    assert lost_share(composed, "é") == 0 and lost_share(composed, "e\u0301") > 0
    assert lost_share(word_level) == 0


def test_samples_of_consecutive_texts_make_one_in_which_each_has_its_weight() -> None:
    def joined(*texts: str) -> TextSample:
        samples = [TextSample() for _ in texts]
        for sample, text in zip(samples, texts, strict=True):
            sample.add(Piece(text, ends_document=True))
        return TextSample.joined([sample.keep() for sample in samples])

    word_level = TextTokenizer(words(), "</s>")
    assert joined("The cat", "a dog ").lost_share(word_level) == lost_share(word_level, "The cat", "a dog ")
    # A quarter of the stretches is lost; if samples of 64 weighed the same, it would be half.
    english = "mat. cat " * 33_334
    for texts in ([english, CHINESE * 8334, ""], [CHINESE * 8334, "", english]):
        assert 0.12 < joined(*texts).lost_share(word_level) < 0.38


@pytest.mark.parametrize("tokenizer", [load_tokenizer("bytes"), train_bpe([ENGLISH, CHINESE], 300)])
def test_a_byte_level_tokenizer_loses_nothing(tokenizer: TextTokenizer) -> None:
    assert lost_share(tokenizer, ENGLISH * 300, CHINESE * 3000, " \n </s>\x00\ufffd<|endoftext|> ") == 0


@pytest.mark.parametrize("is_special", [False, True])
def test_a_llama_loses_nothing(is_special: bool) -> None:
    """Its spaces are letters, and what it does not know is bytes, whatever its file says of these."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special, as_bytes = ["<unk>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + as_bytes, show_progress=False)
    tokenizer.train_from_iterator([ENGLISH], trainer)
    stored = json.loads(tokenizer.to_str())
    if not is_special:
        stored["added_tokens"] = stored["added_tokens"][:2]
    llama = TextTokenizer(Tokenizer.from_str(json.dumps(stored)), "</s>")
    if not is_special:  # else decoding leaves them out
        assert lost_share(llama, ENGLISH, CHINESE, " lead", "trail ", "a\n\nb  c", "</s> <0x0A>", " ") == 0
    newline = tokenizer.token_to_id("<0x0A>")
    assert newline in llama.encode("\n") and newline not in llama.encode("<0x0A>")


def test_every_part_of_a_long_text_may_be_in_the_sample() -> None:
    sample = TextSample()
    for number in range(1000):
        sample.add(Piece(f"{number:04} " * 800, ends_document=number % 3 == 0))
    numbers = sorted(int(stretch[:4].strip()[:4] or 0) for stretch in sample._stretches)
    assert len(numbers) == 64 and numbers[10] < 400 and numbers[-10] > 600


def validated(folder: Path, tokenizer: str, caplog: pytest.LogCaptureFixture) -> tuple[dict[str, float], str]:
    """The numbers of a validation, and what was said of its text."""
    caplog.clear()
    data = TextDataModule(
        train_files=str(folder / "a.jsonl"), tokenizer=tokenizer, seq_len=4, cache_dir=str(folder / "cache")
    )
    module = GPTLightningModule(GPTConfig(data.vocab_size, 8, n_layers=1, n_heads=1, d_model=8))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with caplog.at_level(logging.WARNING, logger="gpt_lightning"):
        (numbers,) = trainer.validate(module, data, verbose=False)
    ours = [record for record in caplog.records if record.name == "gpt_lightning"]
    said = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    return dict(numbers), "\n".join(said)


def test_bits_per_byte_are_not_shown_where_text_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": CHINESE if index % 2 else ENGLISH.strip()} for index in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words").mkdir()
    words().save(str(tmp_path / "words" / "tokenizer.json"))
    for _ in range(2):  # measured, and then remembered by the cache
        numbers, said = validated(tmp_path, str(tmp_path / "words"), caplog)
        assert numbers.keys() == {"val/loss", "val/ppl"}
        assert "loses text, by a sample decoded again 34." in said and "% of train, 34." in said
        assert "no bpb" in said and said.count("\n") == 0
    numbers, said = validated(tmp_path, "bytes", caplog)
    assert numbers["val/bpb"] > 0 and said == ""


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_a_cache_of_before_the_measure_is_read(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes lose nothing; of other kinds it is not known."""
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': ENGLISH.strip()})}\n" * 20)
    (tmp_path / "words").mkdir()
    words().save(str(tmp_path / "words" / "tokenizer.json"))
    name = str(tmp_path / "words") if tokenizer == "words" else tokenizer
    assert validated(tmp_path, name, caplog)[0]["val/bpb"] > 0
    (meta,) = tmp_path.glob("cache/tokens-*/meta.json")
    stored = json.loads(meta.read_text())
    splits = [split for split in stored["built"].values() if isinstance(split, dict)]
    for split in splits:
        assert split.pop("lost_share") == 0
    assert splits
    del stored["digest"]  # which came later
    meta.write_text(json.dumps(stored))
    numbers, said = validated(tmp_path, name, caplog)
    assert ("val/bpb" in numbers) is (tokenizer == "bytes")
    assert ("remove" in said and "bpb" in said) is (tokenizer == "words")
    assert "lost_share" not in meta.read_text()
