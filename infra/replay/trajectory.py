"""Trajectories: one packed row per agent step in, n-step transitions out.

The stream of an environment has one row per agent step t, without gaps:

    frame_t, action_t, reward_{t+1}, discount_{t+1}, first_t

A stored item for step t is the window of rows t-stack+1 .. t+n. Neighbouring items share rows, so
every frame is stored once. `discount` is 0 where the game (or life) ends with that step, else 1.
`first` marks a frame_t that starts an episode, whose observation excludes earlier frames. With the
product D_k = discount_{t+1} ... discount_{t+k} and D_0 = 1, a transition is

    reward   = sum_{k=0}^{n-1} gamma^k D_k reward_{t+k+1}
    discount = gamma^n D_n

so rewards after an end do not count, and an ended window does not bootstrap.

A row is one vector of bytes, not a structure of five columns. Reverb has a cost per column, so one
column halves the time of a sampled batch (see tests/benchmarks/benchmark_replay.py).
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

# Bytes after the frame: action int32, reward float32, discount float32, first int32.
SCALAR_BYTES = 4
ROW_SCALARS = 4
_NUMBERS = 'iuf'  # NumPy's kinds: integers with and without sign, floats
# Integer types with one byte per frame of a stack.
_HISTORY_TYPES = {2: 'uint16', 4: 'uint32', 8: 'uint64'}


def observation_shape(frame_shape: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Shape of `depth` stacked frames.

    Grey pictures get a last axis for the stack; others are concatenated along theirs, newest last.
    """
    if len(frame_shape) == 2:
        return (*frame_shape, depth)
    return (*frame_shape[:-1], frame_shape[-1] * depth)


@dataclasses.dataclass(frozen=True)
class TrajectorySpec:
    """Shape of the rows and of the stored window.

    Attributes:
      frame_shape: of one frame, of any rank.
      frame_stack: frames of an observation.
      n_step: steps of a transition.
      frame_dtype: NumPy's name of the frames' type, a number.
    """

    frame_shape: tuple[int, ...] = (84, 84)
    frame_stack: int = 4
    n_step: int = 3
    frame_dtype: str = 'uint8'

    def __post_init__(self):
        """Checks the sizes.

        Raises:
          ValueError: a size is not positive; the message names the field.
        """
        # Configuration files hold a list, since JSON has no tuples.
        object.__setattr__(self, 'frame_shape', tuple(self.frame_shape))
        if not self.frame_shape or min(self.frame_shape) < 1:
            raise ValueError(f'frame_shape is {self.frame_shape}: positive sizes are needed')
        if np.dtype(self.frame_dtype).kind not in _NUMBERS:
            raise ValueError(f'frame_dtype is {self.frame_dtype}: it must be a type of numbers')
        for name in ('frame_stack', 'n_step'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1')

    @property
    def window(self) -> int:
        """Rows of a stored item: `frame_stack` of the observation and `n_step` more."""
        return self.frame_stack + self.n_step

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return math.prod(self.frame_shape) * np.dtype(self.frame_dtype).itemsize

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of an observation."""
        return observation_shape(self.frame_shape, self.frame_stack)

    @property
    def rows_name(self) -> str:
        """Name of the rows in a shard's signature, which tells apart frames of equal size.

        Grey frames of bytes keep the name by which earlier versions stored them.
        """
        if len(self.frame_shape) == 2 and self.frame_dtype == 'uint8':
            return 'rows'
        sizes = 'x'.join(map(str, self.frame_shape))
        return f'rows_{self.frame_dtype}_{sizes}_stack_{self.frame_stack}'

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the frame, then the scalars."""
        return self.frame_bytes + ROW_SCALARS * SCALAR_BYTES


class Transition(NamedTuple):
    """A batch of n-step transitions, tensors or arrays."""

    observation: Any  # [B, *observation_shape] of the frames' type, newest frame last
    action: Any  # int32[B]
    reward: Any  # float32[B], n-step, discounted
    discount: Any  # float32[B], gamma^n, or 0 after an end
    next_observation: Any  # as `observation`


class Steps(NamedTuple):
    """One agent step of E environments, as the replay stores it."""

    frame: np.ndarray  # [E, *frame_shape], newest frame of the observation
    action: np.ndarray  # int32[E], taken on that observation
    reward: np.ndarray  # float32[E], of the action
    discount: np.ndarray  # float32[E], 0.0 if the game or life ended with the step, else 1.0
    first: np.ndarray  # bool[E], `frame` starts an episode


def pack_rows(steps: Steps, spec: TrajectorySpec) -> np.ndarray:
    """Packs one agent step into rows, uint8[E, row_bytes].

    Raises:
      ValueError: the arrays do not fit the spec or one another.
    """
    frames = np.asarray(steps.frame)
    num_environments = len(frames)
    if frames.shape[1:] != spec.frame_shape or frames.dtype != np.dtype(spec.frame_dtype):
        raise ValueError(
            f'frames are {frames.dtype}{list(frames.shape[1:])}, the replay stores'
            f' {spec.frame_dtype}{list(spec.frame_shape)}'
        )
    action, reward = np.asarray(steps.action), np.asarray(steps.reward, np.float32)
    if not np.issubdtype(action.dtype, np.integer) or not np.isfinite(reward).all():
        raise ValueError(f'actions {action} must be integers, and rewards {reward} finite')
    rows = np.empty((num_environments, spec.row_bytes), np.uint8)
    flat = np.ascontiguousarray(frames).reshape(num_environments, -1)
    rows[:, : spec.frame_bytes] = flat.view(np.uint8)
    scalars = np.empty((num_environments, ROW_SCALARS), np.int32)
    scalars[:, 0] = action
    scalars[:, 1] = reward.view(np.int32)
    scalars[:, 2] = np.asarray(steps.discount, np.float32).view(np.int32)
    scalars[:, 3] = steps.first
    rows[:, spec.frame_bytes :] = scalars.view(np.uint8)
    return rows


def unpack_scalars(rows: 'tf.Tensor', spec: TrajectorySpec) -> 'tf.Tensor':
    """The scalars of rows as int32[B, window, 4]; floats keep their bits."""
    import tensorflow as tf

    tail = rows[:, :, spec.frame_bytes :]
    return tf.bitcast(tf.reshape(tail, (-1, spec.window, ROW_SCALARS, SCALAR_BYTES)), tf.int32)


def n_step_return(
    reward: 'tf.Tensor', discount: 'tf.Tensor', gamma: float
) -> tuple['tf.Tensor', 'tf.Tensor']:
    """n-step reward and discount, float32[B] each, of rewards and discounts float32[B, n]."""
    import tensorflow as tf

    total = tf.zeros_like(reward[:, 0])
    running = tf.ones_like(total)  # gamma^k D_k
    for k in range(reward.shape[1]):
        total += running * reward[:, k]
        running *= gamma * discount[:, k]
    return total, running


def visibility(first: 'tf.Tensor') -> list['tf.Tensor']:
    """Which frames belong to the last frame's observation, one bool[B] for each of the stack.

    A frame before the latest `first`, bool[B, stack], belongs to the previous episode.
    """
    import tensorflow as tf

    visible = [tf.ones_like(first[:, 0])]
    for i in reversed(range(1, first.shape[1])):
        visible.insert(0, tf.logical_and(visible[0], tf.logical_not(first[:, i])))
    return visible


def stacked_frames(frames: 'tf.Tensor', first: 'tf.Tensor') -> 'tf.Tensor':
    """Stacks frames uint8[B, stack, pixels] with first bool[B, stack] to uint8[B, pixels, stack].

    Frames of the previous episode become zeros. A pixel's history is one integer of `stack` bytes,
    built by shifts that vectorise; moving single bytes takes six times as long.
    """
    import tensorflow as tf

    stack = frames.shape[1]
    visible = visibility(first)
    if stack not in _HISTORY_TYPES:
        planes = [frames[:, i] * tf.cast(visible[i], tf.uint8)[:, None] for i in range(stack)]
        return tf.stack(planes, axis=-1)
    kind = tf.as_dtype(_HISTORY_TYPES[stack])
    history = tf.zeros_like(frames[:, 0], kind)
    for i in range(stack):
        place = tf.cast(visible[i], kind) * tf.constant(1 << 8 * i, kind)  # little-endian
        history += tf.cast(frames[:, i], kind) * place[:, None]
    return tf.bitcast(history, tf.uint8)


def concatenated_frames(
    frames: 'tf.Tensor', first: 'tf.Tensor', spec: TrajectorySpec
) -> 'tf.Tensor':
    """Joins frames uint8[B, stack, frame_bytes] with first bool[B, stack] along their last axis.

    Frames of the previous episode become zeros. Returns [B, *observation_shape].
    """
    import tensorflow as tf

    size = np.dtype(spec.frame_dtype).itemsize
    shape = (-1, spec.frame_stack, *spec.frame_shape)
    if size > 1:
        parts = tf.reshape(frames, (*shape, size))
        values = tf.bitcast(parts, spec.frame_dtype)
    else:
        values = tf.bitcast(tf.reshape(frames, shape), spec.frame_dtype)
    planes = []
    for i, visible in enumerate(visibility(first)):
        seen = tf.reshape(visible, (-1, *(1 for _ in spec.frame_shape)))
        planes.append(tf.where(seen, values[:, i], tf.zeros([], values.dtype)))
    return tf.concat(planes, axis=-1)


def observations(frames: 'tf.Tensor', first: 'tf.Tensor', spec: TrajectorySpec) -> 'tf.Tensor':
    """Stacks frames uint8[B, stack, frame_bytes] to observations [B, *observation_shape]."""
    import tensorflow as tf

    if len(spec.frame_shape) != 2 or spec.frame_dtype != 'uint8':
        grey = len(spec.frame_shape) == 2
        apart = dataclasses.replace(spec, frame_shape=(*spec.frame_shape, 1)) if grey else spec
        return concatenated_frames(frames, first, apart)
    stacked = stacked_frames(frames, first)
    return tf.reshape(stacked, (-1, *spec.observation_shape))


def to_transition(rows: 'tf.Tensor', spec: TrajectorySpec, gamma: float) -> Transition:
    """Converts stored windows uint8[B, window, row_bytes] to transitions.

    XLA fuses each observation into one pass over its frames (0.8 ms for 32 windows; a plain
    tf.transpose takes 6 ms). Use `compiled_to_transition` where speed matters.
    """
    import tensorflow as tf

    stack, n_step = spec.frame_stack, spec.n_step
    frames = rows[:, :, : spec.frame_bytes]
    scalars = unpack_scalars(rows, spec)
    now = slice(stack - 1, stack - 1 + n_step)  # rows t .. t+n-1
    reward, discount = n_step_return(
        tf.bitcast(scalars[:, now, 1], tf.float32),
        tf.bitcast(scalars[:, now, 2], tf.float32),
        gamma,
    )
    first = tf.not_equal(scalars[:, :, 3], 0)
    return Transition(
        observation=observations(frames[:, :stack], first[:, :stack], spec),
        action=scalars[:, stack - 1, 0],
        reward=reward,
        discount=discount,
        next_observation=observations(frames[:, n_step:], first[:, n_step:], spec),
    )


@functools.cache
def compiled_to_transition(spec: TrajectorySpec, gamma: float) -> Any:
    """Compiles `to_transition` for one spec and discount with XLA: rows -> Transition."""
    import tensorflow as tf

    return tf.function(lambda rows: to_transition(rows, spec, gamma), jit_compile=True)
