"""Reads the chat template that belongs to a tokenizer, and renders conversations by it as transformers does.

A template is a program in jinja's language. It runs in a sandbox, in which it reaches no file and no module.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_lightning.data.tokenizer_folder import NAMED, options_in
from gpt_lightning.exit_codes import UserError

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
# What transformers' renderer is told by these names is no option of a template's.
SAID_OTHERWISE = frozenset(
    "messages conversations chat_template add_generation_prompt continue_final_message tools documents "
    "return_assistant_tokens_mask self".split()
)


def read_chat(folder: Path) -> dict[str, Any]:
    """Returns a folder's template and the special tokens that it may name; nothing where there is none.

    Of several templates that older folders list, it is the one called default.
    """
    config = options_in(folder / _CONFIG)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if (folder / TEMPLATE_FILE).is_file():
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not isinstance(template, str) or not template:
        return {}
    options = {**options_in(folder / "special_tokens_map.json"), **config}
    names = [f"{kind}_token" for kind in NAMED]
    tokens = {name: _content(options[name]) for name in names if options.get(name) is not None}
    return {"template": template, "tokens": tokens}


def check_chat(state: object) -> bool:
    """Tells whether a checkpoint's entry is one that `read_chat` may have made."""
    match state:
        case {"template": str(), "tokens": dict(tokens), **rest}:
            return not rest and {type(each) for pair in tokens.items() for each in pair} <= {str}
    return False


def render_chat(
    chat: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> str:
    """Writes messages as the model was trained on them, up to where its answer begins.

    `options` are names that the template knows beside the messages. Raises UserError with what the template
    says of messages that it does not take.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            [[{**message} for message in messages]],
            chat_template=chat["template"],
            add_generation_prompt=True,
            **{**chat["tokens"], **options},
        )
    except Exception as error:  # a template is a program, and may fail in any way of Python's
        reason = " ".join(str(error).split())[:160].encode(errors="replace").decode()
        raise UserError(f"messages do not fit the model's chat template ({reason}); send others") from None
    return str(rendered[0][0])


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
