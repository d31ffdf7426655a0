"""A module imports only what stands above it in this list, and the four islands do not know each other."""

import ast
from pathlib import Path

import pytest

import gpt_lightning

PACKAGE = Path(gpt_lightning.__file__).parent
ORDER = [
    "exit_codes",
    "ranks",
    "rank_peers",
    "rank_watch",
    "device",
    "device_peak",
    "config",
    "cpu_linear",
    "attention",
    "kv_cache",
    "linear_cross_entropy",
    "document_mask",
    "uninitialized",
    "model",
    "freed_memory",
    "checkpoint_file",
    "snapshot",
    "background_writer",
    "parallel.mesh",
    "parallel.shard",
    "parallel.collectives",
    "parallel.column_linear",
    "parallel.dropout",
    "parallel.layers",
    "parallel.plan",
    "parallel.state_dict",
    "parallel.sharded_reader",
    "parallel.sharded_folder",
    "parallel.sharded_checkpoint",
    "gradients",
    "parallel.precision",
    "parallel.replicas",
    "parallel.strategy",
    "data.python_docs",
    "data.documents",
    "data.split",
    "data.incremental",
    "data.fast_bpe",
    "data.tokenizer",
    "data.encoding",
    "data.built_folder",
    "data.token_cache",
    "data.same_text",
    "data.windows",
    "data.batches",
    "data.prompts",
    "data.training_order",
    "data.datamodule",
    "generation.sampling",
    "generation.history",
    "generation.interface",
    "generation.prefill",
    "generation.engine",
    "generation.decoder",
    "generation.packing",
    "text_stream",
    "checkpoint_contents",
    "training.compilation",
    "training.completion_callback",
    "training.prediction_rows",
    "training.metrics",
    "training.optim",
    "training.flops",
    "training.step_metrics",
    "training.module",
    "checkpoint",
    "checkpoint_io",
    "huggingface",
    "huggingface_import",
    "model_card",
    "huggingface_export",
    "callbacks.rank_guard",
    "callbacks.saves",
    "callbacks.absent_hooks",
    "callbacks.run_checkpoint",
    "callbacks.exact_resume",
    "callbacks.finite_guard",
    "callbacks.initial_weights",
    "callbacks.orderly_stop",
    "callbacks.run_config",
    "callbacks.throughput",
    "callbacks.text_samples",
    "prediction_journal",
    "callbacks.prediction_writer",
    "callbacks.progress",
    "run_folder",
    "run_logger",
    "cli_start",
    "cli_verbs",
    "cli_noise",
    "cli_imports",
    "cli_manners",
    "conversation",
    "text_writer",
    "cli_generate",
    "cli_checks",
    "cli_after_fit",
    "cli_consolidate",
    "cli_huggingface",
    "cli_without_trainer",
    "cli_tensor_parallel",
    "cli_origin",
    "cli_parser",
    "cli_endings",
    "cli_words",
    "cli",
    "__main__",
]
MODEL = {
    "config",
    "attention",
    "cpu_linear",
    "kv_cache",
    "document_mask",
    "linear_cross_entropy",
    "uninitialized",
    "model",
}
FILES = {"checkpoint_file", "snapshot"}
ALLOWED_ACROSS = {
    "generation": MODEL,
    "data": set(),
    "parallel": {"gradients", "linear_cross_entropy", *FILES},
}


def modules() -> list[str]:
    names = []
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            names.append(name)
    return sorted(names)


def imports_of(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    prefix = "gpt_lightning."
    return {module.removeprefix(prefix) for module in found if module.startswith(prefix)}


def test_every_module_has_its_place() -> None:
    assert modules() == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert imports_of(name) <= above


@pytest.mark.parametrize("island", ALLOWED_ACROSS)
def test_islands_do_not_know_each_other(island: str) -> None:
    for name in ORDER:
        if name.startswith(island + "."):
            across = {other for other in imports_of(name) if not other.startswith(island + ".")}
            assert across <= ALLOWED_ACROSS[island]


def test_subpackages_hold_a_docstring_only() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), path


def test_no_public_name_is_missing() -> None:
    for name in gpt_lightning.__all__:
        assert getattr(gpt_lightning, name).__name__ == name
