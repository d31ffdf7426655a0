"""A CUDA device of tensors without numbers: notes where the host would wait for it, and mixed devices.

Tensors there are PyTorch's fake tensors; those on the host are as ever.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

NEEDS_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
aten = torch.ops.aten


class Event:
    """Stands for torch.cuda's; for which of them the host may wait is of test_step_flags."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class PretendedCuda(TorchDispatchMode):
    """Runs what is on the device there, and notes `waits` and `mixed`, by operation and place of our code."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self.n_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, FakeTensor)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not there and wanted != "cuda":
            return func(*args, **kwargs)
        with self:  # under inference_mode composite operations are not taken apart yet
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self.n_calls += 1
        if func is aten._to_copy.default and wanted not in (None, "cuda" if there else "cpu"):
            self._note_copy(func, kwargs.get("non_blocking"))
            dtype = kwargs.get("dtype") or args[0].dtype
            with self._fake if wanted == "cuda" else nullcontext():
                return torch.zeros(args[0].shape, dtype=dtype, device=wanted)
        if func is aten.copy_.default and len(there) == 1:
            self._note_copy(func, kwargs.get("non_blocking") or len(args) > 2 and args[2])
            return args[0]
        return self._run(func, args, kwargs, tensors)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if any(each.dim() and not isinstance(each, FakeTensor) for each in tensors):
            self.mixed.append(f"{func} in {_place()}")
        is_indexing = "index" in str(func)
        indices = [each for each in tree_leaves(args[1:2]) if is_indexing and isinstance(each, Tensor)]
        by_mask = any(each.dtype == torch.bool for each in indices)
        if by_mask or not is_indexing and NEEDS_NUMBERS & {*func.tags}:
            self.waits.append(f"{func} in {_place()}")
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        kwargs.pop("pin_memory", None)
        with self._fake:
            result = func(*args, **kwargs)

        def of_host(each: FakeTensor) -> Tensor:
            return each if each.fake_device.type == "cuda" else torch.zeros(each.shape, dtype=each.dtype)

        return tree_map_only(FakeTensor, of_host, result)

    def _note_copy(self, func: Any, non_blocking: Any) -> None:
        if not non_blocking:
            self.waits.append(f"{func} in {_place()}")


@contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    device = PretendedCuda()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its tensor here, and copies it then
    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda: True,
        "get_device_name": lambda _: "NVIDIA H100 80GB HBM3",
        "max_memory_allocated": lambda _: 0,
        "synchronize": lambda *_: device.waits.append("synchronize"),
        "Event": Event,
    }
    with patch.multiple(torch.cuda, **answers), device:
        yield device


def _place() -> str:
    """Names the function of this program, or of its tests, that is being called."""
    frame = sys._getframe(2)
    while frame.f_back is not None and not (
        "gpt_lightning" in frame.f_code.co_filename or "test_pretended" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"


class PretendedAccelerator(Accelerator):
    """Has nothing to set up."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cuda", 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretended"


class PretendedStrategy(SingleDeviceStrategy):
    """Leaves the model where it is: fake tensors cannot take the place of others."""

    def __init__(self) -> None:
        super().__init__(device="cuda:0", accelerator=PretendedAccelerator())

    @override
    def model_to_device(self) -> None: ...

    @override
    def teardown(self) -> None: ...
