"""Several pushes of one learner under way at once, for parameter shards that are far away."""

from __future__ import annotations

import concurrent.futures
import itertools
from typing import Any

import numpy as np

from infra.parameter_server.client import ParameterClient, PushReply


class PushLanes:
    """A client and, for pushes that travel side by side, more clients; a context manager.

    A push over one connection waits for the reply to the one before. What gradients of a
    lane lose in their encoding goes with the next gradient of that lane.
    """

    def __init__(self, client: ParameterClient, count: int) -> None:
        """
        Args:
          client: connected; stays open. Everything but `push_async` goes over it.
          count: pushes that may be under way, at least 1.
        """
        self._client = client
        self._more = [client.another() for _ in range(count)] if count > 1 else []
        self._lanes = itertools.cycle(self._more or [client])

    def __enter__(self) -> PushLanes:
        return self

    def __exit__(self, *exception: Any) -> None:
        for client in self._more:
            client.close()

    def initialise(self, values: np.ndarray) -> bool:
        """See `ParameterClient.initialise`."""
        return self._client.initialise(values)

    def pull(self, agent_steps: int = 0) -> Any:
        """See `ParameterClient.pull`."""
        return self._client.pull(agent_steps)

    def pull_target(self) -> Any:
        """See `ParameterClient.pull_target`."""
        return self._client.pull_target()

    def push(self, gradient: np.ndarray, version: int, pull: bool = True) -> PushReply:
        """See `ParameterClient.push`."""
        return self._client.push(gradient, version, pull)

    def push_async(
        self, gradient: np.ndarray, version: int, pull: bool = True
    ) -> concurrent.futures.Future[PushReply]:
        """Like `ParameterClient.push_async`, over the next lane in turn.

        Raises:
          RuntimeError: as many pushes as there are lanes are outstanding.
          ValueError: the length of the gradient is wrong.
        """
        return next(self._lanes).push_async(gradient, version, pull)
