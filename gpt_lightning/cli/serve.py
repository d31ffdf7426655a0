"""Runs `serve`, which answers over HTTP with one checkpoint, or with two to compare."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gpt_lightning.cli.errors import say
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.model_options import add_model_options, choose_device, open_model
from gpt_lightning.cli.parser import PlainParser
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.choose import pinned
from gpt_lightning.kernels.packed_linear import packed, steady_kernel
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.metrics import Metrics

_MOST_MODELS = 2


def run_serve(words: list[str]) -> None:
    options = _parser().parse_args(words)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serve needs starlette and uvicorn; pip install 'gpt_lightning[serve]'") from None
    from gpt_lightning.server.app import make_app
    from gpt_lightning.server.security import make_access
    from gpt_lightning.server.serving import open_socket, serve

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("serve runs in one process, without tensor parallelism; start it without torchrun")
    if options.rows < 1:
        raise UserError(f"rows={options.rows} is below 1; choose a positive number, e.g. 32")
    if options.prefill_tokens is not None and options.prefill_tokens < 1:
        raise UserError(f"prefill_tokens={options.prefill_tokens} is below 1; choose e.g. 256, or null")
    limits = Limits(**options.limits.as_dict())
    access = make_access(
        options.host,
        api_key_file=options.api_key_file,
        no_auth=options.no_auth,
        origins=options.cors_origin or (),
        hosts=options.allowed_host or (),
    )
    opened = open_socket(options.host, options.port)
    metrics = Metrics()
    models = _open_models(options, limits, metrics)
    app = make_app(models, limits, metrics, access)
    host, port = opened.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(model.name for model in models)
    sys.exit(serve(app, opened, limits, lambda: say(f"serving {names} at http://{shown}:{port}")))


def _parser() -> PlainParser:
    parser = PlainParser(prog="gpt-lightning serve", description=VERBS["serve"])
    add_model_options(parser, several=True)
    help = "The name that clients know the model by; that of its run by default. Once for each checkpoint."
    parser.add_argument("--name", type=str, action="append", help=help)
    help = "The address to listen at; any but the loopback asks for a key."
    parser.add_argument("--host", type=str, default="127.0.0.1", help=help)
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free.")
    help = "Completions that are generated together; others wait."
    parser.add_argument("--rows", type=int, default=32, help=help)
    help = "Tokens of prompts that a step reads at most beside texts that are being written; null for any."
    parser.add_argument("--prefill_tokens", type=int | None, default=256, help=help)
    help = "A file with a key a line, one of which clients must send."
    parser.add_argument("--api_key_file", type=str, help=help)
    help = "Let everyone in who reaches the address."
    parser.add_argument("--no_auth", type=bool, default=False, help=help)
    help = "A page elsewhere whose script may ask, as https://example.org; several times for several."
    parser.add_argument("--cors_origin", type=str, action="append", help=help)
    help = "A further name by which browsers reach the loopback, as behind a proxy."
    parser.add_argument("--allowed_host", type=str, action="append", help=help)
    skipped = {"num_samples", "logprobs", "top_logprobs", "seed"}
    parser.add_class_arguments(GenerationConfig, "generation", skip=skipped)
    help = "Of requests that name none; null draws another for each."
    parser.add_argument("--generation.seed", type=int | None, default=None, help=help)
    parser.add_class_arguments(Limits, "limits")
    return parser


def _open_models(options: Any, limits: Limits, metrics: Metrics) -> list[Any]:
    from gpt_lightning.server.served import served_model

    given = options.ckpt_path or [None]
    if len(given) > _MOST_MODELS:
        raise UserError(f"ckpt_path is given {len(given)} times; name one or two checkpoints")
    chosen = {key: value for key, value in options.generation.as_dict().items() if key != "seed"}
    settings = GenerationConfig(**chosen)
    device = choose_device(options.device)
    opened = [open_model(Namespace({**vars(options), "ckpt_path": path}), device) for path in given]
    names = _names([path for path, *_ in opened], options.name)
    return [
        served_model(
            name,
            packed(
                model,
                quantize=settings.quantize,
                n_rows=options.rows,
                kernel=None if pinned() else steady_kernel(model, quantize=settings.quantize),
            ),
            tokenizer,
            settings,
            seed=options.generation.seed,
            n_rows=options.rows,
            prefill_tokens=options.prefill_tokens,
            limits=limits,
            metrics=metrics,
        )
        for name, (_, model, tokenizer) in zip(names, opened)
    ]


def _names(paths: Sequence[Path], given: Sequence[str] | None) -> list[str]:
    """Calls models after their runs, or by run and file where they are of one."""
    if given is not None:
        if len(given) != len(paths) or len(set(given)) != len(given) or "" in given:
            raise UserError(f"name={', '.join(given)} is not one name for each checkpoint; give {len(paths)}")
        return [*given]
    paths = [path.resolve() for path in paths]
    names = [path.parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"ckpt_path={paths[0]} is given twice; tell the two apart by --name")
    return names
