from lightning.pytorch.callbacks import Callback, LambdaCallback

from gpt_lightning.callbacks.absent_hooks import EVERY_BATCH, leave_out_absent_hooks
from gpt_lightning.callbacks.finite_guard import FiniteGuard


def test_hooks_that_a_callback_has_are_kept_however_it_has_them() -> None:
    def hook(*args: object) -> None: ...

    of_class, of_instance, empty = FiniteGuard(), LambdaCallback(on_train_batch_end=hook), Callback()
    leave_out_absent_hooks([of_class, of_instance, empty])
    assert callable(of_class.on_before_optimizer_step) and of_class.on_after_backward is None
    assert of_instance.on_train_batch_end is hook and of_instance.on_train_batch_start is None
    assert all(getattr(empty, name) is None for name in EVERY_BATCH)
