"""A parameter server for unmodified TF-Agents agents, learners and actors.

agent.train -> ParameterServerOptimizer -> gradients to the shards, parameters back
actor       -> ParameterServerVariableContainer -> parameters of the shards
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.experimental.distributed.reverb_variable_container import (
    DEFAULT_TABLE,
    POLICY_KEY,
    TRAIN_STEP_KEY,
)

from infra.addresses import require_addresses
from infra.parameter_server.client import ParameterClient, Snapshot
from infra.parameter_server.layout import Layout
from infra.parameter_server.protocol import NotInitialisedError

__all__ = [
    'DEFAULT_TABLE',
    'POLICY_KEY',
    'TRAIN_STEP_KEY',
    'ParameterServerOptimizer',
    'ParameterServerVariableContainer',
]


class ParameterServerOptimizer(tf.Module):
    """An agent's `optimizer` that pushes gradients to the shards and brings parameters back.

    The shards decide how a gradient is applied (see `ParameterServerConfig`), and count it once.
    The first call connects: the first of several learners initialises the shards with its own
    variables, all others take those. A refused gradient is counted, and the parameters are pulled.

    The agent's target network stays the agent's own affair: it counts its own steps.

    Attributes:
      updates: gradients that the first shard has applied, of all learners, when it last answered.
      rejected: gradients of this learner that a shard refused.
    """

    def __init__(
        self, addresses: Sequence[str], pull_period: int = 1, name: str | None = None, **client: Any
    ) -> None:
        """
        Args:
          addresses: `host:port` of every parameter shard, in order.
          pull_period: updates between two refreshes of the variables.
          name: of the module.
          **client: further arguments of `ParameterClient`, such as `timeout_seconds`.

        Raises:
          ValueError: `pull_period` is below 1, or an address is none.
        """
        super().__init__(name=name)
        if pull_period < 1:
            raise ValueError(f'pull_period is {pull_period}; it must be at least 1')
        self._addresses = require_addresses(addresses)
        self._pull_period = pull_period
        self._client_arguments = client
        self._layout: Layout | None = None  # of the variables of the first call
        self._client: ParameterClient | None = None
        self._versions: tuple[int, ...] = ()
        self._values = np.zeros(0, np.float32)  # of the shards, as last pulled
        self._pushed = 0
        self.updates = 0
        self.rejected = 0

    def apply_gradients(self, grads_and_vars: Iterable[Any], **unused: Any) -> None:
        """Pushes the gradients, then assigns the parameters that come back; in a graph or eagerly.

        Args:
          grads_and_vars: pairs of a gradient, None for 0, and its float32 variable; the same
            variables in the same order at every call.
          **unused: what optimizers of Keras take besides, such as `name`.

        Raises:
          ValueError: no variable, a gradient of another shape than its variable's, or other
            variables than at the first call.
          ParameterServerError: a shard does not answer in time, or holds another network. Inside a
            graph TensorFlow makes a `tf.errors.UnknownError` of it, with its message.
        """
        gradients, variables = _paired(grads_and_vars)
        layout = Layout.from_variables(variables)
        if self._layout is None:
            with tf.init_scope():
                self._begin(layout, variables)
        elif layout != self._layout:
            raise ValueError('the variables are not those of the first call, in their order')
        parts = [
            tf.zeros([variable.shape.num_elements()])
            if gradient is None
            else tf.reshape(tf.convert_to_tensor(gradient), [-1])
            for gradient, variable in zip(gradients, variables)
        ]
        flat, pulled = tf.numpy_function(
            self._push, [tf.concat(parts, axis=0)], [tf.float32, tf.bool]
        )
        flat.set_shape([self._values.size])
        tf.cond(pulled, lambda: _assign(variables, flat), lambda: None)

    def close(self) -> None:
        """Ends the connections; the next gradient would open them anew."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _begin(self, layout: Layout, variables: Sequence[tf.Variable]) -> None:
        """Initialises the shards, if nobody has, and takes what they hold."""
        client = ParameterClient(self._addresses, layout, **self._client_arguments)
        client.initialise(layout.flatten([variable.numpy() for variable in variables]))
        self._take(client.pull())
        for variable, value in zip(variables, layout.unflatten(self._values)):
            variable.assign(value)
        self._layout, self._client = layout, client

    def _push(self, gradient: np.ndarray) -> tuple[np.ndarray, np.bool_]:
        """The shards' parameters float32 [size], and whether they are newer than the variables."""
        pulled = self._take(self._exchange(gradient))
        return self._values, np.bool_(pulled)

    def _exchange(self, gradient: np.ndarray) -> Snapshot:
        """Pushes; what is newest after it."""
        client = self._connected()
        self._pushed += 1
        due = self._pushed % self._pull_period == 0
        try:
            reply = client.push(gradient, self._versions, pull=due)
        except NotInitialisedError:
            # A shard came back without a checkpoint: what this learner has is the best there is.
            client.initialise(self._values)
            return client.pull()
        if reply.reason is not None:
            self.rejected += 1
            return client.pull()
        return reply.snapshot

    def _connected(self) -> ParameterClient:
        """The client, a new one after `close`."""
        if self._client is None:
            assert self._layout is not None  # a gradient is pushed after the first call
            self._client = ParameterClient(self._addresses, self._layout, **self._client_arguments)
        return self._client

    def _take(self, snapshot: Snapshot) -> bool:
        """Notes what the shards sent; whether that is anything new."""
        self.updates = snapshot.clock.updates
        values = snapshot.values
        if values is None:
            return False
        self._values, self._versions = values, snapshot.versions
        return True


class ParameterServerVariableContainer:
    """Has the interface of TF-Agents' `ReverbVariableContainer`, over parameter shards.

    Structures of variables are as in TF-Agents' distributed examples: the policy's under
    `POLICY_KEY`, and the train step, which is given the global number of updates, under
    `TRAIN_STEP_KEY`. A structure with float32 variables alone will do, too.

    Only gradients change the parameters of the shards: the first `push` initialises them, a later
    one does nothing.
    """

    def __init__(
        self, addresses: Sequence[str], table_names: Iterable[str] = (DEFAULT_TABLE,), **client: Any
    ) -> None:
        """
        Args:
          addresses: `host:port` of every parameter shard, in order.
          table_names: one name, by which the parameters are asked for.
          **client: further arguments of `ParameterClient`, such as `timeout_seconds`.

        Raises:
          ValueError: more than one name (the shards hold one network), or an address is none.
        """
        self._table_names = tuple(table_names)
        if len(self._table_names) != 1:
            raise ValueError(f'table_names are {self._table_names}; the shards hold one network')
        self._addresses = require_addresses(addresses)
        self._client_arguments = client
        self._client: ParameterClient | None = None
        self._structure: Any = None
        self._values = np.zeros(0, np.float32)

    def push(self, values: Any, table: str = DEFAULT_TABLE) -> None:
        """Initialises the shards with a structure of variables or arrays, unless they are.

        Raises:
          KeyError: there is no such table.
          ValueError: a variable that the shards cannot hold, or another structure than before.
          ParameterServerError: a shard does not answer in time, or holds another network.
        """
        self._connect(values, table)
        assert self._client is not None
        self._client.initialise(
            self._client.layout.flatten([np.asarray(v) for v in self._parameters(values)])
        )

    def pull(self, table: str = DEFAULT_TABLE) -> Any:
        """The parameters, in the structure of the last `push` or `update`.

        Raises:
          KeyError: there is no such table.
          RuntimeError: there was neither a `push` nor an `update`: the structure is not known.
          ParameterServerError: a shard does not answer in time, or nobody initialised it.
        """
        self._check(table)
        if self._client is None:
            raise RuntimeError(
                'pull() before push() or update(), or after close(): the structure is not known'
            )
        snapshot = self._client.pull()
        if snapshot.values is not None:
            self._values = snapshot.values
        arrays: Iterator[Any] = iter(self._client.layout.unflatten(self._values))
        updates = np.int64(snapshot.clock.updates)
        leaves = [updates if flag else next(arrays) for flag in tf.nest.flatten(self._structure)]
        return tf.nest.pack_sequence_as(self._structure, leaves)

    def update(self, variables: Any, table: str = DEFAULT_TABLE) -> None:
        """Assigns the parameters to a structure of variables.

        Raises: as `push` and `pull` do.
        """
        self._connect(variables, table)
        values = self.pull(table)
        for variable, value in zip(tf.nest.flatten(variables), tf.nest.flatten(values)):
            variable.assign(tf.cast(value, variable.dtype))

    def close(self) -> None:
        """Ends the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connect(self, variables: Any, table: str) -> None:
        self._check(table)
        layout = Layout.from_variables(self._parameters(variables))
        flags = _step_flags(variables)
        if self._client is not None:
            tf.nest.assert_same_structure(self._structure, flags)
            if layout.fingerprint != self._client.layout.fingerprint:
                raise ValueError('the variables are not shaped as those of the first call')
            return
        self._structure = flags
        self._client = ParameterClient(self._addresses, layout, **self._client_arguments)

    def _check(self, table: str) -> None:
        if table not in self._table_names:
            raise KeyError(f'no table {table!r}; there is {self._table_names[0]!r}')

    def _parameters(self, variables: Any) -> list[Any]:
        """What of a structure the shards hold.

        Raises:
          ValueError: a variable is not float32, or is not trained by gradients.
        """
        flags = tf.nest.flatten(_step_flags(variables))
        parameters = [v for v, is_step in zip(tf.nest.flatten(variables), flags) if not is_step]
        for variable in parameters:
            trainable = getattr(variable, 'trainable', True)
            if not trainable or np.dtype(_dtype_of(variable)) != np.float32:
                raise ValueError(
                    f'{getattr(variable, "name", variable)} is not a trainable float32 variable;'
                    ' the parameter server holds only what gradients train'
                )
        return parameters


def _paired(grads_and_vars: Iterable[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Gradients, None for 0, and variables, one each.

    Raises:
      ValueError: there is none, or a gradient has another shape than its variable.
    """
    pairs = list(grads_and_vars)
    if not pairs:
        raise ValueError('apply_gradients() got no variable')
    for gradient, variable in pairs:
        if gradient is not None and gradient.shape != variable.shape:
            raise ValueError(
                f'the gradient of {variable.name} has the shape {gradient.shape}, not'
                f' {variable.shape}'
            )
    gradients, variables = zip(*pairs)
    return gradients, variables


def _step_flags(variables: Any) -> Any:
    """The structure of `variables`, True for the train step and False elsewhere."""
    flags = tf.nest.map_structure(lambda _: False, variables)
    if isinstance(flags, Mapping) and TRAIN_STEP_KEY in flags:
        flags = {**flags, TRAIN_STEP_KEY: True}
    return flags


def _dtype_of(variable: Any) -> Any:
    dtype = variable.dtype
    return dtype.as_numpy_dtype if isinstance(dtype, tf.DType) else dtype


def _assign(variables: Sequence[tf.Variable], flat: tf.Tensor) -> None:
    """Assigns float32 [size] to the variables, in order."""
    sizes = [variable.shape.num_elements() for variable in variables]
    for variable, part in zip(variables, tf.split(flat, sizes)):
        variable.assign(tf.reshape(part, variable.shape))
