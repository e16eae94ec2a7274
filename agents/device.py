"""Chooses the learner's device: value of --learner_device in, TensorFlow device name out."""

import pathlib

import tensorflow as tf

from infra.array_function import HOST

_CPU_INFO = pathlib.Path('/proc/cpuinfo')


class DeviceError(ValueError):
    """The requested device does not exist; the message gives the number found and the remedy."""


def choose(wanted: str, worker: int = 0) -> str:
    """TensorFlow's name of the device for learner number `worker`, such as '/device:GPU:0'.

    Args:
      wanted: 'auto' (a GPU if one exists), 'cpu', 'gpu', or a numbered device such as 'gpu:1'.
        Without a number, learners on one machine are spread over its GPUs in turn.
      worker: number of the learner, from 0.

    Raises:
      DeviceError: the device does not exist.
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
    """Checks that this machine has the requested GPU, without allocating its memory.

    Raises:
      DeviceError: the GPU does not exist.
    """
    there = len(tf.config.list_physical_devices('GPU'))
    kind, _, index = wanted.partition(':')
    if kind == 'gpu' and int(index or 0) >= there:
        raise _absent(wanted, there)


def multiplies_bfloat16(wanted: str) -> bool:
    """Whether a device of this machine (see `choose`) has products of bfloat16, as GPUs do."""
    return _has_gpu(wanted) or _processor_multiplies_bfloat16()


def precision(wanted: str) -> str:
    """'float32' or 'bfloat16'; 'auto' is what a network computes faster in on this machine."""
    if wanted != 'auto':
        return wanted
    faster = _processor_multiplies_bfloat16() and not _has_gpu('auto')
    return 'bfloat16' if faster else 'float32'


def _has_gpu(wanted: str) -> bool:
    return not wanted.startswith('cpu') and bool(tf.config.list_physical_devices('GPU'))


def _processor_multiplies_bfloat16() -> bool:
    return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(_CPU_INFO.read_text().split())


def _absent(wanted: str, there: int) -> DeviceError:
    return DeviceError(
        f'--learner_device {wanted}: TensorFlow sees {there} of this kind; install driver and'
        ' libraries (see infra/docker, learner-gpu), or choose another.'
    )


def is_host(device: str) -> bool:
    """Whether the device computes in host memory, so that arrays need no copy."""
    return device.endswith(HOST)
