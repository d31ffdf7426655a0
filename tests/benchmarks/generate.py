"""Tokens a second of generation, beside transformers, nanoGPT, CTranslate2, llama.cpp and the memory's limit.

    python tests/benchmarks/generate.py                              ours and transformers
    python tests/benchmarks/generate.py --nanogpt PATH               also nanoGPT, from a checkout
    python tests/benchmarks/generate.py --prompt 900 --new 1         the time to the first token
    pip install 'gpt_lightning[ecosystem]'                           also CTranslate2, float32 and int8
    pip install llama-cpp-python                                     also llama.cpp, float32 and q8_0, batch 1

GPT-2 small with the same random weights everywhere, a prompt of 32 tokens, 128 new ones, greedy, batch 1 and
8. The contenders take turns, each project in a process of its own, and medians are shown. The limit is the
time that reading every weight once a step takes, at the rate at which the same threads sum an array larger
than any cache, measured in every round. nanoGPT has no cache: a new token is timed at five lengths of the
text, and their mean stands for all 128. The ratios of all precisions are to transformers and CTranslate2 in
float32, and to the faster of transformers' two; int8 is compared with CTranslate2's int8. llama.cpp, on what
`export-gguf` writes and by its own settings, is compared with ours in float32 and int8. There are none if the
machine was busy. The last line is the result as JSON.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import Watch, describe
from nanogpt_checkout import load_nanogpt
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from gpt_lightning.data.tokenizer import load_tokenizer
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.huggingface.gguf_file import write_gguf
from gpt_lightning.huggingface.gpt2 import config_from_gpt2, from_gpt2_state_dict
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.gpt import GPTModel

WARM_UP, BYTES_READ = 8, 512 * 2**20
OURS = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "int8": (torch.float32, "int8")}
Contender = Callable[[list[list[int]], int], list[list[int]]]  # prompts to so many new tokens


def our_contenders(reference: GPT2LMHeadModel, batch: int) -> dict[str, Contender]:
    model = GPTModel(config_from_gpt2(reference.config)).eval()
    model.load_state_dict(from_gpt2_state_dict(reference.state_dict(), model.config))

    def contender(dtype: torch.dtype, quantize: str | None) -> Contender:
        of_dtype = GPTModel(model.config).to(dtype)
        of_dtype.load_state_dict(model.state_dict())
        copy = packed(of_dtype, quantize=quantize, n_rows=batch)

        def run(prompts: list[list[int]], n_new: int) -> list[list[int]]:
            settings = GenerationConfig(max_new_tokens=n_new, do_sample=False)
            done = generate(copy, prompts, settings, eos_token_id=None, batch_size=batch)
            return [completion.token_ids for completion in done]

        return run

    return {f"ours {name}": contender(*kind) for name, kind in OURS.items()}


def transformers_contenders(reference: GPT2LMHeadModel) -> dict[str, Contender]:
    """float32 and bfloat16, with its dynamic cache: the static one needs minutes of compilation to pay."""

    def contender(model: GPT2LMHeadModel) -> Contender:
        def run(prompts: list[list[int]], n_new: int) -> list[list[int]]:
            ids = torch.tensor(prompts)
            texts = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_new,
                min_new_tokens=n_new,
                do_sample=False,
                pad_token_id=0,
            )
            return texts[:, len(prompts[0]) :].tolist()

        return run

    half = GPT2LMHeadModel(reference.config).to(torch.bfloat16).eval()
    half.load_state_dict(reference.state_dict())
    return {"transformers float32": contender(reference), "transformers bfloat16": contender(half)}


def ctranslate2_contenders(reference: GPT2LMHeadModel, threads: int) -> dict[str, Contender]:
    import ctranslate2

    folder = Path(tempfile.mkdtemp())
    reference.save_pretrained(folder / "hf")
    vocabulary = {str(token): token for token in range(reference.config.vocab_size)}
    _word_tokenizer(vocabulary).save_pretrained(folder / "hf")
    contenders: dict[str, Contender] = {}
    for kind in ("float32", "int8"):
        converter = ctranslate2.converters.TransformersConverter(str(folder / "hf"))
        converter.convert(str(folder / kind), quantization=kind)
        generator = ctranslate2.Generator(
            str(folder / kind), compute_type=kind, inter_threads=1, intra_threads=threads
        )

        def run(prompts: list[list[int]], n_new: int, generator: Any = generator) -> list[list[int]]:
            results = generator.generate_batch(
                [[str(token) for token in prompt] for prompt in prompts],
                max_length=n_new,
                min_length=n_new,
                sampling_topk=1,
                include_prompt_in_result=False,
            )
            return [result.sequences_ids[0] for result in results]

        contenders[f"CTranslate2 {kind}"] = run
    return contenders


def llama_cpp_contenders(reference: GPT2LMHeadModel, threads: int, kind: str) -> dict[str, Contender]:
    """One text at a time; the greatest logit is taken of its own memory, without its sampler."""
    import llama_cpp
    import numpy as np

    path = Path(tempfile.mkdtemp()) / f"{kind}.gguf"
    config = config_from_gpt2(reference.config)
    weights = from_gpt2_state_dict(reference.state_dict(), config)
    write_gguf(config, weights, load_tokenizer("bytes"), path, kind)
    model = llama_cpp.Llama(
        str(path),
        n_ctx=config.max_position_embeddings,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run(prompts: list[list[int]], n_new: int) -> list[list[int]]:
        (text,) = prompts
        model.reset()
        new: list[int] = []
        for _ in range(n_new):
            model.eval([new[-1]] if new else text)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            new.append(int(np.ctypeslib.as_array(logits, shape=(config.vocab_size,)).argmax()))
        return [new]

    return {f"llama.cpp {kind}": run}


def _word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    last = max(vocabulary, key=lambda word: vocabulary[word])
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=last))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=last, eos_token=last, unk_token=last)


def nanogpt_seconds(path: str, reference: GPT2LMHeadModel, prompts: list[list[int]], n_new: int) -> float:
    module = load_nanogpt(path)
    config = reference.config
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = module.GPT(module.GPTConfig(**sizes, block_size=config.n_positions, dropout=0.0)).eval()
    lengths = [len(prompts[0]) + n_new * part // 4 for part in range(5)]
    seconds = []
    for length in lengths:
        ids = torch.randint(config.vocab_size, (len(prompts), length))
        model.generate(ids[:, :2], 1, top_k=1)
        begin = time.perf_counter()
        model.generate(ids, 1, top_k=1)
        seconds.append(time.perf_counter() - begin)
    return statistics.mean(seconds) * n_new


def read_rate() -> float:
    """Bytes a second, the best of five."""
    array = torch.ones(BYTES_READ // 4)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - begin)
    return BYTES_READ / min(seconds)


def weight_bytes(reference: GPT2LMHeadModel, kind: str) -> int:
    """What a step reads: the blocks and the head, which is the token table, but no rows of the two tables."""
    n_weights = sum(weight.numel() for weight in reference.parameters())
    n_weights -= reference.transformer.wpe.weight.numel()
    return n_weights * {"float32": 4, "bfloat16": 2, "int8": 1}[kind]


_contenders: dict[str, Contender] = {}  # of this process
_prompts: list[list[int]] = []


def _begin(project: str, prompts: list[list[int]], layers: int, threads: int) -> None:
    """Build one project's contenders, in a process of its own: OpenMP threads of two hinder each other."""
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    reference = make_reference(layers)
    batch = len(prompts)
    _prompts.extend(prompts)
    if project == "ours":
        _contenders.update(our_contenders(reference, batch))
    elif project == "transformers":
        _contenders.update(transformers_contenders(reference))
    elif project.startswith("llama.cpp"):
        _contenders.update(llama_cpp_contenders(reference, threads, project.split()[1]))
    else:
        _contenders.update(ctranslate2_contenders(reference, threads))


def _names() -> list[str]:
    return list(_contenders)


def _turn(name: str, n_new: int) -> tuple[float, list[list[int]]]:
    """Seconds, and the text."""
    _contenders[name](_prompts, WARM_UP)  # what was not used for a while may have left the caches
    begin = time.perf_counter()
    text = _contenders[name](_prompts, n_new)
    return time.perf_counter() - begin, text


def make_reference(layers: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()


def measure(batch: int, watch: Watch, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A line each contender; case -> ratios and share of ours."""
    reference = make_reference(options.layers)
    generator = torch.Generator().manual_seed(batch)
    shape = batch, options.prompt
    prompts = torch.randint(reference.config.vocab_size, shape, generator=generator).tolist()
    projects = ["transformers", "ours"]
    if importlib.util.find_spec("ctranslate2") is not None:
        projects.insert(1, "CTranslate2")
    if importlib.util.find_spec("llama_cpp") is not None and batch == 1:
        projects[1:1] = ["llama.cpp float32", "llama.cpp q8_0"]  # apart, since a build's kernel may die
    with ExitStack() as stack:
        contenders: dict[str, ProcessPoolExecutor] = {}
        for project in projects:
            process = ProcessPoolExecutor(
                max_workers=1,
                mp_context=get_context("spawn"),
                initializer=_begin,
                initargs=(project, prompts, options.layers, options.threads),
            )
            stack.enter_context(process)
            contenders |= {name: process for name in process.submit(_names).result()}
        medians, rate = _rounds(contenders, batch, watch, options)
    if options.nanogpt is not None:
        medians["nanoGPT float32"] = nanogpt_seconds(options.nanogpt, reference, prompts, options.new)
    for name, median in sorted(medians.items(), key=lambda item: -item[1]):
        per_second, step = batch * options.new / median, 1e3 * median / options.new
        print(f"batch {batch} {name:22} {per_second:7.1f} tokens/s  {step:6.1f} ms a step")
    if not watch.was_quiet:
        return {}
    return {f"{kind} batch {batch}": _case(kind, medians, reference, rate, options.new) for kind in OURS}


def _rounds(
    contenders: dict[str, ProcessPoolExecutor], batch: int, watch: Watch, options: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Median seconds, and the median rate of reading."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    texts = {}
    rates = []
    for _ in range(options.rounds):
        watch.look()
        rates.append(read_rate())
        for name in [*seconds]:
            try:
                took, texts[name] = contenders[name].submit(_turn, name, options.new).result()
                seconds[name].append(took)
            except BrokenProcessPool:
                print(f"batch {batch} {name:22} died: left out")
                del seconds[name]
    for name, text in texts.items():
        same = "the" if text == texts["transformers float32"] else "not the"
        print(f"batch {batch} {name:22} writes {same} text of transformers float32")
    rate = statistics.median(rates)
    listed = ", ".join(f"{rate / 1e9:.1f}" for rate in sorted(rates))
    print(f"batch {batch} read rate {rate / 1e9:.1f} GB/s (rounds: {listed})")
    return {name: statistics.median(times) for name, times in seconds.items()}, rate


def _case(
    kind: str, medians: dict[str, float], reference: GPT2LMHeadModel, rate: float, n_new: int
) -> dict[str, float]:
    ours = medians[f"ours {kind}"]
    theirs = {name: median / ours for name, median in medians.items() if name.startswith("transformers")}
    case = {"vs_transformers": theirs["transformers float32"], "vs_its_fastest": min(theirs.values())}
    peer = "CTranslate2 int8" if kind == "int8" else "CTranslate2 float32"
    if peer in medians:
        case["vs_ctranslate2"] = medians[peer] / ours
    peer = "llama.cpp q8_0" if kind == "int8" else "llama.cpp float32"
    if peer in medians:
        case["vs_llama_cpp"] = medians[peer] / ours
    if "nanoGPT float32" in medians:
        case["vs_nanogpt"] = medians["nanoGPT float32"] / ours
    if n_new > 1:  # else the time is the prompt's
        case["share_of_limit"] = weight_bytes(reference, kind) / rate / (ours / n_new)
    return {name: round(value, 2) for name, value in case.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32, help="its tokens")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--layers", type=int, default=12, help="fewer, to try the benchmark itself")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--nanogpt", help="path of a checkout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    describe(options.threads, ["transformers", "ctranslate2"])
    watch = Watch(options.threads)
    cases: dict[str, dict[str, float]] = {}
    for batch in options.batch:
        cases |= measure(batch, watch, options)
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
