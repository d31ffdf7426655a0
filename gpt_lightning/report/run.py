"""Reads what a run has left in its folder: TensorBoard's events, and its configuration."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gpt_lightning.checkpoint.files import NOT_UTF8
from gpt_lightning.exit_codes import UserError
from gpt_lightning.report.events import EVENTS, Events, Point, Text
from gpt_lightning.training.notes import FACTS, HELD_OUT, OLD_NAMES, SAMPLES, part_of
from gpt_lightning.training.scored_text import ShownToken, from_plain

CONFIG_NAME, LAST = "config.yaml", "last.ckpt"


class Sample(NamedTuple):
    """Holds a text that the model wrote, and what it was given to continue, where that is known."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Run:
    """Holds the curves and texts of a run by their tags, and its options by their whole names."""

    name: str
    folder: Path
    curves: dict[str, list[Point]]
    texts: dict[str, list[Text]]
    options: dict[str, Any]

    def last(self, tag: str) -> float | None:
        points = self.curves.get(tag)
        return points[-1].value if points else None

    def lowest(self, tag: str) -> Point | None:
        return min(self.curves.get(tag, ()), key=lambda point: point.value, default=None)

    def share(self, split: str, step: int) -> float | None:
        """Returns the part of a split that was scored at a step, None where it was all of it."""
        points = self.curves.get(f"{split}/share", ())
        return next((point.value for point in points if point.step == step and point.value < 1), None)

    @property
    def n_steps(self) -> int:
        return max((points[-1].step for points in self.curves.values()), default=0)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Is what the run has noted of itself; nothing for one of an earlier version."""
        found = self._noted(FACTS)
        return found if isinstance(found, dict) else {}

    @cached_property
    def held_out(self) -> list[ShownToken]:
        """Lists the tokens of some held-out text as the model found them at the end; maybe none."""
        return from_plain(self._noted(HELD_OUT))

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Counts them by part, in the last checkpoint where the run has not noted it."""
        noted = self.facts.get("parameters")
        return noted if isinstance(noted, dict) else _counted(self.folder / LAST)

    def _noted(self, tag: str) -> Any:
        texts = self.texts.get(tag) or self.texts.get(OLD_NAMES[tag])
        try:
            return json.loads(texts[-1].text) if texts else None
        except (ValueError, RecursionError):
            return None

    @cached_property
    def samples(self) -> dict[int, list[Sample]]:
        """Lists the texts that were written at each step, the latest step first."""
        noted = self.facts.get("prompts")
        prompts = dict(enumerate(map(str, noted if isinstance(noted, list) else ())))
        found: defaultdict[int, list[Sample]] = defaultdict(list)
        tags = [tag for tag in self.texts if tag.startswith(SAMPLES)]
        for number, tag in enumerate(sorted(tags, key=lambda tag: (len(tag), tag))):  # 2 before 10
            prompt = prompts.get(number, "")
            for step, text in self.texts[tag]:
                given = prompt if text.startswith(prompt) else ""
                found[step].append(Sample(given, text[len(given) :]))
        return {step: found[step] for step in sorted(found, reverse=True)}


def read_runs(folders: list[Path]) -> list[Run]:
    """Reads the runs, each under a name that no other has."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names)
    ]


def read_run(folder: Path, name: str) -> Run:
    events = Events()
    for place in _places(folder):
        for path in sorted(place.glob(EVENTS)):
            events.read(path)
    return Run(name, folder, events.curves(), events.texts(), _read_options(folder / CONFIG_NAME))


def _counted(checkpoint: Path) -> dict[str, Any]:
    """Counts the parameters that a checkpoint holds in one file, by part; of any other, none."""
    import torch  # slow to import, and noted runs need none of this

    from gpt_lightning.checkpoint.contents import load_plain

    parts: Counter[str] = Counter()
    try:
        weights = load_plain(checkpoint)["state_dict"]
        # A tied head lies where the token table lies.
        tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(weights.items())}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}
    for name, tensor in reversed(tensors.values()):
        if isinstance(tensor, torch.Tensor):
            parts[part_of(str(name).removeprefix("model."))] += tensor.numel()
    return dict(parts)


def _places(folder: Path) -> list[Path]:
    """Finds the folders with events of one run; refuses a folder of several."""
    if not folder.is_dir():
        raise UserError(f"RUN={folder} is no folder; name a run under checkpoints/, or its folder")
    places = sorted({path.parent for path in folder.rglob(EVENTS)})
    if not places:
        remedy = "name the folder of a run that logged"
        if (folder / CONFIG_NAME).is_file():  # another logger wrote, and maybe elsewhere
            remedy = "train without --trainer.logger, or with TensorBoardLogger into that folder"
        raise UserError(f"RUN={folder} holds no events of TensorBoard, of which a report is made; {remedy}")
    if len(places) > 1 and not (folder / CONFIG_NAME).is_file():
        names = ", ".join(str(place.relative_to(folder)) for place in places[:3])
        raise UserError(f"RUN={folder} holds several runs ({names}, ...); name one or more of them")
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # as TensorBoard would say
        raise UserError(f"RUN={folder} {NOT_UTF8}") from None
    return places


def _read_options(path: Path) -> dict[str, Any]:
    """Reads a configuration into one level: `model.config.n_layers`; of one that cannot be read, nothing."""
    try:
        text = path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            return {}  # what it stands for could be repeated without end
        return dict(flat(yaml.load(text, Loader=loader)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}


def flat(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields options by their whole names, as on the command line."""
    for name, value in options.items() if isinstance(options, dict) else ():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
