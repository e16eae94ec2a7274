"""Experiment configuration in; model, gradient, policy and behaviour out."""

from typing import Any

import numpy as np
import tensorflow as tf

from agents import custom_agent, device, dqn, exploration, model, networks, py_environment
from agents.actor_priorities import InitialPriorities
from agents.config import FACTORY, EnvironmentConfig
from agents.custom_loss import no_graph
from agents.exploration import Behaviour
from agents.gradient import AgentGradient
from agents.model import Model
from agents.munchausen import munchausen_of
from agents.policy import GreedyPolicy
from infra.parameter_server.layout import Layout
from infra.replay.trajectory import Transition
from pipelines.experiment.config import ExperimentConfig, replace
from pipelines.experiment.frames import described


def build_model(config: ExperimentConfig) -> Model:
    """Builds the agent, with initial parameters determined by the experiment's seed.

    All processes build equal parameters, so any of them may initialise the parameter server.

    Raises:
      ForeignAgentError: the custom agent is not supported.
      NetworkError: the user's network is unusable.
    """
    specs = specs_of(config.environment)
    seed = config.run.seed
    if FACTORY.fullmatch(config.agent.agent):
        weighted = config.replay.prioritized
        return custom_agent.foreign_model(config.agent.agent, *specs, config.agent, seed, weighted)
    return model.family_model(dqn.make_agent(config.agent, config.network, *specs, seed=seed))


def specs_of(environment: EnvironmentConfig) -> tuple[Any, Any]:
    """TF-Agents' specs of time steps and actions, without batch dimension."""
    frame, num_actions = described(environment)
    return py_environment.specs(frame, environment.frame_stack, num_actions)


def try_agent(config: ExperimentConfig) -> None:
    """Runs the calls of learners and actors once on a dummy batch.

    Raises:
      ForeignAgentError: the agent cannot be built, its loss or policy cannot be traced, or its
        gradient is not finite.
      NetworkError: the network cannot be built or traced, or training leaves variables of it as
        they are.
    """
    name, network = config.agent.agent, config.network.q_network
    foreign = FACTORY.fullmatch(name)
    model = build_model(config)
    if not foreign:
        _require_all_trained(model, network)
    try:
        gradient = _first_gradient(model, config)
    except Exception as error:  # custom code may raise anything
        if foreign:
            raise custom_agent.ForeignAgentError(f'{name}: {no_graph(error)}') from error
        fault = f'--q_network {network}: {no_graph(error)}. Fix: correct it.'
        raise networks.NetworkError(fault) from error
    if foreign and not np.isfinite(gradient).all():
        raise custom_agent.ForeignAgentError(
            f'{name}: the first gradient is not finite, so the parameter server would reject it'
        )


def _require_all_trained(model: Model, name: str) -> None:
    """
    Raises:
      NetworkError: the user's network `name` has variables that training leaves as they are.
    """
    if untrained := model.agent.q_network.untrained():
        raise networks.NetworkError(
            f'--q_network {name}: {", ".join(untrained)} would keep their first values, since only'
            ' gradients change variables here. Fix: use LayerNormalization in place of'
            ' BatchNormalization, make all layers trainable, and return the Keras model itself.'
        )


def _first_gradient(model: Model, config: ExperimentConfig) -> np.ndarray:
    """Traces loss and policy; returns the gradient on a batch of zeros."""
    weighted = config.replay.prioritized
    rows = 2
    frames = tf.nest.map_structure(
        lambda spec: np.zeros((rows, *spec.shape[1:]), spec.dtype.as_numpy_dtype),
        model.observations,
    )
    numbers = np.ones(rows, np.float32)
    transition = Transition(frames, np.zeros(rows, np.int32), numbers, numbers, frames)
    learner = AgentGradient(model, config.agent.gradient_clip_norm, weighted)
    gradient, *_ = learner.gradient(transition, numbers if weighted else None)
    learner.set_target(learner.parameters())
    GreedyPolicy(model).act(frames)
    return gradient


def build_learner(config: ExperimentConfig, device_name: str = device.HOST) -> AgentGradient:
    """Builds the gradient computation of a learner on the named device.

    Here `--precision auto` is decided. Policies of their own, which must act alike everywhere, have
    float32; a bundle's actor shares its learner's network.
    """
    precision = device.precision(config.network.precision, device_name)
    config = replace(config, {'precision': precision})
    weighted = config.replay.prioritized
    with tf.device(device_name):
        return AgentGradient(build_model(config), config.agent.gradient_clip_norm, weighted)


def build_policy(config: ExperimentConfig) -> GreedyPolicy:
    """Builds the greedy policy, on the host: batches of eight are too small for a GPU."""
    with tf.device(device.HOST):
        return GreedyPolicy(build_model(config))


def build_behaviour(
    config: ExperimentConfig, policy: GreedyPolicy, actor: int, num_actions: int
) -> Behaviour:
    """Builds the behaviour of actor number `actor`."""
    acting = config.actor
    if acting.epsilon_ladder:
        epsilon = exploration.ladder(acting, actor, config.run.num_actors)
    else:
        epsilon = exploration.annealed(acting)
    head = policy.model.head
    priorities = None
    if config.replay.prioritized and acting.actor_priorities and head is not None:
        munchausen = munchausen_of(config.agent)
        priorities = InitialPriorities(head, config.agent.n_step, config.agent.discount, munchausen)
    return Behaviour(policy, epsilon, num_actions, priorities)


def layout_of(network: AgentGradient | GreedyPolicy) -> Layout:
    """Layout of the network's variables on the parameter server."""
    return Layout.from_variables(network.variables)
