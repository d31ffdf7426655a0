"""Files of other encodings are told what they are, where that can be known, and never wrongly."""

from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.documents import read_pieces
from gpt_lightning.data.prompts import read_prompts
from gpt_lightning.evaluation.items import read_items
from gpt_lightning.exit_codes import UserError

CHINESE = "我在年青时候也曾经做过许多梦，后来大半忘却了，但自己也并不以为可惜。\n"
TAIWANESE = "我在年青時候也曾經做過許多夢，後來大半忘卻了，但自己也並不以為可惜。\n"


def test_the_other_files_that_are_to_be_converted_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(CHINESE, encoding="gbk" if number > 1 else "utf-8")
    settings: dict[str, Any] = dict(val_fraction=0.0, seed=0, text_key="text", document_separator=None)
    corpus = Corpus.find({"train_files": str(tmp_path), "val_files": None, "test_files": None}, **settings)
    with pytest.raises(UserError, match=r"2.txt is not UTF-8 .*; so are 2 others of the 5 files$"):
        list(corpus.read(corpus.sources, lambda n_bytes: None))


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (CHINESE.encode("gbk"), "GB18030"),
        (f"Lu Xun: {CHINESE}".encode("gb18030"), "GB18030"),
        (CHINESE.encode("gbk") * 10_000 + b"\xb0", "GB18030"),
        (CHINESE.encode("utf-16"), "UTF-16"),
        (b"\xfe\xff" + CHINESE.encode("utf-16-be"), "UTF-16"),
        (TAIWANESE.encode("big5"), "ENCODING"),
        ("Le général a vu Noël à l'école.\n".encode("latin-1"), "ENCODING"),
        ("私は若い頃たくさんの夢を見た。\n".encode("shift-jis"), "ENCODING"),
        (b"a\xff", "ENCODING"),
    ],
)
@pytest.mark.parametrize("reader", ["text", "jsonl", "prompts", "questions"])
def test_the_command_to_convert_names_the_encoding(
    tmp_path: Path, content: bytes, encoding: str, reader: str
) -> None:
    path = tmp_path / ("a.txt" if reader in ("text", "prompts") else "a.jsonl")
    path.write_bytes(content)
    problem = rf"a\.(txt|jsonl) is not UTF-8 at byte \d+; .*: iconv -f {encoding} -t UTF-8"
    with pytest.raises(UserError, match=problem):
        if reader == "prompts":
            read_prompts(None, str(path))
        elif reader == "questions":
            read_items(path)
        else:
            list(read_pieces(str(path), lambda n: None, text_key="text", document_separator=None))
