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
    require_positive,
)

PRECISIONS = ('float32', 'bfloat16')
TORSOS = ('nature', 'dqn2013', 'narrow', 'nature_half', 'dqn2013_half', 'narrow_half')
LOSSES = ('huber', 'squared')
OUTLIER_RULES = ('lone', 'every')
AGENTS = ('dqn', 'c51', 'qr_dqn', 'iqn')
BUILTIN = 'builtin'
"""Value of `NetworkConfig.q_network` for this project's own networks."""
STALENESS_BOUNDS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Bounds, in global updates, of the histogram of staleness. Bin i counts values above bound i - 1
and at most bound i; the last bin counts values above every bound."""
DEVICE = re.compile(r'auto|(cpu|gpu)(:\d+)?')
"""Pattern of a learner's device (see agents/device.py)."""
_LAYERS = re.compile(r'[1-9]\d{0,4}(,[1-9]\d{0,4}){0,9}')
FACTORY = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*')
"""Pattern of a function's name: `package.module:function`."""


def is_atari(game: str) -> bool:
    """Whether a game is one of Atari: ids of other environments have a sign in their names."""
    return not re.search('[-/:]', game)


def unit_of(game: str) -> str:
    """What the budget of a run counts: 'frames' of an emulator, or 'steps' elsewhere."""
    return 'frames' if is_atari(game) else 'steps'


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """The environment; of Atari also its preprocessing (Mnih et al. 2015, Methods)."""

    game: str = described(
        'pong',
        'Atari game, such as pong or its Gymnasium ID ALE/Pong-v5; another Gymnasium ID, such as'
        ' CartPole-v1; or module:function, a factory of your own environment (see'
        ' docs/environments.md).',
    )
    action_repeat: int = described(4, 'Emulator frames per agent step (Mnih et al. 2015: 4).')
    frame_stack: int = described(4, 'Frames per observation (Mnih et al. 2015: 4).')
    screen_size: int = described(
        84,
        'Height and width, in pixels, to which an emulator frame is reduced (Mnih et al. 2015: 84).'
        " 42, with a torso of '_half', takes less memory, and less time for each gradient.",
    )
    max_noops: int = described(
        30, 'Maximum number of no-ops at the start of a game (Mnih et al. 2015: 30).'
    )
    max_episode_frames: int = described(
        108_000,
        'Emulator frames after which a training game is cut off (Mnih et al. 2015: 108,000, 30'
        ' minutes).',
    )
    sticky_action_probability: float = described(
        0.0, 'Probability that the emulator repeats the previous action (paper: 0).'
    )
    life_loss_ends_episode: bool = described(
        True, 'The loss of a life ends a training episode (paper, section 5).'
    )
    full_action_space: bool = described(
        False,
        "All 18 actions instead of the game's minimal set (Machado et al. 2018: all; paper:"
        ' minimal).',
    )
    env_processes: bool = described(
        False, 'Step each environment of an actor in a process of its own: for slow simulators.'
    )

    @property
    def is_atari(self) -> bool:
        """Whether `game` is one of Atari."""
        return is_atari(self.game)

    @property
    def unit(self) -> str:
        """See `unit_of`."""
        return unit_of(self.game)

    @property
    def budget_flag(self) -> str:
        """The flag that ends a run, in the same unit."""
        return f'--max_{self.unit}'

    def __post_init__(self) -> None:
        require_from_to(self, 1, 100, 'action_repeat', 'frame_stack')
        require_from_to(self, 36, 210, 'screen_size')  # 36: the least for each torso
        require_at_least(self, 1, 'max_episode_frames')
        require_from_to(self, 0, 10_000, 'max_noops')
        require_fraction(self, 'sticky_action_probability')


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The Q-network."""

    torso: str = described(
        'nature',
        "Convolutions and dense layer for pictures: 'nature' (Mnih et al. 2015), the smaller"
        " 'dqn2013' (Mnih et al. 2013), or 'narrow', which is nature with half the filters and"
        " units and stride 2 in the last convolution. Those with '_half' convolve 4 x 4 pixels"
        ' first in place of 8 x 8, every 2 in place of 4, for --screen_size 42. Pictures too small'
        ' for them get a convolution of 16 filters and a dense layer of 128 (Young and Tian 2019).',
    )
    center_input: bool = described(
        False,
        "Subtract each observation's mean, because a plain background hides motion early in"
        ' training (not in the papers).',
    )
    standardize_input: bool = described(
        False,
        "Subtract each observation's mean and divide by its standard deviation, so that a few"
        ' pixels on a plain background weigh as much as a full picture (not in the papers).',
    )
    centralize_gradient: bool = described(
        False,
        'Subtract from the gradient of each filter of a convolution its mean (Yong et al. 2020), so'
        ' that fewer filters die at large step sizes.',
    )
    negative_slope: float = described(
        0.0,
        "Slope below 0 of the ReLU of dense layers, but for iqn's embedding; with 0.01 units that"
        ' are dead, off in all states, can recover (Maas et al. 2013; Mnih et al. 2015: 0).',
    )
    dueling: bool = described(
        False, 'Separate streams for state value and advantages (Wang et al. 2016).'
    )
    precision: str = described(
        'float32',
        "Numbers in the convolutions: 'float32', 'bfloat16', whose products are faster where the"
        " processor has them (AVX512_BF16, AMX, GPUs) and much slower elsewhere, or 'auto':"
        ' bfloat16 for gradients on a CPU that has them, otherwise float32, also on GPUs and for'
        ' actors and evaluations of their own. Parameters and all else stay float32.',
    )
    dense_layers: str = described(
        '256,256',
        'Units of the dense layers for observations that are no pictures, and for structures.',
    )
    q_network: str = described(
        BUILTIN,
        "'builtin': chosen by the observation; or module:function of a Keras network of your own:"
        ' gets the spec of an observation and the seed, returns what maps a batch to features'
        ' float32 [batch, features]; the heads are put over it.',
    )

    def __post_init__(self) -> None:
        require_choice(self, 'torso', TORSOS)
        require_choice(self, 'precision', (*PRECISIONS, 'auto'))
        require_fraction(self, 'negative_slope')
        known = bool(_LAYERS.fullmatch(self.dense_layers))
        require(self, 'dense_layers', known, 'sizes of layers, such as 256,256')
        known = self.q_network == BUILTIN or bool(FACTORY.fullmatch(self.q_network))
        require(self, 'q_network', known, f'{BUILTIN} or module:function')


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The agent, its loss and the clipping of its gradient."""

    agent: str = described(
        'dqn',
        "'dqn' (Mnih et al. 2015), 'c51' (Bellemare et al. 2017), 'qr_dqn' (Dabney et al. 2018),"
        " 'iqn' (Dabney et al. 2018b, implicit quantile networks), or"
        ' module:function, a factory of your own TF-Agents agent (see docs/tf_agents.md).',
    )
    discount: float = described(0.99, 'Discount per agent step (Mnih et al. 2015: 0.99).')
    n_step: int = described(
        1, 'Agent steps of reward before the bootstrap (Horgan et al. 2018: 3).'
    )
    double_dqn: bool = described(
        False,
        'The online network selects the next action and the target network evaluates it (van'
        ' Hasselt et al. 2016).',
    )
    munchausen: bool = described(
        False,
        "Munchausen target (Vieillard et al. 2020) of 'dqn', 'qr_dqn' or 'iqn', without"
        ' --double_dqn: the log-policy of the action is added to its reward, of n steps to the'
        ' first; the next value is soft.',
    )
    munchausen_temperature: float = described(
        0.03, "Temperature tau of Munchausen's softmax policy (Vieillard et al. 2020: 0.03)."
    )
    munchausen_scale: float = described(
        0.9, 'Factor alpha of the log-policy in the reward (Vieillard et al. 2020: 0.9).'
    )
    munchausen_lowest: float = described(
        -1.0, 'Lowest tau times log-policy, l0 (Vieillard et al. 2020: -1).'
    )
    loss: str = described(
        'huber', "Loss of 'dqn': 'huber' (error clipped, Mnih et al. 2015) or 'squared'."
    )
    num_atoms: int = described(
        51, "Atoms of the return distribution of 'c51' (Bellemare et al. 2017: 51)."
    )
    v_min: float = described(-10.0, "Smallest return of 'c51' (Bellemare et al. 2017: -10).")
    v_max: float = described(10.0, "Largest return of 'c51' (Bellemare et al. 2017: 10).")
    num_quantiles: int = described(200, "Quantiles of 'qr_dqn' (Dabney et al. 2018: 200).")
    num_fractions: int = described(
        8, "Quantiles drawn for each loss of 'iqn', N and N' (Dabney et al. 2018b: 1 to 64)."
    )
    num_acting_fractions: int = described(
        32,
        "Quantiles of 'iqn' whose mean is an action's value, K (Dabney et al. 2018b: 32, drawn;"
        ' here at fixed midpoints).',
    )
    num_cosines: int = described(
        64, "Cosines of the embedding of a fraction of 'iqn', n (Dabney et al. 2018b: 64)."
    )
    gradient_clip_norm: float = described(
        10.0, 'Maximum global norm of a gradient; 0 disables clipping.'
    )

    def __post_init__(self) -> None:
        require_fraction(self, 'discount')
        require_from_to(self, 1, 1000, 'n_step')
        require_at_least(self, 0, 'gradient_clip_norm')
        require_choice(self, 'loss', LOSSES)
        require_from_to(self, 2, 10_000, 'num_atoms')
        require_from_to(self, 1, 10_000, 'num_quantiles', 'num_cosines')
        require_from_to(self, 1, 10_000, 'num_fractions', 'num_acting_fractions')
        require(self, 'v_min', -math.inf < self.v_min < math.inf, 'finite')
        require(self, 'v_max', self.v_min < self.v_max < math.inf, f'above --v_min {self.v_min}')
        known = self.agent in AGENTS or FACTORY.fullmatch(self.agent)
        allowed = f'one of {", ".join(AGENTS)}, or module:function'
        require(self, 'agent', bool(known), allowed)
        require_positive(self, 'munchausen_temperature')
        require_fraction(self, 'munchausen_scale')
        require_from_to(self, -1000, 0, 'munchausen_lowest')
        if self.munchausen and self.agent in AGENTS:
            self._require_soft_target()

    def _require_soft_target(self) -> None:
        if self.agent == 'c51':
            raise ValueError(
                '--munchausen --agent c51: logits of atoms have no soft mean. Fix: use --agent dqn,'
                ' qr_dqn or iqn, or --no-munchausen.'
            )
        if self.double_dqn:
            raise ValueError(
                '--munchausen --double_dqn: a soft value has no best next action to choose. Fix:'
                ' add --no-double_dqn or --no-munchausen.'
            )


@dataclasses.dataclass(frozen=True)
class ActorConfig:
    """Acting: number of environments, exploration, freshness of parameters."""

    envs_per_actor: int = described(
        8,
        'Environments that an actor steps as one batch (paper: 1). More need less CPU time per'
        ' step.',
    )
    actor_pull_period: int = described(
        16,
        'Agent steps of one environment between syncs with the parameter server. Raise it to reduce'
        ' traffic.',
    )
    epsilon_start: float = described(1.0, 'Epsilon before the first update (paper, section 5: 1).')
    epsilon_end: float = described(0.1, 'Epsilon after annealing (paper, section 5: 0.1).')
    epsilon_updates: int = described(
        1_000_000, 'Global updates over which epsilon falls linearly (paper, section 5: 1,000,000).'
    )
    epsilon_ladder: bool = described(
        False,
        'Fix the epsilon of environment i of N at ladder_epsilon^(1 + i/(N-1) ladder_exponent)'
        ' instead of annealing (Horgan et al. 2018, section 4.1).',
    )
    ladder_epsilon: float = described(
        0.4, 'Largest epsilon of the ladder (Horgan et al. 2018, section 4.1: 0.4).'
    )
    ladder_exponent: float = described(
        7.0, 'Exponent alpha of the ladder (Horgan et al. 2018, section 4.1: 7).'
    )
    actor_priorities: bool = described(
        True,
        'Actors compute the first priority of a transition from its error (Horgan et al. 2018);'
        ' otherwise it is 1 (Schaul et al. 2016: the largest so far).',
    )
    clip_reward: bool = described(True, 'Clip training rewards to [-1, 1] (paper).')

    def __post_init__(self) -> None:
        require_from_to(self, 1, 4096, 'envs_per_actor')
        require_at_least(self, 1, 'actor_pull_period')
        require_at_least(self, 0, 'epsilon_updates', 'ladder_exponent')
        require_fraction(self, 'epsilon_start', 'epsilon_end', 'ladder_epsilon')


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Learning: the batch, the freshness of parameters, the outlier test."""

    batch_size: int = described(32, 'Transitions per gradient (Mnih et al. 2015: 32).')
    learner_pull_period: int = described(
        1,
        'Updates between parameter pulls of a learner (paper: not stated). Raise it to reduce'
        ' traffic, at the cost of staleness.',
    )
    overlap_push: bool = described(
        True,
        'Push each gradient while the next is computed. Faster, but adds one update of staleness.',
    )
    pushes_in_flight: int = described(
        1,
        'Pushes of a learner under way at once with overlap_push. For parameter shards that are far'
        ' away, if samples are not what it waits for. With k of them a gradient may be 2 k - 1'
        ' updates older; raise max_staleness with them.',
    )
    batches_in_flight: int = described(
        1,
        'Requests for samples of a learner under way at once at each replay shard. For shards that'
        ' are far away, since each costs a round trip. Each adds a batch that was drawn earlier.',
    )
    learner_device: str = described(
        'auto',
        "Device that computes gradients: 'auto' (a GPU if the learner sees one), 'cpu', 'gpu'"
        " (learners take a machine's GPUs in turn) or 'gpu:N'.",
    )
    outlier_deviations: float = described(
        6.0,
        'Standard deviations above the mean loss at which a gradient is dropped (paper, section'
        ' 4.3: "several"); 0 disables the test.',
    )
    outlier_rule: str = described(
        'lone',
        "'every' drops each outlier (paper, section 4.3), which can hide a rare reward for ever;"
        " 'lone' drops one only if the previous one was kept and lies more than 1 / (1 -"
        ' outlier_decay) losses back.',
    )
    outlier_decay: float = described(
        0.999, 'Decay per update of the running mean and deviation of the loss (not in the paper).'
    )

    importance_exponent_start: float = described(
        0.4,
        'Exponent beta of the importance weights before the first update (Schaul et al. 2016:'
        ' 0.4).',
    )
    importance_exponent_end: float = described(
        1.0, 'Exponent beta of the importance weights after annealing (Schaul et al. 2016: 1).'
    )
    importance_updates: int = described(
        1_000_000,
        'Global updates over which beta rises linearly (Schaul et al. 2016: the whole run).',
    )

    def __post_init__(self) -> None:
        require_from_to(self, 1, 65_536, 'batch_size')
        named = bool(DEVICE.fullmatch(self.learner_device))
        require(self, 'learner_device', named, 'auto, cpu, gpu, or gpu:N')
        require_at_least(self, 1, 'learner_pull_period')
        require_from_to(self, 1, 64, 'pushes_in_flight', 'batches_in_flight')
        require_at_least(self, 0, 'outlier_deviations', 'importance_updates')
        require_choice(self, 'outlier_rule', OUTLIER_RULES)
        require_fraction(self, 'importance_exponent_start', 'importance_exponent_end')
        require(self, 'outlier_decay', 0 <= self.outlier_decay < 1, 'at least 0 and less than 1')
