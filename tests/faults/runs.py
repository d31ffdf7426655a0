"""A small real run of the program whose trace is kept, begun and resumed by the same words."""

from pathlib import Path
from typing import Any

import yaml

from tests.conftest import write_corpus
from tests.shapes import by_gpt2s_recipe

MAX_STEPS = 40
WIDTH = {"d_model": 32, "dropout": 0.1}
BATCHES_PER_EPOCH = 17  # of 8 samples


def write_run(folder: Path, name: str, **sections: dict[str, Any]) -> list[str]:
    """Writes `<name>.yaml`; the words that begin the run or go on with it. Its trace is `<name>.<rank>`.

    Steps of 8 samples, two and a half epochs, a validation every 5 steps, a checkpoint every 3.
    """
    corpus, trace = folder / "corpus.jsonl", str(folder / name)
    config: dict[str, dict[str, Any]] = {
        "data": {
            "train_files": [str(corpus if corpus.exists() else write_corpus(corpus))],
            "tokenizer": "bytes",
            "seq_len": 64,
            "batch_size": 8,
            "cache_dir": str(folder / "cache"),
        },
        "model": {
            "config": {"max_position_embeddings": 64, "n_layers": 2, "n_heads": 2, **WIDTH},
            "optimizer": {"learning_rate": 0.003},
            "schedule": {"warmup_steps": 5},
        },
        "samples": {"prompts": []},
        "checkpoint": {"every_n_train_steps": 3, "save_top_k": 2},
        "trainer": {
            "max_steps": MAX_STEPS,
            "val_check_interval": 5,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "accelerator": "cpu",
        },
    }
    for section, options in sections.items():
        config[section] = {**config.get(section, {}), **options}
    config["model"] = by_gpt2s_recipe(config["model"])
    config["trainer"]["callbacks"] = [callback("Trace", path=trace), *config["trainer"].get("callbacks", [])]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(path), "--ckpt_path", "last", "--allow_import", "tests"]


def callback(name: str, /, **init_args: Any) -> dict[str, Any]:
    """One of those in trace.py, for `callbacks`."""
    return {"class_path": f"tests.faults.trace.{name}", "init_args": init_args}


def tensor_parallel(ranks: int) -> dict[str, Any]:
    """Trainer options of pairs of tensor-parallel ranks."""
    class_path = "gpt_lightning.TensorParallelDDPStrategy"
    strategy = {"class_path": class_path, "init_args": {"tensor_parallel_size": 2}}
    return {"strategy": strategy, "devices": ranks}


TOPOLOGIES: dict[str, tuple[int, int, dict[str, Any]]] = {  # ranks, data-parallel ranks, options
    "ddp 2": (2, 2, {"strategy": "ddp", "devices": 2}),
    "tp 2": (2, 1, tensor_parallel(2)),
    "tp 2 x dp 2": (4, 2, tensor_parallel(4)),
}


def newest_last(folder: Path, name: str) -> Path:
    """last.ckpt of the run; one that was killed before its first checkpoint began again in `<name>-2`."""
    found = folder.glob(f"checkpoints/{name}*/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime_ns)
