"""Somebody else's TF-Agents agent in our learners and actors: `module:function` in, a Model out.

The factory is called as `function(time_step_spec, action_spec, config)` with TF-Agents' tensor
specs and this project's `AgentConfig`, in every process of a run; it returns a `TFAgent` for one
discrete action, without recurrent state, whose `loss` can be differentiated. Its optimizer is never
used: the parameter server has the optimizer. Its target networks, if any, are those that its
`initialize` makes equal to its own.

What is asked of the agent is found out by trying it once on random transitions, `loss`'s ways with
the discount included: a loss that takes `gamma` is given 1, since a transition's discount already
holds gamma^n; one that multiplies by the agent's `_gamma` gets the discount divided by it.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts
from tf_agents.trajectories import trajectory

from agents.config import AgentConfig
from agents.model import Losses, Model, tf_agents_transition
from infra.replay.trajectory import Transition

_PROBE_ROWS = 4
_BRIEF_LENGTH = 300

Loss = Callable[[Transition, Any], Losses]
Experience = Callable[[Transition], Any]
"""Our transition as what an agent's `loss` takes."""


class ForeignAgentError(ValueError):
    """The factory, or the agent it makes, cannot be used; the message says why."""


def foreign_model(
    name: str,
    time_step_spec: ts.TimeStep,
    action_spec: Any,
    config: AgentConfig,
    seed: int,
    weighted: bool,
) -> Model:
    """The model of the agent that the factory `name` makes.

    Args:
      name: `module:function`.
      time_step_spec, action_spec: array or tensor specs, without batch dimension.
      config: handed to the factory.
      seed: of Keras' and TensorFlow's random numbers while the factory runs.
      weighted: whether its loss will be given weights.

    Raises:
      ForeignAgentError: there is no such factory, or its agent does not qualify.
    """
    tf.keras.utils.set_random_seed(seed % 2**32)
    specs = tensor_spec.from_spec(time_step_spec), tensor_spec.from_spec(action_spec)
    factory = load_factory(name)
    try:
        agent = factory(*specs, config)
    except (Exception, SystemExit) as error:  # whatever somebody else's code raises
        raise ForeignAgentError(f'{name} failed: {brief(error)}') from error
    if not isinstance(agent, tf_agent.TFAgent):
        raise ForeignAgentError(f'{name} returned a {type(agent).__name__}, not a TFAgent')
    if agent.policy.policy_state_spec:
        raise ForeignAgentError(f'{name}: its policy has a recurrent state, which is not kept here')
    _require_specs(name, agent, *specs)
    agent.initialize()
    probe = _Probe(name, agent)
    loss = probe.loss()
    variables = probe.trained_variables(loss)
    probe.check_untrained_variables(loss, variables)
    if weighted:
        probe.check_weights(loss)
    return Model(agent, variables, loss, lambda observation: _best_action(agent, observation))


def _require_specs(
    name: str, agent: tf_agent.TFAgent, time_step_spec: ts.TimeStep, action_spec: Any
) -> None:
    """
    Raises:
      ForeignAgentError: the agent takes other observations, or chooses among other actions.
    """
    theirs, ours = agent.time_step_spec.observation, time_step_spec.observation
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        raise ForeignAgentError(f'{name}: its observations are {theirs}, those of the game {ours}')
    bounds = [
        (spec.shape, spec.dtype, int(np.min(spec.minimum)), int(np.max(spec.maximum)))
        for spec in (agent.action_spec, action_spec)
    ]
    if bounds[0] != bounds[1]:
        raise ForeignAgentError(
            f'{name}: its actions are {agent.action_spec}, those of the game {action_spec};'
            ' build it with the specs that the factory is given'
        )


def load_factory(name: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
      ForeignAgentError: it cannot be imported.
    """
    module_name, _, function = name.partition(':')
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever somebody else's code raises
        missing = isinstance(error, ModuleNotFoundError) and error.name in module_name.split('.')
        remedy = '; put its directory on PYTHONPATH' if missing else ''
        reason = f'cannot import {module_name} ({brief(error)})'
        raise ForeignAgentError(f'{name}: {reason}{remedy}') from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ForeignAgentError(f'{name}: {module_name} has no function {function}')
    return factory


@dataclasses.dataclass(frozen=True)
class _Probe:
    """An agent and how to try it."""

    name: str
    agent: tf_agent.TFAgent

    def loss(self) -> Loss:
        """A loss that takes our transitions, given as whichever experience the agent takes.

        Raises:
          ForeignAgentError: it takes neither a Transition nor a Trajectory, or no one can tell what
            it does with the discount.
        """
        problems = []
        for experience in (tf_agents_transition, two_step_trajectory):
            try:
                return self._discounting_once(experience)
            except ForeignAgentError:
                raise
            except Exception as error:  # whatever the agent's own code raises
                problems.append(f'{experience.__name__}: {brief(error)}')
        raise ForeignAgentError(
            f'{self.name}: its loss takes neither form of experience ({"; ".join(problems)})'
        )

    def _discounting_once(self, experience: Experience) -> Loss:
        """The loss that takes a transition's discount as it is, which holds gamma^n."""
        arguments: dict[str, Any] = {}
        if self._takes('reward_scale_factor') and hasattr(self.agent, '_reward_scale_factor'):
            # TF-Agents' `loss` would take 1 instead of the agent's own.
            arguments['reward_scale_factor'] = self.agent._reward_scale_factor
        if self._takes('gamma'):
            whole, half = (
                _loss_of(self.agent, experience, {**arguments, 'gamma': gamma})
                for gamma in (1.0, 0.5)
            )
            if whole(self._transition(), None).weighted != half(self._transition(), None).weighted:
                return whole
        gamma = getattr(self.agent, '_gamma', None)
        if gamma is None:
            raise ForeignAgentError(
                f'{self.name}: its loss takes no gamma and the agent has no _gamma, so what it'
                ' multiplies discounts by is not known; give it the attribute (1.0 for nothing)'
            )
        return _loss_of(self.agent, experience, arguments, 1.0 / (gamma or 1.0))

    def _takes(self, name: str) -> bool:
        """Whether the loss can be given an argument of the name, to look at or to hand on."""
        parameters = inspect.signature(self.agent._loss).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds

    def trained_variables(self, loss: Loss) -> tuple[tf.Variable, ...]:
        """The variables that the loss has gradients for, in the order of their creation.

        Raises:
          ForeignAgentError: there are none, or one is not float32.
        """
        with tf.GradientTape() as tape:
            value = loss(self._transition(), None).weighted
        watched = tape.watched_variables()
        gradients = tape.gradient(value, watched)
        trained = tuple(v for v, g in zip(watched, gradients) if g is not None)
        if not trained:
            raise ForeignAgentError(f'{self.name}: its loss has a gradient for no variable')
        for variable in trained:
            if variable.dtype != tf.float32:
                raise ForeignAgentError(
                    f'{self.name}: {variable.name} is {variable.dtype.name}; the parameter server'
                    ' holds float32'
                )
        return trained

    def check_untrained_variables(self, loss: Loss, trained: tuple[tf.Variable, ...]) -> None:
        """
        Raises:
          ForeignAgentError: the policy needs variables that change without a gradient, such as
            the statistics of a batch normalisation: the parameter server would not hand them on.
        """
        known = {variable.ref() for variable in trained}
        others = [v for v in self.agent.policy.variables() if v.ref() not in known]
        before = [v.numpy() for v in others]
        loss(self._transition(), None)
        moved = [v.name for v, old in zip(others, before) if not np.array_equal(v.numpy(), old)]
        if moved:
            raise ForeignAgentError(
                f'{self.name}: {", ".join(moved)} change without a gradient, and the parameter'
                ' server holds trained variables only; use a layer without running statistics'
                ' (LayerNormalization, say)'
            )

    def check_weights(self, loss: Loss) -> None:
        """
        Raises:
          ForeignAgentError: the loss does not look at weights, or tells no errors of the rows.
        """
        transition = self._transition()
        weights = (tf.fill([_PROBE_ROWS], weight) for weight in (0.0, 1.0))
        without, whole = (loss(transition, each) for each in weights)
        if whole.weighted == without.weighted or np.unique(whole.error).size == 1:
            raise ForeignAgentError(
                f'{self.name}: its loss ignores weights or has no td_error or td_loss in its extra,'
                ' which prioritized replay needs; use --priority_exponent 0'
            )

    def _transition(self) -> Transition:
        """Random rows, the same at each call."""
        rng = np.random.default_rng(0)
        spec = self.agent.time_step_spec.observation
        shape = (_PROBE_ROWS, *spec.shape)
        frames = [tf.constant(rng.integers(256, size=shape, dtype=np.uint8)) for _ in range(2)]
        num_actions = int(self.agent.action_spec.maximum) + 1
        action = tf.constant(rng.integers(num_actions, size=_PROBE_ROWS), tf.int32)
        reward = tf.constant(rng.normal(size=_PROBE_ROWS), tf.float32)
        return Transition(frames[0], action, reward, tf.fill([_PROBE_ROWS], 0.9), frames[1])


def two_step_trajectory(transition: Any) -> trajectory.Trajectory:
    """Our transition as a Trajectory [B, 2], for agents whose loss takes nothing else."""

    def twice(x: tf.Tensor) -> tf.Tensor:
        return tf.stack([x, x], axis=1)

    middle = tf.ones_like(twice(transition.action))
    return trajectory.Trajectory(
        step_type=middle,
        observation=tf.stack([transition.observation, transition.next_observation], axis=1),
        action=twice(transition.action),
        policy_info=(),
        next_step_type=middle,
        reward=twice(transition.reward),
        discount=twice(transition.discount),
    )


def _loss_of(
    agent: tf_agent.TFAgent, experience: Experience, arguments: Any, discount_scale: float = 1.0
) -> Loss:
    """The agent's loss of our transitions."""

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


def _told(info: tf_agent.LossInfo, name: str) -> tf.Tensor | None:
    """What an agent tells of each row under the name, [B]; None: nothing."""
    told = getattr(info.extra, name, None)
    return told if isinstance(told, tf.Tensor) and told.shape.rank == 1 else None


def _best_action(agent: tf_agent.TFAgent, observation: tf.Tensor) -> tf.Tensor:
    rows = tf.shape(observation)[:1]
    time_step = ts.TimeStep(
        tf.fill(rows, ts.StepType.MID), tf.zeros(rows), tf.ones(rows), observation
    )
    return tf.cast(agent.policy.action(time_step).action, tf.int32)


def brief(error: BaseException) -> str:
    """An error on one line, cut to a length that can be read."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:_BRIEF_LENGTH]}'
