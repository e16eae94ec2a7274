"""Configuration of the parameter server: every number of the shards, with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from infra.fields import (
    described,
    require,
    require_at_least,
    require_choice,
    require_positive,
)

OPTIMIZERS = ('adagrad', 'rmsprop', 'adam')
WIRE_NAMES = ('float32', 'bfloat16', 'int8', 'top_k')
_RENAMED = {'wire_dtype': 'wire'}


@dataclasses.dataclass(frozen=True)
class ParameterServerConfig:
    """How parameters are split, updated and sent. Every field is a flag of the same name."""

    num_parameter_shards: int = described(
        1,
        'Server processes that share the parameters (paper: 31). Add some when one uses a whole'
        ' core. On one machine a run starts at most one for each core, unless --parameter_ports'
        ' lists one for each.',
    )
    optimizer: str = described(
        'adam', "'adagrad' (paper), 'rmsprop' (centered, Mnih et al. 2015) or 'adam'."
    )
    learning_rate: float = described(
        2.5e-4, 'Step size (Mnih et al. 2015: 2.5e-4; paper: not stated).'
    )
    learning_rate_updates: int = described(
        0,
        'Global updates over which the step size falls to learning_rate_end; 0 keeps it constant.',
    )
    learning_rate_end: float = described(
        0.0, 'Step size after learning_rate_updates, towards which it falls linearly.'
    )
    optimizer_epsilon: float = described(
        1e-8,
        "Added to the denominator by 'adam', under its root by 'rmsprop' (Mnih et al. 2015: 0.01).",
    )
    optimizer_decay: float = described(
        0.95, "Decay of the moving averages of 'rmsprop' (Mnih et al. 2015: 0.95)."
    )
    optimizer_momentum: float = described(0.0, "Momentum of 'rmsprop'.")
    adam_beta_1: float = described(
        0.9, "Decay of the first moment of 'adam' (Kingma and Ba 2015: 0.9)."
    )
    adam_beta_2: float = described(
        0.999, "Decay of the second moment of 'adam' (Kingma and Ba 2015: 0.999)."
    )
    adagrad_initial_accumulator: float = described(
        1e-6,
        "Initial accumulator of 'adagrad'. TensorFlow's 0.1 outweighs 1e8 squared gradients of a"
        ' Q-network (see pipelines/experiment/presets.py).',
    )
    max_staleness: int = described(
        100,
        'Updates after which the parameters of a gradient are too old, so that it is rejected'
        ' (paper: not stated). Raise it with the number of learners.',
    )
    target_update_period: int = described(
        1000, 'Global updates between target networks (paper: 60,000).'
    )
    average_updates: int = described(
        0,
        'Time constant, in updates, of a moving average of the parameters, which evaluations and'
        ' exports use in place of the newest: it lacks the noise of single updates. 0: none.',
    )
    wire: str = described(
        'float32',
        'Encoding of tensors between hosts; in shared memory they are float32. All but'
        " 'float32' send parameters as bfloat16, and gradients as 'bfloat16' (2 bytes a value),"
        " 'int8' (1 byte) or 'top_k' (the largest hundredth: 0.08 to 0.32 bytes). What a gradient"
        ' loses is added to the next (see docs/performance.md).',
    )
    shared_memory: bool = described(
        True, 'Exchange float32 tensors in shared memory if client and shard are on one host.'
    )

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
          ValueError: a value is out of its range; the message says which and what is allowed.
        """
        require_choice(self, 'optimizer', OPTIMIZERS)
        require_choice(self, 'wire', WIRE_NAMES)
        require_at_least(self, 1, 'num_parameter_shards', 'target_update_period')
        require_at_least(self, 0, 'max_staleness', 'optimizer_epsilon')
        require_positive(self, 'learning_rate', 'adagrad_initial_accumulator')
        require_at_least(self, 0, 'learning_rate_end', 'learning_rate_updates')
        if self.learning_rate_updates and self.learning_rate_end > self.learning_rate:
            raise ValueError(
                f'--learning_rate {self.learning_rate}: less than --learning_rate_end'
                f' {self.learning_rate_end}, to which it falls. Fix: lower --learning_rate_end, or'
                ' add --learning_rate_updates 0.'
            )
        # A weight whose gradient was always 0 would become 0 / 0.
        require(
            self,
            'optimizer_epsilon',
            self.optimizer != 'adam' or self.optimizer_epsilon > 0,
            "more than 0 with 'adam'",
        )
        # Every tenth update enters the average (see optimizers.py).
        averages = self.average_updates == 0 or self.average_updates >= 100
        require(self, 'average_updates', averages, '0 or at least 100')
        for name in ('optimizer_decay', 'optimizer_momentum', 'adam_beta_1', 'adam_beta_2'):
            value = getattr(self, name)
            require(self, name, 0 <= value < 1, 'at least 0 and less than 1')


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields as an earlier version wrote them, by their names now."""
    return {_RENAMED.get(name, name): value for name, value in values.items()}
