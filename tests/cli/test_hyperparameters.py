"""The row of a run: what people vary, under short names, and no constants."""

from typing import Any

from jsonargparse import Namespace

from gpt_lightning.cli.hyperparameters import compared_options


def settings(**options: Any) -> Namespace:
    given = Namespace()
    for name, value in options.items():
        given[name.replace("__", ".")] = value
    return given


DEFAULTS = {
    "seed_everything": 42,
    "model__config__vocab_size": 256,
    "model__config__n_layers": 2,
    "model__config__d_model": 128,
    "model__config__n_heads": 4,
    "model__config__dropout": 0.0,
    "model__optimizer__name": "adamw",
    "model__optimizer__learning_rate": 1e-3,
    "model__optimizer__betas": (0.9, 0.95),
    "model__schedule__shape": "cosine",
    "data__seq_len": 64,
    "data__batch_size": 8,
    "data__tokenizer": "bytes",
    "data__train_files": ["/home/me/corpus/novel.txt", "/home/me/corpus/*.txt"],
    "data__cache_dir": "/home/me/.cache",
    "trainer__precision": None,
    "trainer__max_steps": -1,
    "trainer__devices": "auto",
    "trainer__default_root_dir": "/home/me",
}


def test_a_row_has_what_people_vary_under_short_names() -> None:
    assert compared_options(settings(**DEFAULTS), settings(**DEFAULTS), 1000) == {
        "n_layers": 2,
        "d_model": 128,
        "n_heads": 4,
        "seq_len": 64,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "tokenizer": "bytes",
        "train_files": "novel.txt, corpus/*.txt",
        "precision": "32-true",
        "seed": 42,
        "parameters": 1000,
    }


def test_what_has_not_its_usual_value_is_added_whatever_it_is() -> None:
    changed = {
        "model__config__dropout": 0.1,
        "model__optimizer__betas": (0.8, 0.95),
        "trainer__devices": 2,
        "trainer__precision": "bf16-mixed",
        "trainer__max_steps": 500,
        "trainer__strategy": Namespace(class_path="gpt_lightning.TensorParallelDDPStrategy"),
        "data__cache_dir": "/elsewhere",
    }
    usual = compared_options(settings(**DEFAULTS), settings(**DEFAULTS), 1000)
    row = compared_options(settings(**DEFAULTS | changed), settings(**DEFAULTS), 1000)
    assert {name: value for name, value in row.items() if usual.get(name) != value} == {
        "dropout": 0.1,
        "betas": "0.8, 0.95",
        "devices": 2,
        "precision": "bf16-mixed",
        "max_steps": 500,
        "strategy": "TensorParallelDDPStrategy",
    }


def test_the_arguments_of_a_child_class_stand_with_those_of_ours() -> None:
    of_child = {
        "model__class_path": "mine.Model",
        "model__init_args__config__n_layers": 3,
        "model__init_args__config__d_model": 768,  # as where it is left out
        "model__init_args__warmth": 0.5,
        "seed_everything": 42,
    }
    row = compared_options(settings(**of_child), settings(seed_everything=42), 1)
    assert row["n_layers"] == 3 and row["warmth"] == 0.5 and "class_path" not in row
