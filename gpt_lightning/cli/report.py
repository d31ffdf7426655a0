"""Runs `report`, which writes a page on one run or on several."""

import difflib
from pathlib import Path

from gpt_lightning.callbacks.terminal import printable
from gpt_lightning.checkpoint.atomic import naming
from gpt_lightning.checkpoint.runs import checkpoints_folder
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.parser import PlainParser, option_line
from gpt_lightning.exit_codes import UserError
from gpt_lightning.report.events import EVENTS
from gpt_lightning.report.page import REPORT_NAME, write_pictures, write_report
from gpt_lightning.report.tables import as_text, comparison


def run_report(words: list[str]) -> None:
    options = _parser().parse_args(words)
    root = checkpoints_folder(options.default_root_dir)
    folders = [_folder_of(run, root) for run in options.runs] or [_newest(root)]
    beside = folders[0] if len(folders) == 1 else root
    output = Path(options.output) if options.output else beside / REPORT_NAME
    with naming(f"output={output}", "give another --output"):
        runs = write_report(folders, output)
    if len(runs) > 1:
        print(printable(as_text(comparison(runs))), flush=True)
    say(f"report: {output}")
    if options.png is not None:
        with naming(f"png={options.png}"):
            pictures = write_pictures(runs, Path(options.png))
        for path in pictures:
            say(f"picture: {path}")


def _parser() -> PlainParser:
    runs = option_line("RUN", "Names under checkpoints/, or folders; the newest run by default.")
    parser = PlainParser(prog="gpt-lightning report", description=f"{VERBS['report']}\n\n{runs}")
    parser.arguments = "[RUN ...] [--option value ...]"
    parser.add_argument("runs", type=str, nargs="*")
    help = f"The page; {REPORT_NAME} in the run's folder by default, of several runs in checkpoints/."
    parser.add_argument("--output", type=str, help=help)
    parser.add_argument("--png", type=str, help="A folder to write each chart into, as a picture for slides.")
    parser.add_argument("--default_root_dir", type=str, help="Where checkpoints/ is looked for.")
    return parser


def _folder_of(run: str, root: Path) -> Path:
    """Returns the folder of a run that is named by its folder's name under checkpoints/, or by its path."""
    named = root / run
    if named.is_dir():
        return named
    if Path(run).exists():
        return Path(run)
    runs = [each.name for each in root.glob("*") if each.is_dir()]
    for close in difflib.get_close_matches(run, runs, n=1):
        raise UserError(f"RUN={run} is no run in {root}; did you mean {close}?")
    return named


def _newest(root: Path) -> Path:
    """Returns the folder of the run that logged last."""
    events = [path for path in root.glob(f"*/**/{EVENTS}")]
    if not events:
        raise UserError(f"{root} holds no run that logged; run `gpt-lightning fit` first, or name a folder")
    newest = max(events, key=lambda path: path.stat().st_mtime_ns)
    return root / newest.relative_to(root).parts[0]
