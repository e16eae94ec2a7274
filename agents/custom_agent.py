"""Loads a user's TF-Agents agent: `module:function` in, a Model for learners and actors out.

Every process of a run calls the factory as `function(time_step_spec, action_spec, config)`, with
TF-Agents' tensor specs and this project's `AgentConfig`. The factory returns a `TFAgent` for one
discrete action, without recurrent state, whose `loss` is differentiable. The agent's own optimizer
is unused, because the parameter server applies the gradients. `initialize` must copy the agent's
networks to its target networks, if it has any.

agents/custom_loss.py checks the agent on random transitions. It also finds how `loss` applies the
discount. A loss that multiplies by an argument `gamma` is passed 1, because a transition's discount
already holds gamma^n. A loss that multiplies by the agent's `_gamma` receives the discount divided
by `_gamma`.
"""

from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts

from agents.config import AgentConfig
from agents.custom_loss import Unusable, probe
from agents.model import Model
from agents.py_environment import same_arrays
from infra.named_function import NoFunctionError, brief, load_function


class ForeignAgentError(ValueError):
    """The factory, or the agent that it returns, is unusable; the message gives the reason."""


def foreign_model(
    name: str,
    time_step_spec: ts.TimeStep,
    action_spec: Any,
    config: AgentConfig,
    seed: int,
    weighted: bool,
) -> Model:
    """Builds the model of the agent that the factory `name` returns.

    Args:
      name: `module:function`.
      time_step_spec, action_spec: array or tensor specs, without batch dimension.
      config: passed to the factory.
      seed: seeds Keras' and TensorFlow's random numbers while the factory runs.
      weighted: whether the loss receives importance weights.

    Raises:
      ForeignAgentError: the factory does not exist or fails, or its agent is unusable.
    """
    tf.keras.utils.set_random_seed(seed % 2**32)
    specs = tensor_spec.from_spec(time_step_spec), tensor_spec.from_spec(action_spec)
    try:
        agent = load_function(name)(*specs, config)
    except NoFunctionError as error:
        raise ForeignAgentError(str(error)) from error
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ForeignAgentError(f'{name} failed: {brief(error)}') from error
    if not isinstance(agent, tf_agent.TFAgent):
        raise ForeignAgentError(f'{name} returned a {type(agent).__name__}, not a TFAgent')
    if agent.policy.policy_state_spec:
        raise ForeignAgentError(f'{name}: its policy has a recurrent state, which is not kept here')
    _require_specs(name, agent, *specs)
    agent.initialize()
    try:
        loss, variables = probe(agent, weighted)
    except Unusable as problem:
        raise ForeignAgentError(f'{name}: {problem}') from problem
    tf.keras.utils.set_random_seed(seed % 2**32)  # undoes the effect of the probe
    return Model(agent, variables, loss, lambda observation: _best_action(agent, observation))


def _require_specs(
    name: str, agent: tf_agent.TFAgent, time_step_spec: ts.TimeStep, action_spec: Any
) -> None:
    """
    Raises:
      ForeignAgentError: the agent's observation or action spec differs from the game's.
    """
    theirs, ours = agent.time_step_spec.observation, time_step_spec.observation
    if not same_arrays(theirs, ours):
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


def _best_action(agent: tf_agent.TFAgent, observation: Any) -> tf.Tensor:
    rows = tf.shape(tf.nest.flatten(observation)[0])[:1]
    time_step = ts.TimeStep(
        tf.fill(rows, ts.StepType.MID), tf.zeros(rows), tf.ones(rows), observation
    )
    return tf.cast(agent.policy.action(time_step).action, tf.int32)
