"""How many replicas of a model there should be: by its slots, not by Ray Serve's count of requests.

Tokens do not travel through Ray Serve's handles, so the number of ongoing requests that Serve scales by is always 0
for an engine. Each replica reports its slots instead, and what runs and waits for them; the policy wants the slots of
all replicas together to be `target_load` full.

Ray Serve calls `record_autoscaling_stats` of every replica, averages what it gives over `look_back_s`, and asks the
policy ten times a second. Delays, bounds and rounding up are Serve's own.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.config import Autoscaling

SLOTS, RUNNING, WAITING = "slots", "running", "waiting"  # what a replica reports


class SlotLoad:
    """A policy of Ray Serve: replicas = (running + waiting) / (slots of one replica x target load)."""

    def __init__(self, target_load: float):
        """`target_load`: share of the slots that should be taken, above 0 and at most 1."""
        self._target = target_load

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, before Ray Serve rounds up and applies its bounds and delays."""
        reported = context.aggregated_metrics or {}
        slots = [value for value in reported.get(SLOTS, {}).values() if value > 0]
        if not slots:  # none has reported yet
            return float(context.target_num_replicas), {}
        busy = sum(sum(reported.get(name, {}).values()) for name in (RUNNING, WAITING))
        return busy / (self._target * sum(slots) / len(slots)), {}


def options(wanted: Autoscaling) -> AutoscalingConfig:
    """As Ray Serve takes it."""
    return AutoscalingConfig(
        min_replicas=wanted.min_replicas,
        max_replicas=wanted.max_replicas,
        look_back_period_s=wanted.look_back_s,
        upscale_delay_s=wanted.upscale_delay_s,
        downscale_delay_s=wanted.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=SlotLoad, policy_kwargs={"target_load": wanted.target_load}),
    )
