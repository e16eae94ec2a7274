"""Q-networks: uint8 frames in, float32 outputs for each action out (see agents/heads.py).

`TORSOS` lists the layers of each torso. Weights and biases start uniform in +-1/sqrt(fan_in), as in
the published code of Mnih et al. (2015) (Torch's default).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tf_agents.networks import network
from tf_agents.specs import tensor_spec

from agents.config import NetworkConfig

_PIXEL_SCALE = 1 / 255  # uint8 pixels to [0, 1]


@dataclasses.dataclass(frozen=True)
class Torso:
    """Convolutions (filters, kernel size, stride), unpadded, and a dense layer, all with ReLU."""

    convolutions: tuple[tuple[int, int, int], ...]
    dense_units: int


TORSOS = {
    'nature': Torso(((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),  # Mnih et al. 2015, Methods
    'dqn2013': Torso(((16, 8, 4), (32, 4, 2)), 256),  # Mnih et al. 2013, section 4.1
}


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


class _Layer(tf.Module):
    """A kernel and a bias, uniform in +-1/sqrt(fan_in)."""

    def __init__(self, kernel_shape: Sequence[int], units: int, seed: int, name: str) -> None:
        super().__init__(name=name)
        bound = math.sqrt(units / math.prod(kernel_shape))
        kernel_seed, bias_seed = (seed, 0), (seed, 1)
        self.kernel = tf.Variable(
            tf.random.stateless_uniform(kernel_shape, kernel_seed, -bound, bound),
            name=f'{name}/kernel',
        )
        self.bias = tf.Variable(
            tf.random.stateless_uniform([units], bias_seed, -bound, bound),
            name=f'{name}/bias',
        )


class _Stream(tf.Module):
    """A dense layer with ReLU and a linear one: float32 [B, inputs] to float32 [B, outputs]."""

    def __init__(self, inputs: int, units: int, outputs: int, seed: int, prefix: str) -> None:
        super().__init__()
        self._dense = _Layer((units, inputs), units, seed, f'{prefix}dense')
        self._values = _Layer((outputs, units), outputs, seed + 1, f'{prefix}q_values')

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        x = tf.nn.relu(tf.nn.bias_add(dense(x, self._dense.kernel), self._dense.bias))
        return tf.nn.bias_add(dense(x, self._values.kernel), self._values.bias)


class QNetwork(network.Network):
    """A torso with linear outputs for each action, plain or dueling.

    Dueling (Wang et al. 2016, equation 9) has two streams, each with its own dense layer, for the
    state's value and the actions' advantages. Outputs are value + advantage - mean advantage. The
    gradient that enters the torso is not scaled by 1/sqrt(2) as in that paper.
    """

    def __init__(
        self,
        input_tensor_spec: Any,
        num_actions: int,
        config: NetworkConfig,
        output_shape: tuple[int, ...] = (),
        seed: int = 0,
        name: str = 'q_network',
    ) -> None:
        """Outputs have shape [B, num_actions, *output_shape]. The same `seed` gives the same first
        weights."""
        super().__init__(input_tensor_spec=input_tensor_spec, name=name)
        torso = TORSOS[config.torso]
        self._center_input = config.center_input
        self._output_shape = (num_actions, *output_shape)
        self._convolutions = []
        height, width, channels = input_tensor_spec.shape
        for index, (filters, size, stride) in enumerate(torso.convolutions):
            name = f'convolution_{index + 1}'
            kernel = (size, size, channels, filters)
            self._convolutions.append(_Layer(kernel, filters, _layer_seed(seed, index), name))
            height, width = ((side - size) // stride + 1 for side in (height, width))
            channels = filters
        self._strides = [stride for _, _, stride in torso.convolutions]
        shape = (height * width * channels, torso.dense_units)
        first_seed = _layer_seed(seed, len(torso.convolutions))
        per_action = math.prod(output_shape)
        self._q_values = _Stream(*shape, num_actions * per_action, first_seed, '')
        self._state_value = (
            _Stream(*shape, per_action, first_seed + 2, 'state_') if config.dueling else None
        )

    def call(
        self,
        observation: tf.Tensor,  # uint8 [B, height, width, stack]
        step_type: Any = None,
        network_state: Any = (),
        training: bool = False,
    ) -> tuple[tf.Tensor, Any]:
        """Outputs float32 [B, num_actions, *output_shape], and the unchanged state."""
        del step_type, training
        x = tf.cast(observation, tf.float32) * _PIXEL_SCALE
        shift = self._shift(x) if self._center_input else None
        for layer, stride in zip(self._convolutions, self._strides):
            x = tf.nn.conv2d(x, layer.kernel, stride, 'VALID')
            if shift is not None:
                x, shift = x - shift, None  # for the first layer only
            x = tf.nn.relu(tf.nn.bias_add(x, layer.bias))
        x = tf.reshape(x, (-1, math.prod(x.shape[1:])))
        outputs = tf.reshape(self._q_values(x), (-1, *self._output_shape))
        if self._state_value is not None:
            value = tf.reshape(self._state_value(x), (-1, 1, *self._output_shape[1:]))
            outputs += value - tf.reduce_mean(outputs, axis=1, keepdims=True)
        return outputs, network_state

    def _shift(self, x: tf.Tensor) -> tf.Tensor:
        """The first convolution's output for each observation's mean, float32 [B, 1, 1, filters].

        Without padding, convolving x - mean(x) equals convolving x and subtracting this output.
        That writes 20 x 20 values per filter instead of 84 x 84 per frame.
        """
        mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
        return mean * tf.reduce_sum(self._convolutions[0].kernel, axis=[0, 1, 2])


def _layer_seed(seed: int, index: int) -> int:
    return 100 * seed + index  # torsos have fewer than 100 layers, so seeds share no stream


def q_network(
    observation_spec: Any,
    action_spec: Any,
    config: NetworkConfig,
    seed: int = 0,
    output_shape: tuple[int, ...] = (),
) -> QNetwork:
    """Builds the Q-network of `config`, and its variables, for uint8 [height, width, stack].

    Args:
      observation_spec: array or tensor spec without batch dimension.
      action_spec: bounded scalar array or tensor spec with minimum 0.
      config: torso, centering and dueling.
      seed: equal seeds give equal first weights.
      output_shape: shape of the outputs for one action; () for one value.
    """
    spec = tensor_spec.from_spec(observation_spec)
    num_actions = int(tensor_spec.from_spec(action_spec).maximum) + 1
    result = QNetwork(spec, num_actions, config, output_shape, seed)
    result.create_variables()
    return result
