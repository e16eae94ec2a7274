"""Configuration of the replay: totals over all shards in, figures per shard out."""

import dataclasses
import math

from infra.fields import described, require_at_least, require_choice, require_positive

EXPERIENCE_TABLE = 'experience'
REPLAY_MODES = ('local', 'global')


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Size, sharing and rate limits of the replay. Sizes are totals over all shards."""

    num_replay_shards: int = described(1, 'replay servers (paper: one per bundle)')
    replay_mode: str = described(
        'global',
        "'local': actor i and learner i use shard i; 'global': learners mix all shards"
        ' (paper, section 4.1)',
    )
    replay_capacity: int = described(
        250_000, 'transitions kept, over all shards (paper: 1,000,000 frames per bundle)'
    )
    min_replay_size: int = described(
        5_000,
        'transitions stored, over all shards, before the first is sampled'
        ' (Mnih et al. 2015: 50,000)',
    )
    agent_steps_per_update: float = described(
        4.0,
        'agent steps of all actors per batch that the learners draw, whether its gradient is'
        ' applied or not (Mnih et al. 2015); 0: no ratio',
    )
    sample_insert_tolerance: float = described(
        2_000.0,
        'transitions that sampling may run ahead of, or lag behind, the ratio before one'
        ' side waits, over all shards; smaller keeps the ratio tighter, larger lets acting and'
        ' learning overlap (2,000: 62 updates of 32)',
    )
    priority_exponent: float = described(
        0.0,
        'transitions are drawn in proportion to priority^exponent (Schaul et al. 2016: 0.6); 0:'
        ' uniformly',
    )
    max_in_flight_items: int = described(
        49,
        "transitions of eight environments sent but not yet confirmed; bounds an actor's memory"
        ' (Reverb warns from 50 on)',
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
