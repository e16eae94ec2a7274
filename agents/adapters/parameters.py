"""A parameter server for unmodified TF-Agents agents, learners and actors.

agent.train -> ParameterServerOptimizer -> gradients to the shards, parameters back
actor       -> ParameterServerVariableContainer -> parameters from the shards
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

from infra.addresses import reach_directly, require_addresses
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
    """An agent's `optimizer` that pushes gradients to the shards and pulls parameters back.

    The shards apply each gradient once, as `ParameterServerConfig` sets. The first call connects.
    The first of several learners initialises the shards with its variables; all others take those.
    If a shard rejects a gradient, the optimizer counts it and pulls the parameters.

    Within `run` of a strategy with several replicas on one machine (`MirroredStrategy`) it sums
    their gradients and pushes once, as TF-Agents' losses expect of an optimizer.

    The agent updates its target network itself, by its own count of steps.

    Attributes:
      updates: gradients of all learners that the first shard had applied when it last replied.
      rejected: gradients of this learner that a shard rejected.
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
          ValueError: `pull_period` is below 1, or an address is malformed.
        """
        super().__init__(name=name)
        if pull_period < 1:
            raise ValueError(f'pull_period is {pull_period}; it must be at least 1')
        self._addresses = require_addresses(addresses)
        reach_directly(addresses)
        self._pull_period = pull_period
        self._client_arguments = client
        self._layout: Layout | None = None  # of the variables of the first call
        self._client: ParameterClient | None = None
        self._version = 0
        self._values = np.zeros(0, np.float32)  # of the shards, as last pulled
        self._pushed = 0
        self.updates = 0
        self.rejected = 0

    def apply_gradients(self, grads_and_vars: Iterable[Any], **unused: Any) -> None:
        """Pushes the gradients and assigns the parameters of the reply, in a graph or eagerly.

        Args:
          grads_and_vars: pairs of a gradient (None for 0) and its float32 variable; the same
            variables in the same order at every call.
          **unused: ignored arguments of Keras optimizers, such as `name`.

        Raises:
          ValueError: there is no variable, one is not float32, the shape of a gradient differs from
            its variable's, or the variables differ from those of the first call.
          RuntimeError: the call is in the scope of a strategy but outside its `run`, or the
            strategy is neither `MirroredStrategy` nor on one device.
          ParameterServerError: a shard does not reply in time, or holds another network. In a graph
            TensorFlow raises `tf.errors.UnknownError` with the same message.
        """
        gradients, variables = _paired(grads_and_vars)
        parts = [
            tf.zeros([variable.shape.num_elements()])
            if gradient is None
            else tf.reshape(tf.convert_to_tensor(gradient), [-1])
            for gradient, variable in zip(gradients, variables)
        ]
        _replica_context().merge_call(self._apply, args=(tf.concat(parts, axis=0), variables))

    def _apply(self, strategy: Any, gradient: Any, variables: Sequence[tf.Variable]) -> None:
        """Pushes the sum of the replicas' gradients, float32 [size] each."""
        if strategy.num_replicas_in_sync > 1:
            gradient = strategy.reduce(tf.distribute.ReduceOp.SUM, gradient, axis=None)
        layout = Layout.from_variables(variables)
        if self._layout is None:
            with tf.init_scope():
                self._begin(layout, variables)
        elif layout != self._layout:
            raise ValueError('the variables are not those of the first call, in their order')
        flat, pulled = tf.numpy_function(self._push, [gradient], [tf.float32, tf.bool])
        flat.set_shape([self._values.size])
        tf.cond(pulled, lambda: _assign(variables, flat), lambda: None)

    def close(self) -> None:
        """Closes the connections; the next gradient opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _begin(self, layout: Layout, variables: Sequence[tf.Variable]) -> None:
        """Initialises the shards unless they are initialised, and pulls their parameters."""
        client = ParameterClient(self._addresses, layout, **self._client_arguments)
        client.initialise(layout.flatten([variable.numpy() for variable in variables]))
        self._take(client.pull())
        for variable, value in zip(variables, layout.unflatten(self._values)):
            variable.assign(value)
        self._layout, self._client = layout, client

    def _push(self, gradient: np.ndarray) -> tuple[np.ndarray, np.bool_]:
        """Pushes; returns parameters float32 [size] and whether they are new."""
        pulled = self._take(self._exchange(gradient))
        return self._values, np.bool_(pulled)

    def _exchange(self, gradient: np.ndarray) -> Snapshot:
        """Pushes the gradient and returns the newest snapshot."""
        client = self._connected()
        self._pushed += 1
        due = self._pushed % self._pull_period == 0
        try:
            reply = client.push(gradient, self._version, pull=due)
        except NotInitialisedError:
            # A shard restarted without a checkpoint: this learner's parameters are the newest left.
            client.initialise(self._values)
            return client.pull()
        self.rejected += reply.rejected is not None
        return reply.snapshot

    def _connected(self) -> ParameterClient:
        """The open client; connects anew after `close`."""
        if self._client is None:
            assert self._layout is not None  # a gradient is pushed after the first call
            self._client = ParameterClient(self._addresses, self._layout, **self._client_arguments)
        return self._client

    def _take(self, snapshot: Snapshot) -> bool:
        """Stores the snapshot's clock and parameters; returns whether it has parameters."""
        self.updates = snapshot.clock.updates
        values = snapshot.values
        if values is None:
            return False
        self._values, self._version = values, snapshot.version
        return True


class ParameterServerVariableContainer:
    """Implements the interface of TF-Agents' `ReverbVariableContainer` over parameter shards.

    Structures of variables are as in TF-Agents' distributed examples: the policy's variables under
    `POLICY_KEY` and the train step under `TRAIN_STEP_KEY`. The train step receives the global
    number of updates. A structure of float32 variables alone works too.

    Only gradients change the parameters of the shards. The first `push` initialises them; later
    ones have no effect.
    """

    def __init__(
        self, addresses: Sequence[str], table_names: Iterable[str] = (DEFAULT_TABLE,), **client: Any
    ) -> None:
        """
        Args:
          addresses: `host:port` of every parameter shard, in order.
          table_names: one name, under which `push`, `pull` and `update` find the parameters.
          **client: further arguments of `ParameterClient`, such as `timeout_seconds`.

        Raises:
          ValueError: there is not exactly one name (the shards hold one network), or an address is
            malformed.
        """
        self._table_names = tuple(table_names)
        if len(self._table_names) != 1:
            raise ValueError(f'table_names are {self._table_names}; the shards hold one network')
        self._addresses = require_addresses(addresses)
        reach_directly(addresses)
        self._client_arguments = client
        self._client: ParameterClient | None = None
        self._structure: Any = None
        self._values = np.zeros(0, np.float32)

    def push(self, values: Any, table: str = DEFAULT_TABLE) -> None:
        """Initialises the shards from variables or arrays, unless they are initialised.

        Raises:
          KeyError: the table does not exist.
          ValueError: the shards cannot hold a variable, or the structure differs from an earlier
            call's.
          ParameterServerError: a shard does not reply in time, or holds another network.
        """
        self._connect(values, table)
        assert self._client is not None
        self._client.initialise(
            self._client.layout.flatten([np.asarray(v) for v in self._parameters(values)])
        )

    def pull(self, table: str = DEFAULT_TABLE) -> Any:
        """Pulls the parameters in the structure of the last `push` or `update`.

        Raises:
          KeyError: the table does not exist.
          RuntimeError: neither `push` nor `update` was called, so the structure is unknown.
          ParameterServerError: a shard does not reply in time, or is not initialised.
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
        """Closes the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connect(self, variables: Any, table: str) -> None:
        self._check(table)
        layout = Layout.from_variables(self._parameters(variables))
        flags = _step_flags(variables)
        if self._client is not None:
            # A loaded policy has lists where the saved one had tuples.
            tf.nest.assert_same_structure(self._structure, flags, check_types=False)
            if layout.fingerprint != self._client.layout.fingerprint:
                raise ValueError('the variables are not shaped as those of the first call')
        else:
            self._client = ParameterClient(self._addresses, layout, **self._client_arguments)
        self._structure = flags

    def _check(self, table: str) -> None:
        if table not in self._table_names:
            raise KeyError(f'no table {table!r}; there is {self._table_names[0]!r}')

    def _parameters(self, variables: Any) -> list[Any]:
        """The variables of a structure that the shards hold: all but the train step.

        Raises:
          ValueError: a variable is not float32 or not trainable.
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


def _replica_context() -> Any:
    """The replica context, in which the gradients of all replicas are summed.

    Raises:
      RuntimeError: the call is in a strategy's scope but outside its `run`, or the optimizer does
        not support the strategy.
    """
    strategy = tf.distribute.get_strategy()
    name = type(strategy).__name__
    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            f'apply_gradients: called in the scope of a {name}, outside its run(). Fix: train in'
            ' strategy.run().'
        )
    known = (tf.distribute.MirroredStrategy, tf.distribute.OneDeviceStrategy)
    if tf.distribute.has_strategy() and not isinstance(strategy, known):
        raise RuntimeError(
            f'ParameterServerOptimizer: cannot add up the gradients of a {name}. Fix: use a'
            ' MirroredStrategy, or a learner in each process without a strategy.'
        )
    return context


def _paired(grads_and_vars: Iterable[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Splits the pairs into gradients (None for 0) and variables.

    Raises:
      ValueError: there is no pair, a variable is not float32, or the shape of a gradient differs
        from its variable's.
    """
    pairs = list(grads_and_vars)
    if not pairs:
        raise ValueError('apply_gradients() got no variable')
    for gradient, variable in pairs:
        if variable.dtype != tf.float32:
            raise ValueError(f'{variable.name} is {variable.dtype.name}; the shards hold float32')
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
