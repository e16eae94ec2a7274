"""Configuration of environment, network, agent, actor and learner as frozen, validated data.

Every field becomes a command-line flag of the same name (pipelines/experiment/command_line.py). The
help text beside a field gives its unit and source.
"""

import dataclasses
import math
import re

from infra.fields import (
    described,
    require,
    require_at_least,
    require_choice,
    require_fraction,
    require_from_to,
)

TORSOS = ('nature', 'dqn2013')
LOSSES = ('huber', 'squared')
OUTLIER_RULES = ('lone', 'every')
AGENTS = ('dqn', 'c51', 'qr_dqn')
STALENESS_BOUNDS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Bounds, in global updates, of the histogram of staleness. Bin i counts values above bound i - 1
and at most bound i; the last bin counts values above every bound."""
DEVICE = re.compile(r'auto|(cpu|gpu)(:\d+)?')
"""Pattern of a learner's device (see agents/device.py)."""
FACTORY = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*')
"""Pattern of an agent factory's name: `package.module:function`."""


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """The Atari game and its preprocessing (Mnih et al. 2015, Methods)."""

    game: str = described(
        'pong', 'Atari game: pong, space_invaders, ...; or its id in gymnasium: ALE/Pong-v5'
    )
    action_repeat: int = described(4, 'emulator frames per agent step (Mnih et al. 2015)')
    frame_stack: int = described(4, 'frames in one observation (Mnih et al. 2015)')
    max_noops: int = described(30, 'at most this many no-ops start a game (Mnih et al. 2015)')
    max_episode_frames: int = described(
        108_000, 'emulator frames after which a game is cut (30 minutes; Mnih et al. 2015)'
    )
    sticky_action_probability: float = described(
        0.0, 'probability that the emulator repeats the last action (the paper: 0)'
    )
    life_loss_ends_episode: bool = described(
        True, 'the loss of a life ends a training episode (paper, section 5)'
    )

    def __post_init__(self) -> None:
        require_from_to(self, 1, 100, 'action_repeat', 'frame_stack')
        require_at_least(self, 1, 'max_episode_frames')
        require_from_to(self, 0, 10_000, 'max_noops')
        require_fraction(self, 'sticky_action_probability')


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The Q-network."""

    torso: str = described(
        'nature', "convolutions and dense layer: 'nature' (Mnih et al. 2015) or 'dqn2013'"
    )
    center_input: bool = described(
        False,
        "subtract each observation's mean: a plain background otherwise hides motion early in"
        ' training (not in the papers)',
    )
    dueling: bool = described(
        False, 'streams for the value of a state and for advantages (Wang et al. 2016)'
    )

    def __post_init__(self) -> None:
        require_choice(self, 'torso', TORSOS)


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The agent, its loss and the clipping of its gradient."""

    agent: str = described(
        'dqn',
        "'dqn' (Mnih et al. 2015), 'c51' (Bellemare et al. 2017), 'qr_dqn' (Dabney et al. 2018), or"
        " module:function, a factory of the user's own TF-Agents agent (see docs/tf_agents.md)",
    )
    discount: float = described(0.99, 'discount per agent step (Mnih et al. 2015)')
    n_step: int = described(1, 'agent steps of reward before the bootstrap')
    double_dqn: bool = described(
        False, 'the network chooses the best next action, the target judges it (van Hasselt 2016)'
    )
    loss: str = described('huber', "of 'dqn': 'huber' (clipped, Mnih et al. 2015) or 'squared'")
    num_atoms: int = described(51, "returns that 'c51' distinguishes (Bellemare et al. 2017)")
    v_min: float = described(-10.0, "least return of 'c51' (Bellemare et al. 2017)")
    v_max: float = described(10.0, "largest return of 'c51' (Bellemare et al. 2017)")
    num_quantiles: int = described(200, "quantiles of 'qr_dqn' (Dabney et al. 2018)")
    gradient_clip_norm: float = described(10.0, 'global norm of the gradient; 0: not clipped')

    def __post_init__(self) -> None:
        require_fraction(self, 'discount')
        require_from_to(self, 1, 1000, 'n_step')
        require_at_least(self, 0, 'gradient_clip_norm')
        require_choice(self, 'loss', LOSSES)
        require_from_to(self, 2, 10_000, 'num_atoms')
        require_from_to(self, 1, 10_000, 'num_quantiles')
        require(self, 'v_min', -math.inf < self.v_min < math.inf, 'finite')
        require(self, 'v_max', self.v_min < self.v_max < math.inf, f'above --v_min {self.v_min}')
        known = self.agent in AGENTS or FACTORY.fullmatch(self.agent)
        allowed = f'one of {", ".join(AGENTS)}, or module:function'
        require(self, 'agent', bool(known), allowed)


@dataclasses.dataclass(frozen=True)
class ActorConfig:
    """Acting: number of environments, exploration, freshness of parameters."""

    envs_per_actor: int = described(8, 'environments stepped as one batch by an actor')
    actor_pull_period: int = described(
        16, 'agent steps of one environment between two syncs with the parameter server'
    )
    epsilon_start: float = described(1.0, 'epsilon before the first update (paper, section 5)')
    epsilon_end: float = described(0.1, 'epsilon after the annealing (paper, section 5)')
    epsilon_updates: int = described(
        1_000_000, 'global updates over which epsilon falls linearly (paper, section 5)'
    )
    epsilon_ladder: bool = described(
        False,
        'each environment i of all N has a fixed epsilon, ladder_epsilon^(1 + i/(N-1)'
        ' ladder_exponent) (Horgan et al. 2018, section 4.1), instead of annealing',
    )
    ladder_epsilon: float = described(
        0.4, 'largest of the ladder of epsilons (Horgan et al. 2018, section 4.1)'
    )
    ladder_exponent: float = described(
        7.0, 'alpha of the ladder of epsilons (Horgan et al. 2018, section 4.1)'
    )
    actor_priorities: bool = described(
        True,
        "a new transition's priority is the actor's own error (Horgan et al. 2018), else 1"
        ' (Schaul et al. 2016: the largest so far, which no process here knows)',
    )
    clip_reward: bool = described(True, 'rewards are clipped to [-1, 1] in training (paper)')

    def __post_init__(self) -> None:
        require_from_to(self, 1, 4096, 'envs_per_actor')
        require_at_least(self, 1, 'actor_pull_period')
        require_at_least(self, 0, 'epsilon_updates', 'ladder_exponent')
        require_fraction(self, 'epsilon_start', 'epsilon_end', 'ladder_epsilon')


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Learning: the batch, the freshness of parameters, the outlier test."""

    batch_size: int = described(32, 'transitions in a gradient (Mnih et al. 2015)')
    learner_pull_period: int = described(
        1, "updates between two refreshes of a learner's parameters (paper: not stated)"
    )
    overlap_push: bool = described(
        True, 'send a gradient while the next is computed (one more update of staleness)'
    )
    learner_device: str = described(
        'auto',
        "where gradients are computed: 'auto' (a GPU if the learner sees one), 'cpu', 'gpu' (those"
        " of a machine in turn), 'gpu:N'",
    )
    outlier_deviations: float = described(
        6.0,
        'standard deviations above the mean loss at which a gradient is dropped; 0: never'
        ' (paper, section 4.3: "several")',
    )
    outlier_rule: str = described(
        'lone',
        "which outliers are dropped: 'lone', those without another in the last 1 / (1 -"
        ' outlier_decay) updates, and of these every other one, so that a rare reward is learned;'
        " 'every' (paper, section 4.3), which can hide it for ever",
    )
    outlier_decay: float = described(
        0.999, 'decay per update of the running mean and deviation of the loss (not in the paper)'
    )

    importance_exponent_start: float = described(
        0.4, 'beta of the importance weights before the first update (Schaul et al. 2016)'
    )
    importance_exponent_end: float = described(
        1.0, 'beta of the importance weights after the annealing (Schaul et al. 2016)'
    )
    importance_updates: int = described(
        1_000_000, 'global updates over which beta rises linearly (Schaul et al. 2016: the run)'
    )

    def __post_init__(self) -> None:
        require_from_to(self, 1, 65_536, 'batch_size')
        named = bool(DEVICE.fullmatch(self.learner_device))
        require(self, 'learner_device', named, 'auto, cpu, gpu, or gpu:N')
        require_at_least(self, 1, 'learner_pull_period')
        require_at_least(self, 0, 'outlier_deviations', 'importance_updates')
        require_choice(self, 'outlier_rule', OUTLIER_RULES)
        require_fraction(self, 'importance_exponent_start', 'importance_exponent_end')
        require(self, 'outlier_decay', 0 <= self.outlier_decay < 1, 'at least 0 and less than 1')
