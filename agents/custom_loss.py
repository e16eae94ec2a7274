"""Probes the loss of a user's agent: TF-Agents agent in, loss function and trained variables out.

Trials run with random variables, target networks equal to them, and the same noise (dropout, noisy
layers) each time. Random variables prevent that zero-initialised layers hide an effect; fixed noise
prevents that chance looks like one. The probe restores the agent's state at the end.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.trajectories import trajectory

from agents.model import Losses, tf_agents_transition
from infra.named_function import brief
from infra.replay.trajectory import Transition

_ROWS = 8
_SEED = 0  # of the trials' random numbers; any value does
# Tolerances relative to a change of the loss, and to the loss itself (float32 rounding). A real
# effect has relative size 1, far above both.
_SAME = 1e-2
_ROUNDING = 1e-6

Loss = Callable[[Transition, Any], Losses]
Experience = Callable[[Transition], Any]
"""Converts our transition to the form that an agent's `loss` takes."""


class Unusable(ValueError):
    """The agent is unusable here; the message gives the reason."""


def probe(agent: tf_agent.TFAgent, weighted: bool) -> tuple[Loss, tuple[tf.Variable, ...]]:
    """Finds an agent's loss on our transitions and the variables that it trains.

    The returned loss takes transitions whose discount already holds gamma^n. The variables are in
    the order of their creation.

    Args:
      agent: initialised.
      weighted: whether the loss receives importance weights.

    Raises:
      Unusable: the loss accepts neither a Transition nor a Trajectory; it trains no variable, one
        that is not float32, or the agent has one distributed over devices; it changes variables
        without a gradient; its use of the discount is unclear; or it ignores weights that it
        receives.
    """
    arguments: dict[str, Any] = {}
    if takes(agent, 'reward_scale_factor') and hasattr(agent, '_reward_scale_factor'):
        # TF-Agents' `loss` defaults to 1, not to the agent's own factor.
        arguments['reward_scale_factor'] = agent._reward_scale_factor
    transition, state = _random_transition(agent), variables_of(agent)
    with _functions_as_python(), _kept(state):
        experience = _taken_experience(agent, arguments, transition)
        plain = _loss_of(agent, experience, arguments)
        variables = trained_variables(lambda: plain(transition, None).weighted)
        with _laboratory(agent, variables, state) as freeze:
            _check_variables(agent, variables, lambda: plain(transition, None))
            trials = _Trials(agent, experience, arguments, transition, freeze)
            more, scale = trials.discounting()
            if weighted:
                trials.check_weights()
    return _loss_of(agent, experience, {**arguments, **more}, scale), variables


def takes(agent: tf_agent.TFAgent, name: str) -> bool:
    """Whether the loss accepts an argument of this name, by itself or through **kwargs."""
    parameters = inspect.signature(agent._loss).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _loss_of(
    agent: tf_agent.TFAgent, experience: Experience, arguments: Any, discount_scale: float = 1.0
) -> Loss:
    """Wraps the agent's loss to take our transitions."""

    def loss(transition: Transition, weights: Any) -> Losses:
        scaled = transition._replace(discount=transition.discount * discount_scale)
        info = agent.loss(experience(scaled), weights=weights, training=True, **arguments)
        mean = tf.fill(tf.shape(transition.reward), info.loss)
        rows = _told(info, 'td_loss')
        error = _told(info, 'td_error')
        if error is None:
            error = rows
        rows, error = (mean if told is None else told for told in (rows, error))
        return Losses(info.loss, rows, tf.abs(error))

    return loss


def _taken_experience(
    agent: tf_agent.TFAgent, arguments: Any, transition: Transition
) -> Experience:
    """
    Raises:
      Unusable: the loss takes neither a Transition nor a Trajectory.
    """
    problems = []
    for experience in (tf_agents_transition, two_step_trajectory):
        try:
            _loss_of(agent, experience, arguments)(transition, None)
            return experience
        except Exception as error:  # the agent's code may raise anything
            problems.append(f'{experience.__name__}: {brief(error)}')
    raise Unusable(f'its loss takes neither form of experience ({"; ".join(problems)})')


def _check_variables(
    agent: tf_agent.TFAgent, trained: tuple[tf.Variable, ...], lose: Callable[[], Any]
) -> None:
    """
    Raises:
      Unusable: the loss itself changes variables, such as running statistics of batch
        normalisation, which the parameter server does not distribute, or trained ones, which it
        alone may change.
    """
    variables = [*{v.ref(): v for v in (*trained, *agent.policy.variables())}.values()]
    before = [v.numpy() for v in variables]
    lose()
    moved = [v.name for v, old in zip(variables, before) if not np.array_equal(v.numpy(), old)]
    if moved:
        raise Unusable(
            f'{", ".join(moved)} change without a gradient, but the parameter server alone changes'
            ' variables, and holds only trained ones; use a layer without running statistics'
            ' (LayerNormalization, say), and assign to none in the loss'
        )


class _Trials:
    """Repeats the loss at the same random variables, with changed arguments (see `_laboratory`)."""

    def __init__(
        self,
        agent: tf_agent.TFAgent,
        experience: Experience,
        arguments: dict[str, Any],
        transition: Transition,
        freeze: Callable[[], None],
    ) -> None:
        """
        Raises:
          Unusable: two equal trials differ, or the loss is not finite.
        """
        self._agent = agent
        self._experience = experience
        self._arguments = arguments
        self._transition = transition
        self._freeze = freeze
        first, second = self._numbers(), self._numbers()
        self._noise = np.abs(first - second).max()  # from sums in no fixed order on some devices
        if not np.isfinite(first).all():
            raise Unusable('its loss is not finite at random variables; check the network')
        if self._noise > _SAME * np.abs(first).max():
            raise Unusable(
                'its loss is not the same at the same variables, experience and seed; draw its'
                " noise from TensorFlow's random numbers, or from a generator that is an attribute"
            )

    def discounting(self) -> tuple[dict[str, Any], float]:
        """Finds arguments and a discount scale with which the loss applies only our discount.

        Raises:
          Unusable: the loss's use of the discount is unclear.
        """
        arguments = {}
        if takes(self._agent, 'gamma') and self._multiplies_by('gamma', self._of_argument):
            arguments['gamma'] = 1.0
        own = getattr(self._agent, '_gamma', None)
        if own is not None and self._multiplies_by('_gamma', self._of_attribute):
            return arguments, 1.0 / (float(own) or 1.0)
        if not arguments and own != 1.0 and self._differ(self._numbers(), self._numbers(2.0)):
            raise Unusable(
                'its loss takes no gamma and the agent has no _gamma that it multiplies by, so what'
                ' it multiplies discounts by is not known; use self._gamma (set it to 1.0 where'
                ' nothing is multiplied)'
            )
        return arguments, 1.0

    def check_weights(self) -> None:
        """
        Raises:
          Unusable: the loss ignores the rows' weights, or reports no error per row.
        """
        odd = np.arange(_ROWS, dtype=np.float32) % 2
        one, other = (self._losses(weights=tf.constant(w)) for w in (odd, 1.0 - odd))
        same = not self._differ(one.weighted.numpy(), other.weighted.numpy())
        if same or np.unique(one.error).size == 1:
            raise Unusable(
                'its loss ignores weights or has no td_error or td_loss in its extra, which'
                ' prioritized replay needs; use --priority_exponent 0'
            )

    def _multiplies_by(self, name: str, numbers_at: Callable[[float, float], np.ndarray]) -> bool:
        """Whether the loss multiplies discounts by the quantity `name`.

        Halving the quantity must change the loss, and doubling the discounts must undo the change.

        Raises:
          Unusable: the quantity changes the loss in another way.
        """
        whole, half = numbers_at(1.0, 1.0), numbers_at(0.5, 1.0)
        if not self._differ(whole, half):
            return False
        tolerance = _SAME * np.abs(whole - half).max() + _ROUNDING * np.abs(whole).max()
        if self._differ(whole, numbers_at(0.5, 2.0), tolerance):
            raise Unusable(
                f'its loss uses {name} otherwise than as a factor of the discount, so what it makes'
                ' of a discount that holds gamma^n is not known'
            )
        return True

    def _of_argument(self, gamma: float, discount_scale: float) -> np.ndarray:
        return self._numbers(discount_scale, gamma=gamma)

    def _of_attribute(self, gamma: float, discount_scale: float) -> np.ndarray:
        own = self._agent._gamma
        try:
            self._agent._gamma = gamma
        except AttributeError as error:
            raise Unusable(
                'its _gamma cannot be set, so whether its loss multiplies by it is not known; make'
                ' it a plain attribute'
            ) from error
        try:
            return self._numbers(discount_scale)
        finally:
            self._agent._gamma = own

    def _numbers(self, discount_scale: float = 1.0, **arguments: Any) -> np.ndarray:
        losses = self._losses(discount_scale, **arguments)
        return np.concatenate([np.ravel(value) for value in losses])

    def _losses(
        self, discount_scale: float = 1.0, weights: tf.Tensor | None = None, **arguments: Any
    ) -> Losses:
        self._freeze()
        arguments = {**self._arguments, **arguments}
        loss = _loss_of(self._agent, self._experience, arguments, discount_scale)
        return loss(self._transition, weights)

    def _differ(self, one: np.ndarray, other: np.ndarray, tolerance: float = 0.0) -> bool:
        return bool(np.abs(one - other).max() > tolerance + 10 * self._noise)


def trained_variables(value: Callable[[], tf.Tensor]) -> tuple[tf.Variable, ...]:
    """Variables with a gradient of `value`, in the order of their creation.

    Traces the graph instead of computing it, so layers that are skipped at random count too.

    Raises:
      Unusable: no variable has a gradient, one is not float32, or tracing fails.
    """
    found: list[tf.Variable] = []

    def trace() -> None:
        with tf.GradientTape() as tape:
            result = value()
        watched = tape.watched_variables()
        gradients = tape.gradient(result, watched)
        found.extend(v for v, gradient in zip(watched, gradients) if gradient is not None)

    try:
        tf.function(trace, autograph=False).get_concrete_function()
    except Exception as error:  # the agent's code may raise anything
        raise Unusable(no_graph(error)) from error
    if not found:
        raise Unusable('its loss has a gradient for no variable')
    for variable in found:
        if variable.dtype != tf.float32:
            raise Unusable(
                f'{variable.name} is {variable.dtype.name}; the parameter server holds float32'
            )
    return tuple(found)


def variables_of(agent: tf_agent.TFAgent) -> list[tf.Variable]:
    """All variables reachable from the agent's attributes: networks, counters, generator states.

    Raises:
      Unusable: a variable is distributed over devices.
    """
    reached = tf.train.TrackableView(agent).descendants()
    variables = [v for v in reached if isinstance(v, tf.Variable)]
    for variable in variables:
        if isinstance(variable, tf.distribute.DistributedValues):
            raise Unusable(
                f'{variable.name} belongs to a tf.distribute strategy; a learner computes on one'
                " device: build the agent outside the strategy's scope"
            )
    return variables


@contextlib.contextmanager
def _functions_as_python() -> Iterator[None]:
    """Runs tf.functions eagerly, so that trials leave no cached trace."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def _kept(variables: Sequence[tf.Variable]) -> Iterator[Callable[[], None]]:
    """Restores the variables' initial values on exit; yields a function that does so at once."""
    values = [variable.numpy() for variable in variables]

    def put_back() -> None:
        for variable, value in zip(variables, values):
            variable.assign(value)

    try:
        yield put_back
    finally:
        put_back()


@contextlib.contextmanager
def _laboratory(
    agent: tf_agent.TFAgent, trained: Sequence[tf.Variable], state: Sequence[tf.Variable]
) -> Iterator[Callable[[], None]]:
    """Sets variables at random and targets equal to them; restores all of them on exit.

    Yields a function that resets variables and random seeds, so that every trial starts alike.

    Args:
      agent: its `initialize` sets the targets.
      trained: variables to set at random.
      state: all variables that the agent may change.
    """
    with _kept(trained):
        for number, variable in enumerate(trained):
            variable.assign(_random(variable.shape, number))
        agent.initialize()
        with _kept([*trained, *state]) as put_back:

            def freeze() -> None:
                put_back()
                tf.keras.utils.set_random_seed(_SEED)

            yield freeze


def _random(shape: tf.TensorShape, number: int) -> tf.Tensor:
    """Random values of a scale at which a layer neither explodes nor vanishes.

    Values of rank below 2 (biases, scales) are positive, in case the layer takes their root or
    logarithm.
    """
    if shape.rank < 2:
        return tf.random.stateless_uniform(shape, (_SEED, number), 0.25, 1.0)
    fan_in = shape.num_elements() / shape[-1]
    return tf.random.stateless_normal(shape, (_SEED, number), stddev=fan_in**-0.5)


def _random_transition(agent: tf_agent.TFAgent) -> Transition:
    """A batch of different rows. Half have no reward, so their loss depends on next values."""
    rng = np.random.default_rng(_SEED)

    def random(spec: tf.TensorSpec) -> tf.Tensor:
        return tf.cast(rng.integers(256, size=(_ROWS, *spec.shape), dtype=np.uint8), spec.dtype)

    frames = [tf.nest.map_structure(random, agent.time_step_spec.observation) for _ in range(2)]
    num_actions = int(agent.action_spec.maximum) + 1
    action = tf.constant(rng.integers(num_actions, size=_ROWS), tf.int32)
    reward = rng.normal(size=_ROWS) * (np.arange(_ROWS) % 2)
    discount = rng.uniform(0.25, 0.5, size=_ROWS)  # doubled, it is still at most 1
    return Transition(
        frames[0],
        action,
        tf.constant(reward, tf.float32),
        tf.constant(discount, tf.float32),
        frames[1],
    )


def two_step_trajectory(transition: Any) -> trajectory.Trajectory:
    """Our transition as a Trajectory [B, 2], for agents whose loss takes only trajectories."""

    def twice(x: tf.Tensor) -> tf.Tensor:
        return tf.stack([x, x], axis=1)

    def paired(now: tf.Tensor, following: tf.Tensor) -> tf.Tensor:
        return tf.stack([now, following], axis=1)

    middle = tf.ones_like(twice(transition.action))
    return trajectory.Trajectory(
        step_type=middle,
        observation=tf.nest.map_structure(
            paired, transition.observation, transition.next_observation
        ),
        action=twice(transition.action),
        policy_info=(),
        next_step_type=middle,
        reward=twice(transition.reward),
        discount=twice(transition.discount),
    )


def _told(info: tf_agent.LossInfo, name: str) -> tf.Tensor | None:
    """The value [B] per row that the loss reports as `name`, None if there is no such value."""
    told = getattr(info.extra, name, None)
    return told if isinstance(told, tf.Tensor) and told.shape.rank == 1 else None


def no_graph(error: BaseException) -> str:
    """Message for an agent whose code cannot be traced as a graph."""
    return (
        f'it cannot be run in a graph without AutoGraph, as workers do ({brief(error)}); use'
        ' TensorFlow operations in place of Python ifs and loops over tensors, and of .numpy()'
    )
