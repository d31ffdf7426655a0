"""Kernels chosen by measuring: kept for the machine, measured anew where none is kept, or pinned."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt_lightning.kernels import choose as choosing
from gpt_lightning.kernels.choose import INT8, PIN, Shape, choose, fastest, kernels_of, measure

FIRST, *_, LAST = kernels_of("float32")
SHAPE = Shape(n_outputs=24, n_inputs=16, has_bias=True, n_rows=2, dtype="float32")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of what is kept, with nothing in it and no kernel pinned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(PIN)
    yield tmp_path / "gpt_lightning"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes that were measured; the last kernel is the fastest, but for a shape of many outputs."""
    shapes: list[Shape] = []

    def record(shape: Shape) -> dict[str, float]:
        shapes.append(shape)
        names = [name for name in kernels_of(shape.dtype) if name != "plain"]
        steps = range(len(names)) if shape.n_outputs > 99 else range(len(names), 0, -1)
        return {name: 1.0 + 3.0 * step for name, step in zip(names, steps)}

    monkeypatch.setattr(choosing, "measure", record)
    return shapes


def test_a_shape_is_measured_once_for_a_machine(kept: Path, measured: list[Shape]) -> None:
    other = SHAPE._replace(n_rows=1)
    assert choose([SHAPE, SHAPE]) == choose([SHAPE, other]) == LAST
    assert measured == [SHAPE, other]
    (path,) = kept.iterdir()
    assert json.loads(path.read_text()).keys() == {str(SHAPE), str(other)}
    version = "".join(filter(str.isalnum, torch.__version__))
    assert version in "".join(filter(str.isalnum, path.name))


def test_a_model_takes_one_kernel_by_the_sum_over_its_layers(kept: Path, measured: list[Shape]) -> None:
    tall = SHAPE._replace(n_outputs=100)
    assert choose([tall]) == FIRST and choose([SHAPE]) == LAST
    assert choose([tall, tall, SHAPE]) == FIRST and choose([tall, SHAPE, SHAPE]) == LAST


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{", '"x"', "null", "[" * 10**5, '{"a": 1}', '{"%s": {"linear": 1}}', '{"%s": "x"}'],
)
def test_a_damaged_file_is_measured_anew(kept: Path, measured: list[Shape], content: str) -> None:
    choose([SHAPE])
    (path,) = kept.iterdir()
    path.write_text(content.replace("%s", str(SHAPE)))
    assert choose([SHAPE]) == LAST and measured == [SHAPE, SHAPE]
    assert json.loads(path.read_text())[str(SHAPE)].keys() == kernels_of("float32").keys()


def test_a_folder_that_cannot_be_written_costs_a_measurement(kept: Path, measured: list[Shape]) -> None:
    kept.write_text("a file in the folder's place")
    assert choose([SHAPE]) == choose([SHAPE]) and measured == [SHAPE, SHAPE]


def test_a_user_without_a_home_generates_too(
    kept: Path, measured: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    assert choose([SHAPE]) == LAST and not kept.exists()


def test_a_pinned_kernel_is_taken_where_the_dtype_has_it(
    kept: Path, measured: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIN, "one_row,linear,plain")
    names = [choose([SHAPE._replace(dtype=dtype)]) for dtype in ("float32", "bfloat16", INT8)]
    assert names == ["linear", "one_row", "plain"]
    assert not measured and not kept.exists()


def test_the_only_kernel_is_not_measured(
    kept: Path, measured: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As int8 has it on Arm."""
    monkeypatch.setattr(choosing, "kernels_of", lambda dtype: dict.fromkeys(["plain", "quantized"]))
    assert choose([SHAPE._replace(dtype=INT8)]) == "quantized"
    assert not measured and not kept.exists()


def test_an_unknown_pinned_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIN, "linear,fast")
    with pytest.raises(ValueError, match="GPT_LIGHTNING_KERNELS=linear,fast: no kernel is called fast; name"):
        choose([SHAPE])


def test_a_plainer_kernel_is_left_only_for_a_gain() -> None:
    assert fastest([{"linear": 1.01, "packed": 1.0}]) == "linear"
    assert fastest([{"linear": 1.2, "one_row": 1.02, "packed": 1.0}]) == "one_row"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", INT8])
def test_every_kernel_of_the_machine_is_measured(dtype: str) -> None:
    """But for the products of integers that only fill a gap."""
    seconds = measure(SHAPE._replace(dtype=dtype))
    assert seconds.keys() == kernels_of(dtype).keys() - {"plain"}
    assert all(0 < value < 1 for value in seconds.values())
