"""Experiment configuration in; what its environment shows and a replay item holds out.

Without TensorFlow, so that the launcher can start the servers before it imports it.
"""

import functools

from agents.config import EnvironmentConfig
from agents.environments.factory import open_environment
from agents.environments.frames import FrameSpec
from infra.replay.trajectory import TrajectorySpec
from pipelines.experiment.config import ExperimentConfig


@functools.cache
def described(environment: EnvironmentConfig) -> tuple[FrameSpec, int]:
    """Frames and number of actions of an environment.

    Raises:
      GameError, ValueError: it cannot be opened.
    """
    with open_environment(environment, num_environments=1, seed=0) as opened:
        return opened.frame_spec, opened.num_actions


def trajectory_spec(config: ExperimentConfig) -> TrajectorySpec:
    """Shape of a replay item."""
    frame, _ = described(config.environment)
    return TrajectorySpec(
        frame_shape=frame.shape,
        frame_stack=config.environment.frame_stack,
        n_step=config.agent.n_step,
        frame_dtype=frame.dtype,
    )
