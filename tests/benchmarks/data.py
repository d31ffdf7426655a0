"""Tokenizing a corpus beside `tokenizers`, the whole of `prepare`, and batches beside nanoGPT's get_batch.

    python tests/benchmarks/data.py --tokenizer FOLDER       Python's documentation, shuffled
    python tests/benchmarks/data.py --english FILE ... --chinese FILE ...
    python tests/benchmarks/data.py --nanogpt PATH           get_batch as a checkout has it

FOLDER holds GPT-2's tokenizer.json; without it a BPE of 8192 tokens is trained. The documents, of twenty
drawn sentences each, are made anew up to the size that is asked for. Every contender is cold in every
round, has a process of its own and the same cores, and its turn is followed by another's; medians are
shown. tokenizers is timed without the making of arrays from what it returns, ours with its proof that the
ids are the same; then every id is compared. `prepare` is all that happens from a .jsonl file to a token
cache on disk; its memory is what it adds at most to that of the process before, by the operating system
(Linux). A batch is 12 windows of 256 tokens, by our loader as Lightning asks it, in CPU time of one thread.
The last line is the result as JSON: how many times as fast as the other ours is, by the clock and, as the
machine may have other work, in CPU time.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.dealing import MixtureOrder, phases_of
from gpt_lightning.data.documents import Piece, read_pieces
from gpt_lightning.data.encoding import encode_pieces
from gpt_lightning.data.loader import EpochBatches, WindowBatches, batch_loader
from gpt_lightning.data.mixed_text import MixedSplit
from gpt_lightning.data.python_docs import SOURCE_NAME
from gpt_lightning.data.token_cache import TokenSplit, prepare_tokens
from gpt_lightning.data.tokenizer import load_tokenizer, train_bpe
from gpt_lightning.data.windows import Epochs
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

BATCH_BYTES = 4_000_000  # what tokenizers gets at a time: its cores are busy, and memory holds it
BATCH, SEQ_LEN, BATCHES = 12, 256, 500
CONTENDERS = ("tokenizers encode_batch", "tokenizers encode_batch_fast", "ours")


class Turn(NamedTuple):
    """What one contender took, and what came of it."""

    wall: float
    cpu: float
    digest: str = ""
    added_megabytes: float = 0.0


def texts_of(files: list[str]) -> str:
    pieces = (
        piece.text
        for file in files
        for piece in read_pieces(file, lambda n_bytes: None, text_key="text", document_separator=None)
    )
    return "\n".join(pieces)


def write_corpus(path: Path, files: list[str], megabytes: float) -> None:
    """Documents of sentences drawn from the files, some with an end of paragraph after them."""
    draw = random.Random(0)
    sentences = re.split(r"(?<=[.!?。！？])\s*(?=\S)", texts_of(files))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            chosen = draw.choices(sentences, k=20)
            text = "".join(sentence + draw.choice([" ", " ", " ", "\n\n"]) for sentence in chosen)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())


def read_corpus(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def batches_of(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_bytes = 0
    for text in texts:
        batch.append(text)
        n_bytes += len(text.encode())
        if n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    yield batch


def tokenize_turn(contender: str, tokenizer: str, path: Path) -> Turn:
    texts = read_corpus(path)
    loaded = load_tokenizer(tokenizer)
    digest = hashlib.sha256()
    wall = cpu = 0.0
    if contender == "ours":
        marked = [("train", Piece(text, ends_document=True)) for text in texts]
        began, cpu_began = time.perf_counter(), time.process_time()
        found = [text.tokens for text in encode_pieces(marked, loaded)]
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        for tokens in found:
            digest.update(tokens.tobytes())
        return Turn(wall, cpu, digest.hexdigest())
    theirs = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    theirs.encode_special_tokens = True
    encode = getattr(theirs, contender.split()[1])
    for batch in batches_of(texts):
        began, cpu_began = time.perf_counter(), time.process_time()
        encodings = encode(batch, add_special_tokens=False)
        wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - cpu_began
        for encoding in encodings:
            digest.update(np.array([*encoding.ids, loaded.eos_token_id], dtype=np.uint32).tobytes())
    return Turn(wall, cpu, digest.hexdigest())


def prepare_turn(tokenizer: str, path: Path) -> Turn:
    corpus = Corpus.find(
        {"train_files": [str(path)], "val_files": None, "test_files": None},
        val_fraction=0.1,
        seed=0,
        text_key="text",
        document_separator=None,
    )
    loaded = load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident_megabytes("VmRSS")
        began, cpu_began = time.perf_counter(), time.process_time()
        prepare_tokens(corpus, loaded, folder)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return Turn(wall, cpu, added_megabytes=resident_megabytes("VmHWM") - before)


def resident_megabytes(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def in_new_process(cores: set[int], function: Callable[..., Turn], *arguments: Any) -> Turn:
    """Nothing is warm there, and the libraries' threads find `cores` alone."""
    with ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, cores)) as process:
        return process.submit(function, *arguments).result()


def median(turns: list[Turn]) -> Turn:
    return turns[0]._replace(
        wall=statistics.median(turn.wall for turn in turns),
        cpu=statistics.median(turn.cpu for turn in turns),
        added_megabytes=max(turn.added_megabytes for turn in turns),
    )


def measure_tokenizing(
    name: str, files: list[str], tokenizer: str, cores: set[int], options: argparse.Namespace
) -> dict[str, dict[str, float | bool]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = {"large": options.megabytes, "small": options.megabytes / 4}
        for size, megabytes in sizes.items():
            write_corpus(folder / f"{size}.jsonl", files, megabytes)
        large, small = folder / "large.jsonl", folder / "small.jsonl"
        turns: dict[str, list[Turn]] = {}
        for _ in range(options.rounds):
            for contender in CONTENDERS:
                turn = in_new_process(cores, tokenize_turn, contender, tokenizer, large)
                turns.setdefault(contender, []).append(turn)
            for title, path in (("prepare", large), ("prepare a quarter", small)):
                turns.setdefault(title, []).append(in_new_process(cores, prepare_turn, tokenizer, path))
    medians = {title: median(found) for title, found in turns.items()}
    for title, turn in medians.items():
        megabytes = sizes["small" if title == "prepare a quarter" else "large"]
        rate, cpu_rate = megabytes / turn.wall, megabytes / turn.cpu
        memory = f"  adds {turn.added_megabytes:.0f} MB" if turn.added_megabytes else ""
        print(f"{name:8} {title:28} {rate:6.1f} MB/s  {cpu_rate:6.1f} MB a CPU second{memory}")
    same = len({turn.digest for contender in CONTENDERS for turn in turns[contender]}) == 1
    print(f"{name:8} ids are {'the same' if same else 'NOT THE SAME'}")
    ours, prepare = medians["ours"], medians["prepare"]
    slow, fast = medians[CONTENDERS[0]], medians[CONTENDERS[1]]
    return {
        f"tokenize {name}": {
            "vs_tokenizers": round(fast.wall / ours.wall, 2),
            "vs_tokenizers_cpu": round(fast.cpu / ours.cpu, 2),
            "vs_encode_batch": round(slow.wall / ours.wall, 2),
            "same_ids": same,
        },
        f"prepare {name}": {
            "megabytes_per_second": round(options.megabytes / prepare.wall, 1),
            "share_of_limit": round(ours.wall / prepare.wall, 2),  # of the rate of tokenizing alone
            "added_megabytes": round(prepare.added_megabytes),
            "added_megabytes_of_a_quarter": round(medians["prepare a quarter"].added_megabytes),
        },
    }


# ---- batches


def make_split(folder: Path, n_tokens: int = 10_000_000) -> TokenSplit:
    """Random ids in documents of 500, also under the name that nanoGPT reads."""
    ids = np.random.default_rng(0).integers(0, 50_000, n_tokens).astype(np.uint16)
    ids.tofile(folder / "train.tokens.bin")
    os.link(folder / "train.tokens.bin", folder / "train.bin")
    np.append(np.arange(0, n_tokens, 500), n_tokens).astype(np.uint64).tofile(folder / "train.documents.bin")
    return TokenSplit(folder, "train", "uint16", n_tokens, 4 * n_tokens, n_tokens // 500)


def our_batches(
    split: TokenSplit, *, batch: int = BATCH, seq_len: int = SEQ_LEN, seed: int | None = 0, mask: bool = False
) -> Iterator[Any]:
    epochs = Epochs(n_tokens=split.n_tokens, seq_len=seq_len, global_batch=batch, seed=seed)
    dataset = WindowBatches(
        split=split, epochs=epochs, rank=0, ranks=1, document_mask=mask, vocab_size=50_257
    )
    return iter(batch_loader(dataset, lambda: EpochBatches(range(10**9), 10**9)))


def mixed_batches(split: TokenSplit, n_sources: int = 4) -> Iterator[Any]:
    """Batches of several sources at unequal weights, each as large as the one beside which they are timed."""
    sources = tuple(Epochs(n_tokens=split.n_tokens, seq_len=SEQ_LEN, seed=seed) for seed in range(n_sources))
    phases = phases_of([tuple(1.0 + index / 7 for index in range(n_sources))], [0])
    order = MixtureOrder(sources=sources, phases=phases, seq_len=SEQ_LEN, global_batch=BATCH)
    dataset = WindowBatches(
        split=MixedSplit([split] * n_sources),
        epochs=order,
        rank=0,
        ranks=1,
        document_mask=False,
        vocab_size=50_257,
    )
    return iter(batch_loader(dataset, lambda: EpochBatches(range(10**9), 10**9)))


def nanogpt_get_batch(folder: Path, checkout: str | None) -> Callable[[], object]:
    """The function of a checkout's train.py, or one that does what it does."""
    if checkout is None:
        return lambda: reopening_get_batch(folder / "train.bin")
    tree = ast.parse((Path(checkout) / "train.py").read_text(encoding="utf-8"))
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_batch"
    )
    names: dict[str, Any] = {"np": np, "torch": torch, "os": os, "data_dir": str(folder), "device": "cpu"}
    names |= {"device_type": "cpu", "block_size": SEQ_LEN, "batch_size": BATCH}
    exec(compile(ast.Module([function], []), "train.py", "exec"), names)
    return lambda: names["get_batch"]("train")


def reopening_get_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows at random places, each cut out by itself from a map that is opened for every batch."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    places = torch.randint(len(tokens) - SEQ_LEN, (BATCH,))

    def stacked(shift: int) -> torch.Tensor:
        rows = [tokens[place + shift : place + shift + SEQ_LEN].astype(np.int64) for place in places]
        return torch.stack([torch.from_numpy(row) for row in rows]).to("cpu")

    return stacked(0), stacked(1)


def cpu_microseconds(get: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        get()
    return (time.process_time() - began) / times * 1e6


def train_step(batch: int, seq_len: int) -> Callable[[], object]:
    """The passes of the smallest model that a config of ours trains, configs/quickstart.yaml."""
    config = GPTConfig(
        vocab_size=2048, max_position_embeddings=seq_len, n_layers=2, n_heads=4, d_model=128
    )
    model = GPTModel(config)
    inputs, targets = torch.randint(config.vocab_size, (2, batch, seq_len))

    def step() -> None:
        loss = model(inputs, targets).loss
        assert loss is not None
        loss.backward()

    return step


def measure_batches(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = make_split(folder)
        loaders = {
            "ours": our_batches(split),
            "ours, document mask": our_batches(split, mask=True),
            "ours, evaluation": our_batches(split, seed=None),
            "ours, mixture of 4": mixed_batches(split),
            "ours 8 x 128": our_batches(split, batch=8, seq_len=128),
        }
        contenders: dict[str, tuple[Callable[[], object], int]] = {
            title: (lambda loader=loader: next(loader), BATCHES)  # type: ignore[misc]
            for title, loader in loaders.items()
        }
        contenders["nanoGPT"] = nanogpt_get_batch(folder, options.nanogpt), BATCHES
        contenders["a step, 2 layers of 128, 8 x 128"] = train_step(8, 128), 20
        costs: dict[str, list[float]] = {title: [] for title in contenders}
        for _ in range(options.rounds):
            for title, (get, times) in contenders.items():
                costs[title].append(cpu_microseconds(get, times))
    medians = {title: statistics.median(found) for title, found in costs.items()}
    for title, cost in medians.items():
        print(f"batch    {title:32} {cost:9.1f} us of CPU")
    return batch_cases(medians)


def batch_cases(medians: dict[str, float]) -> dict[str, dict[str, float]]:
    cases = {}
    for title in ("ours", "ours, document mask", "ours, evaluation"):
        case = f"batch {BATCH} x {SEQ_LEN}{title.removeprefix('ours')}"
        ratio = medians["nanoGPT"] / medians[title]
        cases[case] = {"vs_nanogpt": round(ratio, 2), "cost": round(1 / ratio, 3)}
    mixed = medians["ours, mixture of 4"] / medians["ours"]
    cases["mixture of 4 beside one text"] = {"cost": round(mixed, 3)}
    share = medians["ours 8 x 128"] / medians["a step, 2 layers of 128, 8 x 128"]
    cases["data of the smallest step"] = {"share_of_step": round(share, 5)}
    return cases


def tokenizer_folder(given: str | None, files: list[str], folder: Path) -> str:
    if given is not None:
        return given
    train_bpe([texts_of(files)[:2_000_000]], 8192).save(folder)
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=48, help="size of a corpus")
    parser.add_argument("--tokenizer", help="folder of a tokenizer.json")
    parser.add_argument("--english", nargs="+", default=[SOURCE_NAME])
    parser.add_argument("--chinese", nargs="+", default=[])
    parser.add_argument("--nanogpt", help="path of a checkout")
    options = parser.parse_args(arguments)
    if not hasattr(os, "sched_setaffinity"):
        parser.error("needs Linux, to give all contenders the same cores")
    cores = set(sorted(os.sched_getaffinity(0))[: options.threads])
    cases: dict[str, Any] = {}
    for name, files in (("english", options.english), ("chinese", options.chinese)):
        if files:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = tokenizer_folder(options.tokenizer, files, Path(folder))
                cases |= measure_tokenizing(name, files, tokenizer, cores, options)
    cases |= measure_batches(options)
    print(json.dumps(cases))
    if not all(case.get("same_ids", True) for case in cases.values()):
        sys.exit("the contenders' ids differ")


if __name__ == "__main__":
    main()
