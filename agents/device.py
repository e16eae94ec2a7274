"""Where a learner computes: the value of --learner_device in, TensorFlow's name of a device out."""

import tensorflow as tf

from infra.array_function import HOST


class DeviceError(ValueError):
    """The device asked for is not there; the message says how many are, and the remedy."""


def choose(wanted: str, worker: int = 0) -> str:
    """The device of learner number `worker` in TensorFlow's words, such as '/device:GPU:0'.

    Args:
      wanted: 'auto' (an accelerator if there is one), 'cpu', 'gpu', or one of them by its number,
        such as 'gpu:1'. Several learners on a machine take its accelerators in turn.
      worker: number of the learner, from 0.

    Raises:
      DeviceError: there is no such device.
    """
    kind, _, index = wanted.partition(':')
    kind = {'auto': 'gpu'}.get(kind, kind).upper()
    there = len(tf.config.list_logical_devices(kind))
    if wanted == 'auto' and not there:
        return HOST
    number = int(index or (worker % max(1, there) if kind == 'GPU' else 0))
    if number >= there:
        raise _absent(wanted, there)
    return f'/device:{kind}:{number}'


def require(wanted: str) -> None:
    """Checks that this machine has the GPU asked for, and takes nothing of it.

    Raises:
      DeviceError: it has not.
    """
    there = len(tf.config.list_physical_devices('GPU'))
    kind, _, index = wanted.partition(':')
    if kind == 'gpu' and int(index or 0) >= there:
        raise _absent(wanted, there)


def _absent(wanted: str, there: int) -> DeviceError:
    return DeviceError(
        f'--learner_device {wanted}: TensorFlow sees {there} of this kind; install driver and'
        ' libraries (see infra/docker, learner-gpu), or choose another.'
    )


def is_host(device: str) -> bool:
    """Whether arrays are already where the device computes: nothing has to be copied there."""
    return device.endswith(HOST)
