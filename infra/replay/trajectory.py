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

A frame is one array, or a nest of arrays (dictionaries, tuples, lists in one another). In a row its
parts follow one another in the order of `tree.flatten`: those of a dictionary by their sorted keys.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import tree

if TYPE_CHECKING:
    import tensorflow as tf

# Bytes after the frame: action int32, reward float32, discount float32, first int32.
SCALAR_BYTES = 4
ROW_SCALARS = 4
_NUMBERS = 'iuf'  # NumPy's kinds: integers with and without sign, floats
# Integer types with one byte per frame of a stack.
_HISTORY_TYPES = {2: 'uint16', 4: 'uint32', 8: 'uint64'}


@dataclasses.dataclass(frozen=True)
class FramePart:
    """Shape and type of one array of a frame.

    Attributes:
      shape: of any rank but 0.
      dtype: NumPy's name of its type, a number.
    """

    shape: tuple[int, ...] = (84, 84)
    dtype: str = 'uint8'

    def __post_init__(self):
        """Checks shape and type.

        Raises:
          ValueError: a size is not positive, or the type is not a number.
        """
        # Configuration files hold a list, since JSON has no tuples.
        object.__setattr__(self, 'shape', tuple(self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f'shape of a frame is {self.shape}: positive sizes are needed')
        if np.dtype(self.dtype).kind not in _NUMBERS:
            raise ValueError(f'dtype of a frame is {self.dtype}: it must be a type of numbers')

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def is_grey(self) -> bool:
        """Whether it is a grey picture of bytes."""
        return len(self.shape) == 2 and self.dtype == 'uint8'

    def stacked(self, depth: int) -> Self:
        """The part of an observation of `depth` frames.

        Grey pictures get a last axis for the stack; others are concatenated along theirs, newest
        last.
        """
        *outer, last = (*self.shape, 1) if len(self.shape) == 2 else self.shape
        return dataclasses.replace(self, shape=(*outer, last * depth))


@dataclasses.dataclass(frozen=True)
class TrajectorySpec:
    """Shape of the rows and of the stored window.

    Attributes:
      frame: a `FramePart`, or a nest of them.
      frame_stack: frames of an observation.
      n_step: steps of a transition.
    """

    frame: Any = dataclasses.field(default=FramePart(), hash=False)  # a dictionary has no hash
    frame_stack: int = 4
    n_step: int = 3

    def __post_init__(self):
        """Checks the sizes.

        Raises:
          ValueError: a size is not positive; the message names the field.
        """
        if not self.parts:
            raise ValueError(f'frame is {self.frame}: at least one array is needed')
        for name in ('frame_stack', 'n_step'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1')

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`; tuples may have become lists, as JSON makes them.

        Reads what earlier versions wrote, too, whose frames were one array.

        Raises:
          TypeError: a field is unknown.
          ValueError: a value is out of its range.
        """
        values = dict(values)
        if 'frame_shape' in values:  # and grey bytes, if they name no type
            kind = values.pop('frame_dtype', 'uint8')
            values['frame'] = {'shape': values.pop('frame_shape'), 'dtype': kind}
        if 'frame' in values:
            values['frame'] = tree.traverse(_part_of, values['frame'])
        return cls(**values)

    @functools.cached_property
    def parts(self) -> tuple[FramePart, ...]:
        """The arrays of a frame, in the order of a row."""
        return tuple(tree.flatten(self.frame))

    @property
    def window(self) -> int:
        """Rows of a stored item: `frame_stack` of the observation and `n_step` more."""
        return self.frame_stack + self.n_step

    @functools.cached_property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return sum(part.size for part in self.parts)

    @property
    def observation(self) -> Any:
        """Parts of an observation, nested as `frame`."""
        return tree.map_structure(lambda part: part.stacked(self.frame_stack), self.frame)

    @property
    def rows_name(self) -> str:
        """Name of the rows in a shard's signature, which tells apart frames of equal size.

        Grey frames of bytes keep the name by which earlier versions stored them.
        """
        if self.frame is self.parts[0] and self.frame.is_grey:
            return 'rows'
        names = [
            '_'.join([*map(str, path), part.dtype, 'x'.join(map(str, part.shape))])
            for path, part in tree.flatten_with_path(self.frame)
        ]
        return '_'.join(['rows', *names, f'stack_{self.frame_stack}'])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the frame, then the scalars."""
        return self.frame_bytes + ROW_SCALARS * SCALAR_BYTES


def _part_of(values: Any) -> FramePart | None:
    """The part that a dictionary describes, None for others: those hold parts."""
    described = isinstance(values, dict) and isinstance(values.get('dtype'), str)
    return FramePart(**values) if described else None


class Transition(NamedTuple):
    """A batch of n-step transitions, tensors or arrays."""

    observation: Any  # [B, ...] of the frames' type and nest, newest frame last
    action: Any  # int32[B]
    reward: Any  # float32[B], n-step, discounted
    discount: Any  # float32[B], gamma^n, or 0 after an end
    next_observation: Any  # as `observation`


class Steps(NamedTuple):
    """One agent step of E environments, as the replay stores it."""

    frame: Any  # [E, *shape] or a nest of such, newest frame of the observation
    action: np.ndarray  # int32[E], taken on that observation
    reward: np.ndarray  # float32[E], of the action
    discount: np.ndarray  # float32[E], 0.0 if the game or life ended with the step, else 1.0
    first: np.ndarray  # bool[E], `frame` starts an episode


def pack_rows(steps: Steps, spec: TrajectorySpec) -> np.ndarray:
    """Packs one agent step into rows, uint8[E, row_bytes].

    Raises:
      ValueError: the arrays do not fit the spec or one another.
    """
    frame = [np.asarray(array) for array in tree.flatten(steps.frame)]
    found = [(array.shape[1:], array.dtype) for array in frame]
    if found != [(part.shape, part.dtype) for part in spec.parts]:
        given = [f'{kind}{list(shape)}' for shape, kind in found]
        stored = [f'{part.dtype}{list(part.shape)}' for part in spec.parts]
        raise ValueError(f'frames are {", ".join(given)}, the replay stores {", ".join(stored)}')
    action, reward = np.asarray(steps.action), np.asarray(steps.reward, np.float32)
    if not np.issubdtype(action.dtype, np.integer) or not np.isfinite(reward).all():
        raise ValueError(f'actions {action} must be integers, and rewards {reward} finite')
    num_environments, start = len(frame[0]), 0
    rows = np.empty((num_environments, spec.row_bytes), np.uint8)
    for array, part in zip(frame, spec.parts):
        flat = np.ascontiguousarray(array).reshape(num_environments, -1)
        rows[:, start : start + part.size] = flat.view(np.uint8)
        start += part.size
    scalars = np.empty((num_environments, ROW_SCALARS), np.int32)
    scalars[:, 0] = action
    scalars[:, 1] = reward.view(np.int32)
    scalars[:, 2] = np.asarray(steps.discount, np.float32).view(np.int32)
    scalars[:, 3] = steps.first
    rows[:, start:] = scalars.view(np.uint8)
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


def concatenated_frames(frames: 'tf.Tensor', first: 'tf.Tensor', part: FramePart) -> 'tf.Tensor':
    """Joins frames uint8[B, stack, bytes] with first bool[B, stack] along their last axis.

    Frames of the previous episode become zeros. Returns [B, ...] of the part's type.
    """
    import tensorflow as tf

    size = np.dtype(part.dtype).itemsize
    shape = (-1, first.shape[1], *part.stacked(1).shape)
    values = tf.bitcast(tf.reshape(frames, (*shape, size) if size > 1 else shape), part.dtype)
    planes = []
    for i, visible in enumerate(visibility(first)):
        seen = tf.reshape(visible, (-1, *(1 for _ in shape[2:])))
        planes.append(tf.where(seen, values[:, i], tf.zeros([], values.dtype)))
    return tf.concat(planes, axis=-1)


def observations(frames: 'tf.Tensor', first: 'tf.Tensor', spec: TrajectorySpec) -> Any:
    """Stacks frames uint8[B, stack, frame_bytes] to observations [B, ...], nested as frames."""
    import tensorflow as tf

    stacked, start = [], 0
    for part in spec.parts:
        own = frames[:, :, start : start + part.size]
        if part.is_grey:
            shape = (-1, *part.stacked(spec.frame_stack).shape)
            stacked.append(tf.reshape(stacked_frames(own, first), shape))
        else:
            stacked.append(concatenated_frames(own, first, part))
        start += part.size
    return tree.unflatten_as(spec.frame, stacked)


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
