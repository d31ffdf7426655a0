"""Building a model without drawing weights for it."""

from typing import Any

from torch.overrides import TorchFunctionMode
from typing_extensions import override


class Uninitialized(TorchFunctionMode):
    """Within it a model is built whose weights will be replaced.

    On the meta device, where there are none, the drawing would import half a second of torch.compile.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
