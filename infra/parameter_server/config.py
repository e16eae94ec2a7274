"""Configuration of the parameter server: every number of the shards, with its source."""

from __future__ import annotations

import dataclasses

OPTIMIZERS = ('adagrad', 'rmsprop', 'adam')
WIRE_DTYPES = ('float32', 'bfloat16')


def _option(default, description: str):
    return dataclasses.field(default=default, metadata={'help': description})


@dataclasses.dataclass(frozen=True)
class ParameterServerConfig:
    """How parameters are split, updated and sent. Every field is a flag of the same name."""

    num_parameter_shards: int = _option(
        2, 'Server processes the parameter vector is split over (the paper uses 31).'
    )
    optimizer: str = _option('adam', "'adagrad' (paper), 'rmsprop' (centered, DQN 2015) or 'adam'.")
    learning_rate: float = _option(
        2.5e-4, 'Step size. DQN 2015: 2.5e-4; the paper does not state its own.'
    )
    optimizer_epsilon: float = _option(
        1e-8, "Added to the denominator by 'adam', under its root by 'rmsprop' (DQN 2015: 0.01)."
    )
    optimizer_decay: float = _option(
        0.95, "Decay of the moving averages of 'rmsprop' (DQN 2015: 0.95)."
    )
    optimizer_momentum: float = _option(0.0, "Momentum of 'rmsprop'.")
    adam_beta_1: float = _option(0.9, "Decay of the first moment of 'adam' (Kingma and Ba 2015).")
    adam_beta_2: float = _option(
        0.999, "Decay of the second moment of 'adam' (Kingma and Ba 2015)."
    )
    adagrad_initial_accumulator: float = _option(
        0.1, "First value of the accumulators of 'adagrad' (TensorFlow's default)."
    )
    max_staleness: int = _option(
        100,
        'Updates: a gradient computed from parameters older than this is refused '
        '(the paper does not state its bound).',
    )
    target_update_period: int = _option(
        1000, 'Global updates between two target networks (the paper: 60,000).'
    )
    wire_dtype: str = _option(
        'float32', "Type of tensors on the network, 'float32' or 'bfloat16' (half the bytes)."
    )
    shared_memory: bool = _option(
        True, "Whether a client on a shard's own host exchanges float32 tensors in shared memory."
    )

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
          ValueError: a value is out of its range; the message says which and what is allowed.
        """
        self._require_choice('optimizer', OPTIMIZERS)
        self._require_choice('wire_dtype', WIRE_DTYPES)
        for name in ('num_parameter_shards', 'target_update_period'):
            self._require(name, getattr(self, name) >= 1, 'at least 1')
        self._require('max_staleness', self.max_staleness >= 0, '0 or more updates')
        self._require('learning_rate', self.learning_rate > 0, 'more than 0')
        self._require('optimizer_epsilon', self.optimizer_epsilon >= 0, '0 or more')
        self._require(
            'adagrad_initial_accumulator', self.adagrad_initial_accumulator > 0, 'more than 0'
        )
        for name in ('optimizer_decay', 'optimizer_momentum', 'adam_beta_1', 'adam_beta_2'):
            self._require(name, 0 <= getattr(self, name) < 1, 'at least 0 and less than 1')

    def _require(self, name: str, satisfied: bool, allowed: str) -> None:
        if not satisfied:
            raise ValueError(f'{name} is {getattr(self, name)!r}; it must be {allowed}')

    def _require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in choices, f'one of {", ".join(choices)}')
