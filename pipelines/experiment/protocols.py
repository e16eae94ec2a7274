"""Evaluation protocols: the rules under which published scores were taken.

Sources: [G] Nair et al. 2015 (the paper), section 5; [N] Mnih et al. 2015, Methods; [M] Machado et
al. 2018, section 5 and table 6; [R] Hessel et al. 2018, "Evaluation Methodology"; [A] Horgan et al.
2018, appendix; [Zoo] DeepMind's DQN Zoo; [here] chosen by us.

A score is the sum of a game's raw rewards. The loss of a life never ends a game.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from agents.config import EnvironmentConfig
from pipelines.errors import UsageError

PLAIN = 'plain'
"""Name of the rules of environments outside Atari: their own."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Rules of an evaluation game.

    Attributes:
      name: as in `--protocol`.
      epsilon: probability of a uniformly random action.
      max_frames: emulator frames after the no-ops, or the start point, at which a game is cut off.
      episodes: games of one policy.
      max_noops: most no-ops at the start of a game, drawn uniformly from 0.
      sticky_action_probability: that the emulator repeats the action before.
      full_action_space: whether the agent chooses among all 18 actions.
      starts: whether games begin at recorded start points.
    """

    name: str
    epsilon: float
    max_frames: int
    episodes: int = 30
    max_noops: int = 30
    sticky_action_probability: float = 0.0
    full_action_space: bool = False
    starts: bool = False

    def environment(self, trained: EnvironmentConfig) -> EnvironmentConfig:
        """The rules of a game for a policy that was trained in `trained`.

        The policy keeps what its network depends on: game, action set, stack and action repeat.
        """
        return dataclasses.replace(
            trained,
            max_noops=self.max_noops,
            max_episode_frames=self.max_frames,
            sticky_action_probability=self.sticky_action_probability,
            life_loss_ends_episode=False,
        )


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # [G] 5: 30 games, epsilon 0.05, five minutes; up to 30 no-ops as [N].
        Protocol('noop', epsilon=0.05, max_frames=18_000),
        # [G] 5: 100 start points from a person's play, then thirty minutes; the score before the
        # start point does not count. Their start points were never published.
        Protocol('human', epsilon=0.05, max_frames=108_000, episodes=100, max_noops=0, starts=True),
        # [M] 5: sticky actions 0.25, all 18 actions, no signal of lives, thirty minutes, no no-ops.
        # Their scores are of training games, whose epsilon ends at 0.01. Their frame skip of 5 is
        # not taken over [here]: the policy keeps its action repeat.
        Protocol(
            'machado',
            epsilon=0.01,
            max_frames=108_000,
            max_noops=0,
            sticky_action_probability=0.25,
            full_action_space=True,
        ),
        # [R], [A]: no-op starts, thirty minutes. Epsilon is 0 for noisy networks [R] and Ape-X [A],
        # 0.001 for others [Zoo]. 30 games [here].
        Protocol('rainbow', epsilon=0.001, max_frames=108_000),
        # [here] Environments outside Atari: their own rules.
        Protocol(PLAIN, epsilon=0.0, max_frames=108_000, max_noops=0),
    )
}


RUN_PROTOCOLS = tuple(protocol.name for protocol in PROTOCOLS.values() if not protocol.starts)
"""Those of the evaluation at the end of a run, which has no start points."""


def protocol(name: str, values: Mapping[str, Any]) -> Protocol:
    """The protocol `name` with fields replaced by those of `values` that are not None.

    Raises:
      UsageError: the name is unknown.
    """
    if name not in PROTOCOLS:
        raise UsageError(
            f'--protocol {name!r}: unknown. Fix: choose one of {", ".join(PROTOCOLS)}.'
        )
    given = {field: value for field, value in values.items() if value is not None}
    return dataclasses.replace(PROTOCOLS[name], **given)


def default_for(environment: EnvironmentConfig) -> str:
    """Name of the rules of an environment unless some are named."""
    return 'noop' if environment.is_atari else PLAIN


def require_fit(
    name: str,
    environment: EnvironmentConfig,
    flag: str = '--protocol',
    choices: Iterable[str] = PROTOCOLS,
) -> None:
    """
    Raises:
      UsageError: the rules are of Atari and the environment is not, or the other way round; names
        the `flag`, and those of its `choices` that fit.
    """
    if (name == PLAIN) == environment.is_atari:
        fitting = [each for each in choices if (each == PLAIN) != environment.is_atari]
        raise UsageError(
            f'{flag} {name}: not for {environment.game}. Fix: choose {" or ".join(fitting)}, or'
            ' omit it.'
        )


def deviations(used: Protocol, environment: EnvironmentConfig) -> dict[str, Any]:
    """What `used` changes in the protocol of its name, by setting; more games change nothing.

    Args:
      used: the rules of the games.
      environment: of the policy, which decides action set, action repeat and frame stack.
    """
    exact = PROTOCOLS[used.name]
    allowed = {'epsilon': (0.0, 0.001)} if used.name == 'rainbow' else {}
    rules = {
        field.name: value
        for field in dataclasses.fields(used)
        if (value := getattr(used, field.name)) != getattr(exact, field.name)
        and not (field.name == 'episodes' and value > exact.episodes)
        and value not in allowed.get(field.name, ())
    }
    if not environment.is_atari:
        return rules
    published = dataclasses.replace(
        EnvironmentConfig(), full_action_space=exact.full_action_space
    )  # [N]: four frames a step, four frames stacked
    return rules | {
        name: getattr(environment, name)
        for name in ('action_repeat', 'frame_stack', 'full_action_space')
        if getattr(environment, name) != getattr(published, name)
    }
