"""From a load to a slice: how many ingresses it takes depends on their calls, and these on how many they are.

So the slice is run, the ingresses are counted again, and it is run once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from simulation.capacity import Fleet, ingresses
from simulation.constants import Constants
from simulation.load import Mix
from simulation.runs import Outcome, closed_loop, open_loop
from simulation.slice import Shape

SLICE_REPLICAS = 4  # of which one or two share a GPU; at most: their load is that of any replica of the fleet
ROUNDS = 2
DENSE = 0.05  # calls a request, at first: what few large units would take

MEASURED_PER_S, MEASURED_IN_FLIGHT = 440.0, 32  # README: short queries, 32 in flight; 422 to 482 in various hours
TWO_CORES = Shape(
    ingresses=1, replicas=1, visible=1, unit_tokens=1024, unit_sequences=1365, bulk_at_once=2, crowded=False, cores=2
)
SHORT = Mix(short_part=1.0, workspaces=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A fleet with the calls that its ingresses make, and the slice that they were seen in."""

    fleet: Fleet
    outcome: Outcome

    @property
    def counted(self) -> int:
        """Replicas that an ingress counts with."""
        return self.fleet.counted or self.fleet.replicas


def sized(fleet: Fleet, mix: Mix, costs: Constants, *, burst: float, seconds: float, seed: int) -> Sized:
    fleet = replace(fleet, calls=DENSE)
    for _ in range(ROUNDS):
        outcome = open_loop(
            shape(fleet, mix, costs), mix, costs, per_s=per_s(fleet), burst=burst, seconds=seconds, seed=seed
        )
        fleet = replace(fleet, calls=outcome.calls)
    return Sized(fleet=fleet, outcome=outcome)


def shape(fleet: Fleet, mix: Mix, costs: Constants) -> Shape:
    """Replicas of one cell, as far as they go, and their part of its ingresses."""
    replicas = _simulated(fleet)
    part = replicas / fleet.gpus / fleet.replicas_per_gpu
    sequences = max(1, 2**21 // int(4 * costs.dimensions))  # as `catalog.ModelCard.unit_sequences`
    return Shape(
        ingresses=max(1, round(ingresses(fleet, mix, costs) * part)),
        replicas=replicas,
        visible=fleet.counted or fleet.replicas,
        per_gpu=fleet.replicas_per_gpu,
        unit_sequences=sequences,
        crowded=mix.workspaces > 1,
    )


def per_s(fleet: Fleet) -> float:
    """Requests of a slice: a replica has there what it has in the fleet."""
    return fleet.requests_per_s * _simulated(fleet) / fleet.gpus / fleet.replicas_per_gpu


def _simulated(fleet: Fleet) -> int:
    """Replicas, whole GPUs of them."""
    return min(SLICE_REPLICAS, max(fleet.replicas_per_gpu, fleet.replicas))


def sweep(fleet: Fleet, mix: Mix, costs: Constants, *, burst: float, seconds: float, seed: int) -> Iterator[Sized]:
    """The same load and GPUs, in ever larger cells, up to one of all."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size < fleet.gpus]
    for size in sizes:
        yield sized(replace(fleet, cells=round(fleet.gpus / size)), mix, costs, burst=burst, seconds=seconds, seed=seed)
    yield sized(replace(fleet, cells=1), mix, costs, burst=burst, seconds=seconds, seed=seed)


def two_cores(costs: Constants, *, seconds: float, seed: int) -> Outcome:
    """The development machine: everything on two cores, short queries, 32 in flight."""
    return closed_loop(TWO_CORES, SHORT, costs, in_flight=MEASURED_IN_FLIGHT, seconds=seconds, seed=seed)
