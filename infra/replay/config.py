"""Configuration of the replay: totals over all shards in, figures per shard out."""

import dataclasses
import math

from infra.fields import described, require_at_least, require_choice, require_positive

EXPERIENCE_TABLE = 'experience'
REPLAY_MODES = ('local', 'global')


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Size, sharing and rate limits of the replay. Sizes are totals over all shards."""

    num_replay_shards: int = described(
        1,
        'Replay servers, at most one per actor (paper: one per bundle). Add some when one uses a'
        ' whole core.',
    )
    replay_mode: str = described(
        'global',
        "'global': learners sample all shards (paper, section 4.1); 'local': actor i and learner i"
        ' use shard i.',
    )
    replay_capacity: int = described(
        250_000,
        'Transitions stored, over all shards (paper: 1,000,000 frames per bundle). Each takes about'
        ' 1 kB of memory, and about 1 kB for a picture of 84 x 84 pixels.',
    )
    min_replay_size: int = described(
        5_000,
        'Transitions stored, over all shards, before learning starts (Mnih et al. 2015: 50,000).',
    )
    agent_steps_per_update: float = described(
        4.0,
        'Agent steps of all actors per batch that learners sample, whether or not its gradient is'
        ' applied (Mnih et al. 2015: 4); 0 sets no ratio.',
    )
    sample_insert_tolerance: float = described(
        2_000.0,
        'Transitions, over all shards, by which sampling may lead or lag that ratio before one side'
        ' waits. Lower keeps the ratio tighter; higher lets acting and learning overlap more.',
    )
    priority_exponent: float = described(
        0.0,
        'Transitions are sampled in proportion to priority^exponent (Schaul et al. 2016: 0.6); 0'
        ' samples uniformly.',
    )
    max_in_flight_items: int = described(
        49,
        "Unconfirmed transitions per eight environments; bounds an actor's memory (Reverb warns"
        ' from 50).',
    )

    def __post_init__(self):
        """Checks every value.

        Raises:
          ValueError: a value is out of its range; the message names the field and the remedy.
        """
        require_choice(self, 'replay_mode', REPLAY_MODES)
        require_at_least(
            self,
            1,
            'num_replay_shards',
            'replay_capacity',
            'min_replay_size',
            'max_in_flight_items',
        )
        require_at_least(self, 0, 'agent_steps_per_update')  # 0 disables the ratio
        require_at_least(self, 0, 'priority_exponent')
        require_positive(self, 'sample_insert_tolerance')
        if self.min_replay_size > self.replay_capacity:
            raise ValueError(
                f'--min_replay_size {self.min_replay_size} exceeds --replay_capacity'
                f' {self.replay_capacity}: sampling never starts. Fix: lower the first or raise the'
                ' second'
            )
        if self.replay_capacity < self.num_replay_shards:
            raise ValueError(
                f'--replay_capacity {self.replay_capacity} is below --num_replay_shards'
                f' {self.num_replay_shards}: every shard must hold at least one transition'
            )

    @property
    def prioritized(self) -> bool:
        """Whether transitions are sampled by priority."""
        return self.priority_exponent > 0

    @property
    def shard_capacity(self) -> int:
        """Capacity of one shard, in transitions."""
        return math.ceil(self.replay_capacity / self.num_replay_shards)

    @property
    def shard_min_size(self) -> int:
        """Transitions that one shard holds before sampling starts."""
        return math.ceil(self.min_replay_size / self.num_replay_shards)

    def samples_per_insert(self, batch_size: int) -> float:
        """Average number of times that each transition is sampled; 0 if there is no ratio."""
        if not self.agent_steps_per_update:
            return 0.0
        return batch_size / self.agent_steps_per_update

    def shard_tolerance(self, batch_size: int) -> float:
        """One shard's share of `sample_insert_tolerance`, raised where it would block both sides.

        A sampler requests a whole batch and a writer waits until all its items are stored. A
        tolerance below one batch, or below one insert, would block both for ever.
        """
        share = self.sample_insert_tolerance / self.num_replay_shards
        return max(share, 2.0 * batch_size, 2.0 * self.samples_per_insert(batch_size))


def shard_of_worker(worker: int, num_shards: int) -> int:
    """Number of the shard used by actor (in local mode also learner) number `worker`."""
    return worker % num_shards
