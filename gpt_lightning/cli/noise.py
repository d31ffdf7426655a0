"""What other packages say and no user needs to hear."""

import logging
import os
import warnings

NOISE = (
    r".*does not have many workers.*",
    r".*exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*torch.distributed is disabled, unavailable or uninitialized.*",
    r".*It is recommended to use .self.log.* when logging on epoch level in distributed setting.*",
)


def quiet() -> None:
    """No adverts, no warnings about what is meant to be so; what the package reports goes to stderr."""
    logging.getLogger("gpt_lightning").setLevel(logging.INFO)
    logging.getLogger("gpt_lightning").handlers = [logging.StreamHandler()]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    adverts = ("💡", "TPU available", "HPU available")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(adverts))
