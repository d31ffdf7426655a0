"""Estimates the time of an optimizer step: arithmetic, and messages as far as it does not hide them."""

from dataclasses import dataclass

from gpt_lightning.model.flops import training_flops_per_token
from gpt_lightning.planning.devices import Device
from gpt_lightning.planning.parameters import count_parameters
from gpt_lightning.planning.setup import Setup
from gpt_lightning.planning.traffic import Traffic, traffic_of

BACKWARD = 2 / 3  # of a pass's arithmetic, during which gradients can travel
LINK_EFFICIENCY = 0.8  # of what links are sold as


@dataclass(frozen=True)
class Speed:
    """Holds seconds of an optimizer step; `messages` is all of their time, `exposed` what nothing hides."""

    arithmetic: float
    optimizer: float
    messages: float
    exposed: float
    tokens: int
    traffic: Traffic

    @property
    def step(self) -> float:
        return self.arithmetic + self.optimizer + self.exposed

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def exposed_share(self) -> float:
        return self.exposed / self.step


def speed_of(setup: Setup, device: Device, measured: tuple[float, float] | None = None) -> Speed:
    """Estimates by the device's rates, or by the `measured` seconds of a pass and of the optimizer."""
    a_pass, optimizer = measured or (_pass_seconds(setup, device), _optimizer_seconds(setup, device))
    traffic = traffic_of(setup)
    within, between = LINK_EFFICIENCY * device.link, LINK_EFFICIENCY * device.node_link
    stays_in_node = setup.nodes == 1 or 1 < setup.shards < setup.replicas
    slowest = within if stays_in_node else between
    peers = traffic.peers / within
    gradients, weights = traffic.gradients / slowest + traffic.nodes / between, traffic.weights / slowest
    # Gradients travel during the last backward pass; weights, block by block, before they are needed.
    exposed = max(0.0, gradients - BACKWARD * a_pass) + max(0.0, weights - a_pass * setup.accumulation)
    if setup.on_cpu:  # whose cores send and compute by turns
        exposed = gradients + weights
    return Speed(
        arithmetic=a_pass * setup.accumulation,
        optimizer=optimizer,
        messages=peers + gradients + weights,
        exposed=exposed + peers,
        tokens=setup.step_tokens,
        traffic=traffic,
    )


def pass_flops(setup: Setup) -> float:
    """Counts the operations of one device in a forward and a backward pass of a micro-batch."""
    flops = training_flops_per_token(setup.config, setup.seq_len) * setup.pass_tokens
    if setup.activation_checkpointing:
        head = 6 * setup.config.vocab_size * setup.config.d_model * setup.pass_tokens
        flops += (flops - head) // 3
    return flops / setup.tensor_parallel_size


def _pass_seconds(setup: Setup, device: Device) -> float:
    return pass_flops(setup) / (device.peak_flops(setup.precision) * device.utilization)


def _optimizer_seconds(setup: Setup, device: Device) -> float:
    """AdamW reads weight, gradient and moments and writes all but the gradient; Muon multiplies, too."""
    counts = count_parameters(setup.part)
    seconds = 7 * setup.weight_bytes * counts.total / setup.shards / device.bandwidth
    if setup.optimizer == "muon":
        # Five rounds of three products, of matrices with d_model columns at the least, in bfloat16.
        flops = 5 * 6 * counts.matrices * setup.config.d_model
        seconds += flops / (device.peak_flops("bf16-mixed") * device.utilization)
    return seconds
