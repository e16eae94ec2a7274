"""Q-networks: observations in, float32 outputs for each action out (see agents/heads.py).

`torso_of` chooses the layers by the observation: convolutions for pictures, dense layers for
vectors. In a nest of arrays each picture has convolutions of its own; what they return and all
other arrays are joined to one vector. Weights and biases start uniform in +-1/sqrt(fan_in), as in
the published code of Mnih et al. (2015) (Torch's default).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.networks import network
from tf_agents.specs import tensor_spec
from tf_agents.trajectories.time_step import StepType

from agents.config import BUILTIN, NetworkConfig
from agents.fractions import midpoints
from infra.named_function import NoFunctionError, brief, load_function

# Added to the variance of a standardized picture of integers in [0, 1], or of floats as they are:
# that of one grey level, so that an even picture has no noise to enlarge.
_LEAST_VARIANCE = 1 / 255**2
# Numbers of seeds, behind those of all streams.
_FIRST_HIDDEN = 50  # of the first hidden layer
_EMBEDDING = 90  # of the embedding of fractions


Activation = Callable[[tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Torso:
    """Convolutions, unpadded, with ReLU, and dense layers with ReLU, plain or leaky.

    Attributes:
      convolutions: filters, kernel size and stride of each.
      dense_units: of the last dense layer, one for each stream of a dueling network.
      hidden: units of the dense layers before it.
    """

    convolutions: tuple[tuple[int, int, int], ...]
    dense_units: int
    hidden: tuple[int, ...] = ()


TORSOS = {
    'nature': Torso(((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),  # Mnih et al. 2015, Methods
    'dqn2013': Torso(((16, 8, 4), (32, 4, 2)), 256),  # Mnih et al. 2013, section 4.1
    # [here] Half of Nature's filters and units, and stride 2 in the last convolution.
    'narrow': Torso(((16, 8, 4), (32, 4, 2), (32, 3, 2)), 256),
    # [here] For half the pixels each way: the layers after the first have the same sizes.
    'nature_half': Torso(((32, 4, 2), (64, 4, 2), (64, 3, 1)), 512),
    'dqn2013_half': Torso(((16, 4, 2), (32, 4, 2)), 256),
    'narrow_half': Torso(((16, 4, 2), (32, 4, 2), (32, 3, 2)), 256),
}

SMALL_PICTURES = Torso(((16, 3, 1),), 128)
"""For pictures of fewer pixels (MinAtar; Young and Tian 2019, section 4)."""


def torso_of(shape: Sequence[int], config: NetworkConfig) -> Torso:
    """The torso for observations of a shape: [height, width, channels], or anything as a vector."""
    if len(shape) == 3:
        for torso in (TORSOS[config.torso], SMALL_PICTURES):
            if min(_convolved(shape, torso)) > 0:
                return torso
    *hidden, last = dense_units(config.dense_layers)
    return Torso((), last, tuple(hidden))


def torsos_of(observation: Any, config: NetworkConfig) -> tuple[tuple[Torso, ...], Torso]:
    """Torsos of an observation's arrays, for their convolutions, and the one for its dense layers.

    What the parts of a nest are joined to is a vector; one array has both from one torso.
    """
    torsos = tuple(torso_of(array.shape, config) for array in tf.nest.flatten(observation))
    return torsos, torso_of((1,), config) if tf.nest.is_nested(observation) else torsos[0]


def _convolved(shape: Sequence[int], torso: Torso) -> tuple[int, ...]:
    """Height, width and channels of pictures of a shape after the convolutions; 0 if too small."""
    for filters, size, stride in torso.convolutions:
        height, width = (max(0, side - size + stride) // stride for side in shape[:2])
        shape = height, width, filters
    return tuple(shape)


def _activation(config: NetworkConfig) -> Activation:
    """ReLU of dense layers, leaky with a `negative_slope` (Maas et al. 2013)."""
    if not config.negative_slope:
        return tf.nn.relu
    return functools.partial(tf.nn.leaky_relu, alpha=config.negative_slope)


def dense(x: tf.Tensor, kernel: Any) -> tf.Tensor:
    """Multiplies `x` float32 [batch, in] by `kernel` float32 [out, in] to float32 [batch, out].

    The kernel is stored as [out, in] and each product is ordered so that TensorFlow does not repack
    it. At batch 32 and 3136 x 512 this takes half the time of TensorFlow's own layer forwards, and
    a fifth for the gradient of `x` (see tests/benchmarks/benchmark_gradient.py).
    """
    # TensorFlow's custom gradients take tensors, not variables distributed over devices.
    return _dense(x, tf.convert_to_tensor(kernel))


@tf.custom_gradient
def _dense(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.matmul(dy, kernel), tf.matmul(dy, x, transpose_a=True)

    return tf.transpose(tf.matmul(kernel, x, transpose_b=True)), gradient


@tf.custom_gradient
def _centralized(kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """A kernel [height, width, in, filters] whose gradient has mean 0 over each filter.

    Gradient centralization (Yong et al. 2020), float32: what the inputs have in common, such as
    their brightness, then moves no filter as a whole.
    """

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        return dy - tf.reduce_mean(dy, axis=[0, 1, 2], keepdims=True)

    return tf.identity(kernel), gradient


class _Layer(tf.Module):
    """A kernel and a bias, uniform in +-1/sqrt(fan_in); `part` is of an observation's arrays."""

    def __init__(
        self, kernel_shape: Sequence[int], units: int, seed: int, name: str, part: int = 0
    ) -> None:
        super().__init__(name=name)
        bound = math.sqrt(units / math.prod(kernel_shape))
        kernel_seed, bias_seed = (seed, 2 * part), (seed, 2 * part + 1)
        self.kernel = tf.Variable(
            tf.random.stateless_uniform(kernel_shape, kernel_seed, -bound, bound),
            name=f'{name}/kernel',
        )
        self.bias = tf.Variable(
            tf.random.stateless_uniform([units], bias_seed, -bound, bound),
            name=f'{name}/bias',
        )


class _Stream(tf.Module):
    """A dense layer with `activation` and a linear one: float32 [B, inputs] to [B, outputs].

    With 0 units it is the linear one alone.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        outputs: int,
        seed: int,
        prefix: str,
        activation: Activation,
    ) -> None:
        super().__init__()
        self._activation = activation
        self._dense = _Layer((units, inputs), units, seed, f'{prefix}dense') if units else None
        shape = (outputs, units or inputs)
        self._values = _Layer(shape, outputs, seed + 1, f'{prefix}q_values')

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        if self._dense is not None:
            x = _activated(x, self._dense, self._activation)
        return tf.nn.bias_add(dense(x, self._values.kernel), self._values.bias)


def _activated(x: tf.Tensor, layer: _Layer, activation: Activation) -> tf.Tensor:
    return activation(tf.nn.bias_add(dense(x, layer.kernel), layer.bias))


class _PartLayers(tf.Module):
    """The convolutions of a picture, none for other arrays: [B, ...] to float32 [B, width].

    Attributes:
      rounds: whether it convolves in bfloat16.
      width: number of features.
    """

    def __init__(
        self, spec: Any, torso: Torso, config: NetworkConfig, seed: int, part: int
    ) -> None:
        super().__init__()
        self._low, self._scale = _scaling(spec)
        self._standardize = config.standardize_input
        self._center = config.center_input or self._standardize
        self._centralize = config.centralize_gradient
        # 'auto' is decided for learners alone (see pipelines/experiment/builders.py).
        self.rounds = config.precision == 'bfloat16' and bool(torso.convolutions)
        self._convolutions, channels = [], spec.shape[-1]
        prefix = f'part_{part + 1}_' if part else ''
        for index, (filters, size, _) in enumerate(torso.convolutions):
            kernel = (size, size, channels, filters)
            name = f'{prefix}convolution_{index + 1}'
            layer = _Layer(kernel, filters, _layer_seed(seed, index), name, part)
            self._convolutions.append(layer)
            channels = filters
        self._strides = [stride for _, _, stride in torso.convolutions]
        self.width = math.prod(_convolved(spec.shape, torso))

    def __call__(self, array: tf.Tensor) -> tf.Tensor:
        x = tf.cast(array, tf.float32)
        if not self._convolutions:
            x = (x - self._low) * self._scale if self._low or self._scale != 1.0 else x
        for index, (layer, stride) in enumerate(zip(self._convolutions, self._strides)):
            convolve = self._first if index == 0 else _convolution
            x = tf.nn.relu(convolve(x, self._kernel(layer), layer.bias, stride))
        return tf.cast(tf.reshape(x, (-1, math.prod(x.shape[1:]))), tf.float32)

    def _kernel(self, layer: _Layer) -> tf.Tensor:
        kernel = tf.convert_to_tensor(layer.kernel)
        return _centralized(kernel) if self._centralize else kernel

    def _first(self, x: tf.Tensor, kernel: tf.Tensor, bias: Any, stride: int) -> tf.Tensor:
        """The first convolution, of (x - offset) * factor * scale.

        Without padding that equals a convolution of x by the scaled kernel, another factor and
        another bias. So 20 x 20 values per filter are written instead of 84 x 84 per frame.
        """
        kernel = kernel * self._scale
        offset, factor = self._offset_and_factor(x)
        if self.rounds:  # bfloat16 is too coarse to take one large sum from another
            return _convolution(tf.cast((x - offset) * factor, tf.bfloat16), kernel, bias, stride)
        if not self._center and not offset:
            return _convolution(x, kernel, bias, stride)
        bias = bias - factor * offset * tf.reduce_sum(kernel, axis=[0, 1, 2])
        return tf.nn.conv2d(x, kernel, stride, 'VALID') * factor + bias

    def _offset_and_factor(self, x: tf.Tensor) -> tuple[Any, Any]:
        """Of pictures [B, height, width, channels]: numbers, or float32 [B, 1, 1, 1]."""
        if not self._center:
            return self._low, 1.0
        if not self._standardize:
            return tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True), 1.0
        mean, variance = tf.nn.moments(x, axes=[1, 2, 3], keepdims=True)
        return mean, tf.math.rsqrt(variance * self._scale**2 + _LEAST_VARIANCE)


def _convolution(x: tf.Tensor, kernel: Any, bias: Any, stride: int) -> tf.Tensor:
    """An unpadded convolution of x's type, without activation."""
    kernel, bias = tf.cast(kernel, x.dtype), tf.cast(bias, x.dtype)
    return tf.nn.bias_add(tf.nn.conv2d(x, kernel, stride, 'VALID'), bias)


class _Embedding(tf.Module):
    """Embeds fractions by their cosines (Dabney et al. 2018b, equation 4)."""

    def __init__(self, num_cosines: int, width: int, seed: int) -> None:
        super().__init__()
        self._layer = _Layer((width, num_cosines), width, seed, 'fractions')
        self._width = width
        self._frequencies = np.pi * np.arange(num_cosines, dtype=np.float32)

    def __call__(self, x: tf.Tensor, fractions: tf.Tensor) -> tf.Tensor:
        """Features float32 [B * N, width] of x [B, width] at fractions [B, N], or [1, N]."""
        cosines = tf.cos(tf.reshape(fractions, (-1, 1)) * self._frequencies)
        embedded = _activated(cosines, self._layer, tf.nn.relu)
        embedded = tf.reshape(embedded, (-1, fractions.shape[1], self._width))
        return tf.reshape(x[:, None] * embedded, (-1, self._width))


class _TorsoLayers(tf.Module):
    """The layers of a torso before its last one: observations in, float32 [B, width] out.

    Attributes:
      depth: convolutions of the part that has the most.
      width: number of features.
      precision: of the convolutions, 'float32' (also without any) or 'bfloat16'.
      dense_units: of the last layer.
    """

    def __init__(self, spec: Any, config: NetworkConfig, seed: int) -> None:
        super().__init__()
        torsos, joined = torsos_of(spec, config)
        self.depth = max(len(torso.convolutions) for torso in torsos)
        self._parts = [
            _PartLayers(array, torso, config, seed, part)
            for part, (array, torso) in enumerate(zip(tf.nest.flatten(spec), torsos))
        ]
        self.width = sum(part.width for part in self._parts)
        self.precision = 'bfloat16' if any(part.rounds for part in self._parts) else 'float32'
        self.dense_units = joined.dense_units
        self._activation = _activation(config)
        self._hidden = []
        for index, units in enumerate(joined.hidden):
            layer_seed = _layer_seed(seed, _FIRST_HIDDEN + index)
            layer = _Layer((units, self.width), units, layer_seed, f'hidden_{index + 1}')
            self._hidden.append(layer)
            self.width = units

    def __call__(self, observation: Any) -> tf.Tensor:
        features = [part(array) for part, array in zip(self._parts, tf.nest.flatten(observation))]
        x = tf.concat(features, axis=1) if len(features) > 1 else features[0]
        for layer in self._hidden:
            x = _activated(x, layer, self._activation)
        return x


def _scaling(spec: Any) -> tuple[float, float]:
    """(low, factor) that bring integers with bounds to [0, 1]: (x - low) * factor."""
    if not spec.dtype.is_integer or not isinstance(spec, tensor_spec.BoundedTensorSpec):
        return 0.0, 1.0
    low, high = float(np.min(spec.minimum)), float(np.max(spec.maximum))
    return (low, 1 / (high - low)) if high > low else (0.0, 1.0)


class NetworkError(ValueError):
    """The user's network is unusable; the message names it, the reason and the remedy."""


class Network(network.Network):
    """A network of TF-Agents for observations of any type.

    TF-Agents' own `create_variables` tries a network with random numbers, which TensorFlow does not
    draw of int8, int16 and others.
    """

    _network_output_spec: Any

    def create_variables(self, input_tensor_spec: Any = None, **kwargs: Any) -> Any:
        """Creates the variables; returns the spec of the outputs, without batch dimension."""
        if self._network_output_spec is None:
            state, step_type = self.get_initial_state(batch_size=1), tf.fill((1,), StepType.FIRST)
            zeros = _zeros(self.input_tensor_spec)
            outputs, _ = self(zeros, step_type=step_type, network_state=state, **kwargs)
            self._network_output_spec = tf.TensorSpec(outputs.shape[1:], outputs.dtype)
        return self._network_output_spec


class QNetwork(Network):
    """A torso with linear outputs for each action, plain or dueling.

    Dueling (Wang et al. 2016, equation 9) has two streams, each with its own dense layer, for the
    state's value and the actions' advantages. Outputs are value + advantage - mean advantage. The
    gradient that enters the torso is not scaled by 1/sqrt(2) as in that paper.

    With `num_cosines` it is an implicit quantile network (Dabney et al. 2018b, section 3.1): an
    output is the quantile at a fraction, whose embedding multiplies the torso's features.
    """

    def __init__(
        self,
        input_tensor_spec: Any,
        num_actions: int,
        config: NetworkConfig,
        output_shape: tuple[int, ...] = (),
        seed: int = 0,
        num_cosines: int = 0,
        name: str = 'q_network',
    ) -> None:
        """Outputs have shape [B, num_actions, *output_shape]. The same `seed` gives the same first
        weights.

        Raises:
          NetworkError: the user's network cannot be built, or returns no features.
        """
        super().__init__(input_tensor_spec=input_tensor_spec, name=name)
        self._output_shape = (num_actions, *output_shape)
        # The layout of parameters follows the names of these attributes.
        if config.q_network != BUILTIN:
            self._features = _of_the_user(config.q_network, input_tensor_spec, seed)
            units = depth = 0
        else:
            self._features = _TorsoLayers(input_tensor_spec, config, seed)
            units, depth = self._features.dense_units, self._features.depth
        width = _width(self._features, input_tensor_spec, config.q_network)
        shape = (width, units)
        self._embedding = None
        if num_cosines:
            self._embedding = _Embedding(num_cosines, width, _layer_seed(seed, _EMBEDDING))
        activation = _activation(config)
        first_seed = _layer_seed(seed, depth)
        per_action = 1 if num_cosines else math.prod(output_shape)
        self._q_values = _Stream(*shape, num_actions * per_action, first_seed, '', activation)
        self._state_value = (
            _Stream(*shape, per_action, first_seed + 2, 'state_', activation)
            if config.dueling
            else None
        )

    def call(
        self,
        observation: Any,  # [B, ...], nested as the spec
        step_type: Any = None,
        network_state: Any = (),
        training: bool = False,
        fractions: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Any]:
        """Outputs float32 [B, num_actions, *output_shape], and the unchanged state.

        An implicit quantile network returns quantiles [B, num_actions, N] at `fractions` float32
        [B, N]; without, at the midpoints of as many as `output_shape` says.
        """
        del step_type, training
        x = self._features(observation)
        if self._embedding is None:
            return self._outputs(x, self._output_shape), network_state
        num_actions, count = self._output_shape
        if fractions is None:
            fractions = tf.constant(midpoints(count)[None])
        outputs = self._outputs(self._embedding(x, fractions), (num_actions,))
        outputs = tf.reshape(outputs, (-1, fractions.shape[1], num_actions))
        return tf.transpose(outputs, (0, 2, 1)), network_state

    @property
    def precision(self) -> str | None:
        """Numbers of the convolutions, 'float32' or 'bfloat16'; None for the user's network."""
        return self._features.precision if isinstance(self._features, _TorsoLayers) else None

    def untrained(self) -> list[str]:
        """Names of the variables that training leaves as they are: fixed ones, and hidden ones."""
        with tf.GradientTape() as tape:
            self(_zeros(self.input_tensor_spec))
        known = {variable.ref() for variable in self.trainable_variables}
        hidden = [each for each in tape.watched_variables() if each.ref() not in known]
        return [each.name for each in (*self.non_trainable_variables, *hidden)]

    def _outputs(self, x: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
        """Outputs float32 [rows, *shape] of features [rows, width]; `shape` begins with actions."""
        outputs = tf.reshape(self._q_values(x), (-1, *shape))
        if self._state_value is not None:
            value = tf.reshape(self._state_value(x), (-1, 1, *shape[1:]))
            outputs += value - tf.reduce_mean(outputs, axis=1, keepdims=True)
        return outputs


def _of_the_user(name: str, spec: Any, seed: int) -> Callable[[Any], tf.Tensor]:
    """Builds the user's network: observations in, features out.

    Raises:
      NetworkError: it cannot be built.
    """
    try:
        made = load_function(name)(spec, seed)
    except NoFunctionError as error:
        raise NetworkError(f'--q_network {error}. Fix: correct the name.') from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise NetworkError(
            f'--q_network {name}: raised {brief(error)}. Fix: correct the function, which gets the'
            ' spec of an observation and a seed.'
        ) from error
    if not callable(made):
        raise NetworkError(
            f'--q_network {name}: returned {type(made).__name__}. Fix: return a Keras layer or'
            ' model.'
        )
    return made


def _width(torso: Any, spec: Any, name: str) -> int:
    """Features of the output of a torso, built-in or that of the user's function `name`.

    Raises:
      NetworkError: a user's network does not return float32 [B, features].
    """
    if isinstance(torso, _TorsoLayers):
        return torso.width
    batch = _zeros(spec, rows=2)
    try:
        features = torso(batch)
        problem = f'returned {_shown(features)}'
        if tf.is_tensor(features) and features.dtype == tf.float32 and features.shape.rank == 2:
            rows, width = features.shape
            if rows == 2 and width:
                return width
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        problem = f'raised {brief(error)}'
    raise NetworkError(
        f'--q_network {name}: given {_shown(batch)}, the network {problem}. Fix: let it return'
        ' features, float32 [batch, features].'
    )


def _shown(batch: Any) -> str:
    """Types and shapes of tensors; types of other values."""
    return ', '.join(
        f'{part.dtype.name} {list(part.shape)}' if tf.is_tensor(part) else type(part).__name__
        for part in tf.nest.flatten(batch)
    )


def _zeros(spec: Any, rows: int = 1) -> Any:
    """A batch of observations."""
    return tf.nest.map_structure(lambda x: tf.zeros((rows, *x.shape), x.dtype), spec)


def _layer_seed(seed: int, index: int) -> int:
    return 100 * seed + index  # torsos have fewer than 100 layers, so seeds share no stream


def dense_units(text: str) -> tuple[int, ...]:
    """Units of each dense layer in a text such as '256,256'."""
    return tuple(int(units) for units in text.split(','))


def q_network(
    observation_spec: Any,
    action_spec: Any,
    config: NetworkConfig,
    seed: int = 0,
    output_shape: tuple[int, ...] = (),
    num_cosines: int = 0,
) -> QNetwork:
    """Builds the Q-network of `config`, and its variables.

    Args:
      observation_spec: array or tensor spec without batch dimension, or a nest of them.
      action_spec: bounded scalar array or tensor spec with minimum 0.
      config: layers, centering and dueling.
      seed: equal seeds give equal first weights.
      output_shape: shape of the outputs for one action; () for one value.
      num_cosines: of the embedding of fractions, if outputs are quantiles at fractions; else 0.

    Raises:
      NetworkError: the user's network is unusable.
    """
    spec = tensor_spec.from_spec(observation_spec)
    num_actions = int(tensor_spec.from_spec(action_spec).maximum) + 1
    result = QNetwork(spec, num_actions, config, output_shape, seed, num_cosines)
    result.create_variables()
    return result
