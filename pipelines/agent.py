"""The agent of an experiment: configuration in, network, gradient and policy out."""

from agents import dqn, py_environment
from agents.environment import AtariEnvironment
from infra.parameter_server.layout import Layout
from infra.replay.trajectory import TrajectorySpec
from pipelines.config import ExperimentConfig


def build_agent(config: ExperimentConfig) -> dqn.DqnAgent:
    """The TF-Agents agent of `config`, its first parameters given by the experiment's seed.

    Every process that builds it gets the same parameters, so whoever initialises the parameter
    server first writes what any other would have written.
    """
    with AtariEnvironment(config.environment, num_environments=1, seed=0) as environment:
        num_actions = environment.num_actions
    return dqn.make_agent(
        config.agent,
        config.network,
        py_environment.time_step_spec(config.environment),
        py_environment.action_spec(num_actions),
        seed=config.run.seed,
    )


def build_learner(config: ExperimentConfig) -> dqn.DqnLearner:
    """What computes a learner's gradients."""
    return dqn.DqnLearner(build_agent(config), config.agent.gradient_clip_norm)


def build_policy(config: ExperimentConfig) -> dqn.GreedyPolicy:
    """What chooses an actor's greedy actions."""
    return dqn.GreedyPolicy(build_agent(config).q_network)


def layout_of(network: dqn.DqnLearner | dqn.GreedyPolicy) -> Layout:
    """The order in which the parameter server holds the network's variables."""
    return Layout.from_variables(network.variables)


def trajectory_spec(config: ExperimentConfig) -> TrajectorySpec:
    """The shape of what the replay stores."""
    return TrajectorySpec(frame_stack=config.environment.frame_stack, n_step=config.agent.n_step)
