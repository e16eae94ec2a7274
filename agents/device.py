"""The learner's device and numbers: --learner_device, --precision in, names of TensorFlow out."""

import os
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
    if not wanted.startswith('cpu') and tf.config.list_physical_devices('GPU'):
        return True
    return _processor_multiplies_bfloat16()


def precision(wanted: str, device: str) -> str:
    """The numbers of a gradient's convolutions on a device that TensorFlow names so.

    'auto' is 'bfloat16' on a processor that multiplies it, else 'float32'.
    """
    if wanted != 'auto':
        return wanted
    return 'bfloat16' if is_host(device) and _processor_multiplies_bfloat16() else 'float32'


def _processor_multiplies_bfloat16() -> bool:
    """Whether oneDNN, which has the kernels, is on, and the processor has the instructions."""
    if os.environ.get('TF_ENABLE_ONEDNN_OPTS') == '0':
        return False
    try:
        flags = _CPU_INFO.read_text().split()
    except OSError:  # unknown
        return False
    return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def _absent(wanted: str, there: int) -> DeviceError:
    return DeviceError(
        f'--learner_device {wanted}: TensorFlow sees {there} of this kind; install driver and'
        ' libraries (see infra/docker, learner-gpu), or choose another.'
    )


def is_host(device: str) -> bool:
    """Whether the device computes in host memory, so that arrays need no copy."""
    return device.endswith(HOST)
