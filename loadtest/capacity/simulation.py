"""Simulation of server replicas behind a load balancer, in simulated time: an hour of sixteen replicas takes seconds.

Each replica is the server's own scheduler with one device of known costs. HTTP, the balancer and the encoder take no
time apart from a constant delay between the device and the last byte.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from engines.runtime.simulated import SimulatedTable
from loadtest.schedule import Arrival, Schedule
from loadtest.summary import percentile
from server.errors import DeadlineTooShortError, QueueFullError
from server.scheduling.costs import PNG_FAST, CostTable, Output
from server.scheduling.jobs import DevicePlan, Job, Limits, Priority
from server.scheduling.scheduler import Scheduler

DEVICE = "device"
ENCODE_SECONDS = 0.031  # from the device to the last byte
DEFAULT_DEADLINE = 60.0  # seconds, of requests without their own


@dataclass(frozen=True)
class Result:
    """Observations of the clients. Times are in seconds."""

    replicas: int
    latencies: tuple[float, ...]  # of complete responses
    rejected: int
    late: int
    utilisation: float  # share of the devices' time

    @property
    def sent(self) -> int:
        """Number of requests."""
        return len(self.latencies) + self.rejected

    def percentile(self, q: float) -> float:
        """Return the `q`-th percentile of the latencies."""
        return percentile(self.latencies, q)


@dataclass(eq=False)
class Replica:
    """A scheduler with one device."""

    table: SimulatedTable
    scheduler: Scheduler[Arrival]
    in_flight: int = 0
    busy: bool = False
    busy_seconds: float = 0.0

    @classmethod
    def create(cls, table: SimulatedTable, encode: float) -> Replica:
        """Create an idle replica whose scheduler knows the costs of `table` and `encode` seconds for encoding."""
        costs = CostTable()
        outputs = {size: Output(table.name, size) for size in table.costs}
        for size, output in outputs.items():
            cost = table.costs[size]
            costs.measure("condition", output, cost.condition)
            costs.measure("finish", output, cost.finish)
            costs.measure("encode", output, encode, encoding=PNG_FAST)
            for batch in range(1, table.max_batch + 1):
                costs.measure("step", output, cost.step_of(batch), batch)
        batch = table.max_batch
        # With a thread for every image of a batch, an image never waits for a thread.
        limits = Limits(queue_seconds=120.0, slots=batch + 1, encoder_threads=batch)
        return cls(table, Scheduler(costs, limits, {DEVICE: dict.fromkeys(outputs.values(), batch)}))

    def plan(self, now: float) -> tuple[DevicePlan[Arrival], float] | None:
        """Return the next step and its seconds, including the conditioning of images that start; None if idle."""
        step = self.scheduler.plan(DEVICE, now)
        if not step.batch:
            return None
        cost = self.table.costs[step.batch[0].output.size]
        return step, len(step.start) * cost.condition + cost.step_of(len(step.batch))


Balance = Callable[[Sequence[Replica], int], Replica]  # chooses a replica for the request of this number


def least_connections(replicas: Sequence[Replica], number: int) -> Replica:
    """Choose the replica with the fewest requests in flight; ties are broken round robin."""
    turn = number % len(replicas)
    return min((*replicas[turn:], *replicas[:turn]), key=lambda replica: replica.in_flight)


def least_of_four(replicas: Sequence[Replica], number: int) -> Replica:
    """Choose the one with the fewest requests in flight of four random replicas, which may be equal, as Envoy does."""
    return min(random.Random(number).choices(replicas, k=4), key=lambda replica: replica.in_flight)


def round_robin(replicas: Sequence[Replica], number: int) -> Replica:
    """Choose the replicas in turn."""
    return replicas[number % len(replicas)]


def random_replica(replicas: Sequence[Replica], number: int) -> Replica:
    """Choose a replica at random, as a Kubernetes Service does for each connection."""
    return random.Random(number).choice(replicas)


def least_backlog(replicas: Sequence[Replica], number: int) -> Replica:
    """Choose the replica with the least predicted work, which it would have to report without delay."""
    turn = number % len(replicas)
    return min((*replicas[turn:], *replicas[:turn]), key=lambda replica: replica.scheduler.backlog())


BALANCERS: dict[str, Balance] = {
    "random": random_replica,
    "round-robin": round_robin,
    "four": least_of_four,
    "least": least_connections,
    "backlog": least_backlog,
}


def simulate(
    schedule: Schedule,
    table: SimulatedTable,
    replicas: int,
    encode: float = ENCODE_SECONDS,
    deadline: float = DEFAULT_DEADLINE,
    balance: Balance = least_connections,
    retries: int = 0,
) -> Result:
    """Serve `schedule` in simulated time.

    Args:
        schedule: The requests.
        table: Costs of the device of each replica.
        replicas: Number of replicas.
        encode: Seconds from the device to the last byte.
        deadline: Seconds, for requests without their own deadline.
        balance: The load balancer.
        retries: Number of other replicas that a rejected request is sent to, one after the other.
    """
    return Simulation(table, replicas, encode, deadline, balance, retries).run(schedule)


class Simulation:
    """Discrete-event simulation of one schedule. Times are seconds after its start."""

    def __init__(
        self, table: SimulatedTable, replicas: int, encode: float, deadline: float, balance: Balance, retries: int
    ) -> None:
        """Create idle replicas; see `simulate` for the arguments."""
        self._retries = retries
        self._replicas = [Replica.create(table, encode) for _ in range(replicas)]
        self._encode, self._deadline, self._balance = encode, deadline, balance
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []  # heap of time, number, action
        self._numbers = itertools.count()  # order events of the same time
        self._latencies: list[float] = []
        self._rejected = self._late = 0

    def run(self, schedule: Schedule) -> Result:
        """Process all events and return what clients observed."""
        for number, arrival in enumerate(schedule.arrivals):
            self._at(arrival.at, partial(self._arrive, number, arrival))
        while self._events:
            self._now, _, action = heapq.heappop(self._events)
            action()
        seconds = len(self._replicas) * max(self._now, schedule.duration)
        utilisation = sum(replica.busy_seconds for replica in self._replicas) / seconds
        return Result(len(self._replicas), tuple(self._latencies), self._rejected, self._late, utilisation)

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), action))

    def _arrive(self, number: int, arrival: Arrival) -> None:
        """Send a request to a replica, and to others if it is rejected."""
        remaining = list(self._replicas)
        for _ in range(min(1 + self._retries, len(remaining))):
            replica = self._balance(remaining, number)
            if self._admit(replica, arrival):
                return
            remaining.remove(replica)
        self._rejected += 1

    def _admit(self, replica: Replica, arrival: Arrival) -> bool:
        """Send a request to a replica; return False if it is rejected."""
        kind = arrival.kind
        deadline = self._deadline if kind.deadline_ms is None else kind.deadline_ms / 1000
        priority = Priority[kind.priority.upper()]
        output = Output(replica.table.name, kind.size)
        job = Job(output, tuple(range(kind.steps)), priority, self._now + deadline, payload=arrival)
        try:
            replica.scheduler.admit([job], self._now)
        except (QueueFullError, DeadlineTooShortError):
            return False
        replica.in_flight += 1
        self._start_step(replica)
        return True

    def _start_step(self, replica: Replica) -> None:
        """Start the next step if the device is idle and has work."""
        planned = None if replica.busy else replica.plan(self._now)
        if planned is not None:
            step, seconds = planned
            replica.busy = True
            replica.busy_seconds += seconds
            self._at(self._now + seconds, partial(self._end_step, replica, step))

    def _end_step(self, replica: Replica, step: DevicePlan[Arrival]) -> None:
        """Finish the images that had their last step, then let the device continue."""
        done = replica.scheduler.stepped(step.batch, self._now)
        finish = sum(replica.table.costs[job.output.size].finish for job in done)
        replica.busy_seconds += finish
        for job in done:
            self._at(self._now + finish + self._encode, partial(self._respond, replica, job))
        self._at(self._now + finish, partial(self._release_device, replica))

    def _release_device(self, replica: Replica) -> None:
        replica.busy = False
        self._start_step(replica)

    def _respond(self, replica: Replica, job: Job[Arrival]) -> None:
        """Deliver the last byte of a response."""
        replica.scheduler.encoded(job)
        replica.in_flight -= 1
        self._latencies.append(self._now - job.payload.at)
        self._late += self._now > job.deadline
