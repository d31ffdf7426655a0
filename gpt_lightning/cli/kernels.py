"""Runs `kernels`, which measures how fast this machine multiplies the weights of a model."""

import torch

from gpt_lightning.checkpoint.atomic import naming
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.model_options import add_model_options, open_model
from gpt_lightning.cli.parser import PlainParser
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.choose import choose, keep, measure, pinned
from gpt_lightning.kernels.packed_linear import decoding_shapes

MICROSECOND = 1e-6
MOST_ROWS = 2**16


def run_kernels(words: list[str]) -> None:
    options = _parser().parse_args(words)
    if options.rows < 1:
        raise UserError(f"rows={options.rows} is below 1; give how many texts are written at a time")
    if options.rows > MOST_ROWS:
        raise UserError(f"rows={options.rows} is above {MOST_ROWS}; give how many are written at a time")
    if options.device not in (None, "cpu"):
        raise UserError(f"device={options.device} has one kernel: a CPU has several; leave --device out")
    quantize = GenerationConfig(quantize=options.quantize).quantize
    pinned()  # before anything is measured, which is kept
    _, model, _ = open_model(options, torch.device("cpu"))
    shapes = decoding_shapes(model, quantize=quantize, n_rows=options.rows)
    if not shapes:
        raise UserError(f"precision={options.precision} has one kernel on this machine: nothing to choose")
    measured = {shape: measure(shape) for shape in dict.fromkeys(shapes)}
    with naming("the user's cache folder", "set XDG_CACHE_HOME to another"):
        keep(measured)
    for shape, seconds in measured.items():
        figures = ", ".join(f"{name} {value / MICROSECOND:,.0f} us" for name, value in seconds.items())
        print(f"{shapes.count(shape)} of {shape}: {figures}")
    print(f"generate and predict take: {choose(shapes)}")


def _parser() -> PlainParser:
    parser = PlainParser(prog="gpt-lightning kernels", description=VERBS["kernels"])
    help = "Texts written at a time: data.batch_size of predict."
    parser.add_argument("--rows", type=int, default=1, help=help)
    parser.add_argument("--quantize", type=str, help="int8, as in generation.quantize.")
    add_model_options(parser)
    return parser
