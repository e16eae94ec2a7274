"""Experiment configuration in; what its environment shows and a replay item holds out.

Without TensorFlow, so that the launcher can start the servers before it imports it.
"""

import functools
from typing import Any

import tree

from agents.config import EnvironmentConfig
from agents.environments.factory import open_environment
from infra.replay.trajectory import FramePart, TrajectorySpec
from pipelines.experiment.config import ExperimentConfig


@functools.cache
def described(environment: EnvironmentConfig) -> tuple[Any, int]:
    """Frames, a `FrameSpec` or a nest of them, and number of actions of an environment.

    Raises:
      GameError, ValueError: it cannot be opened.
    """
    with open_environment(environment, num_environments=1, seed=0) as opened:
        return opened.frame_spec, opened.num_actions


def trajectory_spec(config: ExperimentConfig) -> TrajectorySpec:
    """Shape of a replay item."""
    frame, _ = described(config.environment)
    parts = tree.map_structure(lambda part: FramePart(part.shape, part.dtype), frame)
    return TrajectorySpec(parts, config.environment.frame_stack, config.agent.n_step)
