"""Tries an environment outside Atari before a run: its configuration in, its frames out."""

import dataclasses
import threading
from typing import Any

import numpy as np

from agents.config import EnvironmentConfig
from agents.environments.errors import EnvironmentFailedError
from agents.environments.factory import open_environment

_QUIET_SECONDS = 5.0


class Trial(threading.Thread):
    """Opens, resets and steps an environment in a thread, which may be left alone if it hangs."""

    def __init__(self, environment: EnvironmentConfig, seed: int) -> None:
        super().__init__(name='trial', daemon=True)
        self._config = dataclasses.replace(environment, env_processes=False)
        self._seed = seed
        self._doing = 'opening'
        self._frames: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Takes a step; keeps what it found."""
        try:
            with open_environment(self._config, num_environments=1, seed=self._seed) as opened:
                self._doing = 'reset()'
                opened.reset()
                self._doing = 'step()'
                opened.step_frames(np.zeros(1, np.int32))
                self._frames = opened.frame_spec
                self._doing = 'close()'
        except BaseException as error:  # raised again in the thread that asked
            self._error = error

    def frames(self, hang_seconds: float) -> Any:
        """What the environment shows, a `FrameSpec` or a nest of them.

        Args:
          hang_seconds: that opening, reset, step and close take at most, each.

        Raises:
          EnvironmentFailedError: it cannot be opened or used, or hangs.
        """
        self.start()
        self.join(min(_QUIET_SECONDS, hang_seconds))
        before = ''
        while self.is_alive() and before != self._doing:
            before = self._doing
            print(f'trying {self._config.game}: {before} ...', flush=True)
            self.join(hang_seconds)
        if self.is_alive():
            raise EnvironmentFailedError(
                f'{self._config.game}: {before} takes more than {hang_seconds:g} s'
                ' (--hang_seconds). Fix: correct it, or raise --hang_seconds.'
            )
        if self._error is not None:
            raise self._error
        return self._frames
