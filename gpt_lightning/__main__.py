"""`python -m gpt_lightning` and `gpt-lightning`: what can be answered at once is, before the slow imports."""

import difflib
import sys

from gpt_lightning import __version__
from gpt_lightning.cli.start import without_collector
from gpt_lightning.cli.verbs import HELP, VERBS
from gpt_lightning.exit_codes import INTERRUPTED


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {verb:12} {text}" for verb, text in VERBS.items())), end="")
    elif words[0] == "--version":
        print(f"gpt_lightning {__version__}")
    elif words[0] not in VERBS:
        _refuse(words)
    else:
        _run(words)


def _run(words: list[str]) -> None:
    try:
        from gpt_lightning.cli.without_trainer import WITHOUT_TRAINER, run_without_trainer

        if words[0] in WITHOUT_TRAINER:
            run_without_trainer(words[0], words[1:])
        else:
            with without_collector():
                from gpt_lightning.cli.app import run

            run(words)
    except KeyboardInterrupt:  # during the imports
        sys.exit(INTERRUPTED)


def _refuse(words: list[str]) -> None:
    if words[0].startswith("-"):
        reason = f"{words[0]} stands before the verb; write e.g. gpt-lightning fit {' '.join(words[:2])}"
    else:
        reason = f"{words[0]!r} is no verb; choose one of {', '.join(VERBS)}"
        close = difflib.get_close_matches(words[0], VERBS, n=1)
        reason += f"\ndid you mean {close[0]}?" if close else ""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
