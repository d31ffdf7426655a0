"""Builds a model without drawing weights for it."""

from typing import Any

from torch.overrides import TorchFunctionMode
from typing_extensions import override


class Uninitialized(TorchFunctionMode):
    """Skips the drawing of weights in a model that is built within it, since others will replace them.

    Even on the meta device, where nothing can be drawn, `nn.init` would import torch.compile: half a second.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
