"""What others run models with runs an exported folder: lm_eval scores it, CTranslate2 writes its tokens."""

import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import load_model
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from tests.huggingface.gpt2_folders import word_tokenizer, write_gpt2
from tests.huggingface.llama_folders import LLAMA, QWEN2, QWEN3, qwen_tokenizer, write_llama

pytestmark = pytest.mark.slow
DOCUMENTS = ["The cat sees a red house.", "A döner.\nOver the river, under it."]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)


SIZES = {"max_position_embeddings": 64, "tie_embeddings": False}
SCALED = {"rope_type": "linear", "factor": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {**LLAMA, **SIZES, "n_kv_heads": 1, "rope_theta": 5e5},
    "llama, scaled": {**LLAMA, **SIZES, "bias": True, "rope_scaling": SCALED},
    "qwen2": {**QWEN2, **SIZES, "n_kv_heads": 1},
    "qwen3": {**QWEN3, **SIZES},
}


def exported(folder: Path, kind: str, tokenizer: TextTokenizer, **sizes: Any) -> tuple[Path, Path]:
    """A checkpoint, and its folder of Hugging Face's."""
    if kind == "gpt2":
        options = {"n_positions": 64, "tie_word_embeddings": False, **sizes}
        write_gpt2(folder / "theirs", tokenizer, **options)
    else:
        write_llama(folder / "theirs", tokenizer, **MODELS[kind], **sizes)
    main(["import-hf", str(folder / "theirs"), str(folder / "x.ckpt")])
    main(["export-hf", str(folder / "x.ckpt"), str(folder / "back")])
    return folder / "x.ckpt", folder / "back"


def write_task(folder: Path) -> None:
    """A task of lm_eval's: the perplexity of these documents."""
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (folder / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = {
        "task": "own_text",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "own.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lm_eval_gives_the_perplexity_of_our_model(kind: str, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.tasks import TaskManager

    checkpoint, folder = exported(tmp_path, kind, load_tokenizer("bytes"))
    write_task(tmp_path / "task")
    scores = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32"},
        tasks=["own_text"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )["results"]["own_text"]
    nll, n_bytes, n_words = 0.0, 0, 0
    model, tokenizer = load_model(checkpoint)
    for text in DOCUMENTS:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll -= sum(float(log_probabilities[place, token]) for place, token in enumerate(ids[1:]))
        n_bytes += len(text.encode())
        n_words += len(text.split())
    assert scores["byte_perplexity,none"] == pytest.approx(math.exp(nll / n_bytes), rel=1e-5)
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(nll / n_words), rel=1e-5)


QUESTIONS: list[dict[str, Any]] = [
    {"question": "The cat sees a", "choices": ["red house.", "house", "green dog"], "answer": 1},
    {"question": "A space ends this: ", "choices": ["yes", "no"], "answer": 0},
    {"question": "A döner.\n\nAnswer:", "choices": ["A", "B", "C", "D"], "answer": 3},
    {"question": "", "choices": ["Nothing comes before.", "从前有一个国王。"], "answer": 1},
    {"question": "从前有一个国王，" * 9, "choices": ["王", "国王后面还有很多别的字"], "answer": 0},
    {"question": "Over the river. " * 20 + "Then \n", "choices": [" two", "under it, "], "answer": 0},
]


def write_questions(folder: Path) -> Path:
    """The questions as a file of ours, and as a task of lm_eval's over that file, beside the documents'."""
    write_task(folder)
    with (folder / "own.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"text": "Longer than a window. " * 9}))
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    files = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
    task = {
        "task": "own_questions",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "questions.yaml").write_text(yaml.safe_dump(task))
    return path


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind, words", [("gpt2", False), ("llama", False), ("gpt2", True)])
def test_evaluate_gives_each_item_the_scores_of_lm_eval(kind: str, words: bool, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.tasks import TaskManager

    tokenizer = train_bpe([row["question"] for row in QUESTIONS], 330) if words else load_tokenizer("bytes")
    checkpoint, folder = exported(tmp_path, kind, tokenizer)
    questions = write_questions(tmp_path / "task")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32"},
        tasks=["own_questions", "own_text"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )
    tasks = (str(questions.with_name(name)) for name in ("mine.jsonl", "questions.yaml", "own.yaml"))
    output = tmp_path / "items.jsonl"
    words_of_verb = ["evaluate", "--ckpt_path", str(checkpoint), "--output", str(output), "--device", "cpu"]
    main([*words_of_verb, "--tasks", ",".join(tasks), "--batch_tokens", "150"])
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    samples = theirs["samples"]["own_questions"]
    n = len(samples)
    assert n == len(QUESTIONS) and len(rows) == 2 * n + len(DOCUMENTS) + 1
    for of_file, of_task, sample in zip(rows, rows[n:], samples):
        expected = [log_probability for log_probability, _ in sample["filtered_resps"]]
        for row in (of_file, of_task):
            assert row["log_probabilities"] == pytest.approx(expected, abs=1e-4)
            assert (row["acc"], row["acc_norm"]) == (sample["acc"], sample["acc_norm"])
    for row, sample in zip(rows[2 * n :], theirs["samples"]["own_text"]):
        assert row["log_probabilities"] == pytest.approx(sample["filtered_resps"], abs=1e-4)
    assert 0 < sum(row["acc_norm"] for row in rows[:n]) < n


@pytest.mark.usefixtures("offline")
def test_a_run_with_tasks_of_lm_eval_is_the_run_without(tiny_config: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = write_questions(tmp_path / "task")
    short = [row for row in QUESTIONS if max(map(len, row["choices"])) < 8]
    questions.write_text("\n".join(map(json.dumps, short)), encoding="utf-8")
    # Lines of other questions stand before each, drawn at random.
    task = yaml.safe_load((tmp_path / "task" / "questions.yaml").read_text())
    task |= {"num_fewshot": 1, "fewshot_split": "test"}
    (tmp_path / "task" / "questions.yaml").write_text(yaml.safe_dump(task))
    sizes = {"max_position_embeddings": 16, "n_layers": 2, "n_heads": 2, "d_model": 16, "dropout": 0.2}
    config = tiny_config(model={"config": sizes}, data={"tokenizer": "bytes"})
    tasks = f"{tmp_path}/task/questions.yaml,{tmp_path}/task/own.yaml"
    main(["fit", "--config", str(config), "--run_name", "plain"])
    main(["fit", "--config", str(config), "--run_name", "asked", "--evaluate.tasks", tasks])
    plain, asked = (
        torch.load(tmp_path / "checkpoints" / name / "last.ckpt", weights_only=True)
        for name in ("plain", "asked")
    )
    for name, tensor in plain["state_dict"].items():
        assert torch.equal(asked["state_dict"][name], tensor)
    assert torch.equal(*(run["resume"]["random_states"][0]["torch"] for run in (plain, asked)))
    events = EventAccumulator(str(tmp_path / "checkpoints" / "asked" / "logs"))
    events.Reload()
    for name in ("own_questions/acc", "own_questions/acc_norm", "own_text/byte_perplexity"):
        assert [event.step for event in events.Scalars(f"eval/{name}")] == [3, 6]


def test_tasks_of_lm_eval_need_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "--tasks", "hellaswag"])
    assert exit.value.code == 2
    assert "pip install 'gpt_lightning[ecosystem]'" in capsys.readouterr().err


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_ctranslate2_writes_the_same_greedy_tokens(kind: str, padded: bool, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"vocab_size": 128} if padded else {}
    if padded and kind == "gpt2":
        options |= {"scale": 0.8, "n_embd": 24}
    make_tokenizer = qwen_tokenizer if kind == "qwen2" else word_tokenizer
    tokenizer = make_tokenizer(101) if padded else load_tokenizer("bytes")
    checkpoint, folder = exported(tmp_path, kind, tokenizer, **options)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    theirs = AutoTokenizer.from_pretrained(folder)
    prompt = theirs("w1 w2")["input_ids"]
    (result,) = generator.generate_batch(
        [theirs.convert_ids_to_tokens(prompt)],
        max_length=40,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    model, tokenizer = load_model(checkpoint)
    settings = GenerationConfig(max_new_tokens=40, do_sample=False)
    (ours,) = generate(model, [prompt], settings, eos_token_id=tokenizer.eos_token_id)
    assert result.sequences_ids[0] == ours.token_ids
    assert len(ours.token_ids) == 40 and len(set(ours.token_ids)) >= 3
