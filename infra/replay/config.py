"""Configuration of the replay: plain data in, per-shard figures out, no behaviour."""

import dataclasses
import math

from infra.fields import described, require_at_least, require_choice, require_positive

EXPERIENCE_TABLE = 'experience'
REPLAY_MODES = ('local', 'global')


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Size, sharing and pace of the replay memory. Sizes are totals over all shards."""

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
        4.0, 'agent steps of all actors per update of all learners (Mnih et al. 2015); 0: no ratio'
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
          ValueError: naming the field, its value and the remedy.
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
        require_at_least(self, 0, 'agent_steps_per_update')  # 0: no ratio is kept
        require_at_least(self, 0, 'priority_exponent')
        require_positive(self, 'sample_insert_tolerance')
        if self.min_replay_size > self.replay_capacity:
            raise ValueError(
                f'min_replay_size ({self.min_replay_size}) exceeds replay_capacity'
                f' ({self.replay_capacity}): sampling could never start; lower the first or raise'
                ' the second'
            )
        if self.replay_capacity < self.num_replay_shards:
            raise ValueError(
                f'replay_capacity ({self.replay_capacity}) is below num_replay_shards'
                f' ({self.num_replay_shards}): every shard must hold at least one transition'
            )

    @property
    def prioritized(self) -> bool:
        """Whether transitions are drawn by their priorities."""
        return self.priority_exponent > 0

    @property
    def shard_capacity(self) -> int:
        """Transitions one shard keeps."""
        return math.ceil(self.replay_capacity / self.num_replay_shards)

    @property
    def shard_min_size(self) -> int:
        """Transitions one shard holds before it is sampled."""
        return math.ceil(self.min_replay_size / self.num_replay_shards)

    def samples_per_insert(self, batch_size: int) -> float:
        """Times each stored transition is sampled, on average; 0: no ratio is kept."""
        if not self.agent_steps_per_update:
            return 0.0
        return batch_size / self.agent_steps_per_update

    def shard_tolerance(self, batch_size: int) -> float:
        """One shard's share of `sample_insert_tolerance`, at least what lets both sides move.

        A sampler asks for a whole batch and a writer waits until all its items are in, so a buffer
        below one batch, or below one insert, would block both for ever.
        """
        share = self.sample_insert_tolerance / self.num_replay_shards
        return max(share, 2.0 * batch_size, 2.0 * self.samples_per_insert(batch_size))


def shard_of_worker(worker: int, num_shards: int) -> int:
    """The shard that actor (or, in local mode, learner) number `worker` uses."""
    return worker % num_shards
