"""Puts a plan into words: a table for people, and the same numbers as plain data for programs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gpt_lightning.kernels.device import GIB
from gpt_lightning.planning.advice import USABLE, Change
from gpt_lightning.planning.devices import Device
from gpt_lightning.planning.memory import Memory, moment_bytes
from gpt_lightning.planning.parameters import count_parameters
from gpt_lightning.planning.setup import Setup
from gpt_lightning.planning.speed import Speed, speed_of

HOUR = 3600
_MOST_SHOWN = 5  # remedies


@dataclass(frozen=True)
class Plan:
    """Holds a setup and all that follows from it; `steps` is None where a run ends by epochs or time."""

    setup: Setup
    device: Device
    memory: Memory
    speed: Speed
    is_measured: bool  # the speed, on this machine
    steps: int | None
    checkpoints: int  # that the run keeps
    price: float | None  # of a device and hour
    not_counted: list[str]  # of what the setup does not tell
    remedies: list[Change]
    proposal: Change | None

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.device.memory

    @property
    def n_parameters(self) -> int:
        return count_parameters(self.setup.config).total

    @property
    def tokens(self) -> int:
        """Counts those of the run, or a billion where its steps are not known."""
        return 10**9 if self.steps is None else self.steps * self.setup.step_tokens

    @property
    def hours(self) -> float:
        return self.tokens / self.speed.tokens_per_second / HOUR

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.hours * self.setup.world_size

    @property
    def checkpoint_bytes(self) -> int:
        """Counts weights and moments of the whole model, which a checkpoint holds."""
        counts = count_parameters(self.setup.config)
        return counts.total * self.setup.weight_bytes + moment_bytes(self.setup, counts)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns plain data; bytes, seconds and tokens, of a device and of an optimizer step."""
    traffic = plan.speed.traffic._asdict()
    return {
        "parameters": plan.n_parameters,
        "setup": asdict(plan.setup),
        "device": {"name": plan.device.name, "memory": plan.device.memory},
        "memory": plan.memory.as_dict(),
        "fits": plan.fits,
        "seconds_a_step": plan.speed.step,
        "tokens_a_step": plan.speed.tokens,
        "tokens_per_second": plan.speed.tokens_per_second,
        "measured": plan.is_measured,
        "bytes_sent_a_step": traffic,
        "message_seconds_a_step": plan.speed.messages,
        "exposed_seconds_a_step": plan.speed.exposed,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "hours": plan.hours,
        "cost": plan.cost,
        "tokens_per_parameter": plan.tokens / plan.n_parameters if plan.steps else None,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints": plan.checkpoints,
        "not_counted": plan.not_counted,
        "remedies": [_change_as_dict(change, plan) for change in plan.remedies],
        "proposal": None if plan.proposal is None else _change_as_dict(plan.proposal, plan),
    }


def _change_as_dict(change: Change, plan: Plan) -> dict[str, Any]:
    options = change.options(plan.setup)
    return {"options": options, "peak": change.peak, "seconds_a_step": change.step_seconds}


def as_text(plan: Plan) -> str:
    """Writes a table of names and figures, with a paragraph for each question that a plan answers."""
    paragraphs = (_what(plan), _memory(plan), _time(plan), _run(plan), _advice(plan))
    return "\n\n".join("\n".join(_aligned([*paragraph])) for paragraph in paragraphs)


def _aligned(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = 24
    yield from (f"{name:{width}}{text}".rstrip() for name, text in rows)


def _what(plan: Plan) -> Iterator[tuple[str, str]]:
    setup, config = plan.setup, plan.setup.config
    shape = f"{config.n_layers} layers of {config.d_model}, vocabulary {config.vocab_size:,}"
    yield "model", f"{plan.n_parameters:,} parameters: {shape}"
    nodes = f"{setup.nodes} node{'s' if setup.nodes > 1 else ''} of " if setup.nodes > 1 else ""
    yield "devices", f"{nodes}{setup.devices} x {plan.device.name}, precision {setup.precision}"
    ways = [f"tensor parallel {setup.tensor_parallel_size} x data parallel {setup.replicas}"]
    if setup.cuts_sequence:
        ways.append("sequence parallel")
    if setup.sharding != "none":
        rounded = ", gathered in bf16" if setup.gathers_rounded else ""
        ways.append(f"replicas share {'all' if setup.sharding == 'full' else 'the optimizer'}{rounded}")
    if setup.activation_checkpointing:
        ways.append("activation checkpointing")
    yield "arrangement", ", ".join(ways)
    yield "a step", (
        f"{setup.step_tokens:,} tokens: {setup.replicas} x {setup.batch_size} sequences of "
        f"{setup.seq_len:,}, {setup.accumulation} time{'s' if setup.accumulation > 1 else ''}"
    )


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    yield "memory of a device", "GiB"
    for name, n_bytes in memory.as_dict().items():
        if name != "peak" and n_bytes:
            yield f"  {NAMES[name]}", gib(n_bytes)
    fits = "fits" if plan.fits else "DOES NOT FIT"
    yield "  most at a time", f"{gib(memory.peak)}  of {gib(plan.device.memory)}: {fits}"


NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "optimizer's moments",
    "gathered": "gathered weights",
    "activations": "activations",
    "narrow_weights": "rounded weights",
    "logits": "logits and loss",
    "program": "program, libraries",
}


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    speed = plan.speed
    assumed = f"at {plan.device.utilization:.0%} of the peak arithmetic"
    source = "measured here" if plan.is_measured else assumed
    yield "time of a step", f"{speed.step:.3g} s ({source})"
    yield "tokens a second", f"{speed.tokens_per_second:,.0f}"
    if plan.setup.world_size > 1:
        names = {"peers": "tensor parallel", "nodes": "gradients to other nodes"}
        traffic = speed.traffic._asdict().items()
        sent = [f"{names.get(name, name)} {figure(n / 10**9)} GB" for name, n in traffic if n]
        yield "sent by a device", f"{', '.join(sent)} a step"
        yield "messages", (
            f"{speed.messages:.3g} s a step, of which {speed.exposed:.3g} s ({speed.exposed_share:.0%} "
            "of the step) nothing hides"
        )


def _run(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.steps is None:
        yield "a billion tokens", duration(plan.hours)
    else:
        yield "the run", f"{plan.steps:,} steps, {plan.tokens:,} tokens, {duration(plan.hours)}"
        ratio = plan.tokens / plan.n_parameters
        yield "tokens a parameter", f"{figure(ratio)} (about 20 are the best use of a given arithmetic)"
    if plan.cost is not None:
        yield "price", f"{plan.cost:,.2f} at {plan.price:g} a device and hour"
    n, size = plan.checkpoints, plan.checkpoint_bytes / 10**9
    yield "checkpoints", f"{n} of {figure(size)} GB: {figure(n * size)} GB of disk"
    yield from (("not counted", text) for text in plan.not_counted)


def _advice(plan: Plan) -> Iterator[tuple[str, str]]:
    if not plan.fits:
        yield "would make it fit", "" if plan.remedies else "no single option; see the proposal"
        for change in plan.remedies[:_MOST_SHOWN]:
            yield "", _described(change, plan)
    if plan.proposal is None:
        yield "proposal", "none: it fits in no arrangement of these devices; take more or larger ones"
    elif plan.proposal.setup != plan.setup:
        yield "proposal", _described(plan.proposal, plan)
    else:
        yield "proposal", "as it is"


def _described(change: Change, plan: Plan) -> str:
    # Both by the device's rates: what was measured is of this setup alone.
    pace = change.step_seconds / speed_of(plan.setup, plan.device).step
    return f"{' '.join(change.options(plan.setup))}: {gib(change.peak)} GiB, {pace:.2f} x the time"


def gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.{2 if n_bytes >= GIB else 4}f}"


def duration(hours: float) -> str:
    """Writes hours, or what makes the number a readable one."""
    if hours >= 2:
        return f"{figure(hours)} hours"
    minutes = 60 * hours
    return f"{figure(minutes)} minutes" if minutes >= 2 else f"{figure(60 * minutes)} seconds"


def figure(value: float) -> str:
    """Writes three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
