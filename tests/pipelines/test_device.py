"""A learner on a device of its own, and the devices that a process sees."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from agents import device
from pipelines import run
from pipelines.errors import UsageError
from pipelines.experiment import builders, command_line, presets, unused_flags
from pipelines.preflight import checklist

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_second_device_computes_while_batches_and_gradients_travel():
    # Devices must be made before TensorFlow is first used: in a process of its own.
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--timeout=150']
    result = subprocess.run(
        [*command, 'tests/support/on_two_devices.py'], cwd=_ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert ' passed' in result.stdout


@pytest.mark.parametrize(
    ('flags', 'warned'),
    [('avx2 avx512f', True), ('avx512f avx512_bf16', False), ('amx_bf16', False)],
)
def test_a_processor_without_products_of_bfloat16_is_warned_of_them(
    flags, warned, tmp_path, monkeypatch, capsys
):
    (tmp_path / 'cpuinfo').write_text(f'flags\t\t: fpu {flags} fma\n')
    monkeypatch.setattr(device, '_CPU_INFO', tmp_path / 'cpuinfo')
    for precision in ('float32', 'bfloat16', 'auto'):
        argv = [f'--precision={precision}', '--learner_device=cpu']
        launch, _, values = command_line.parse(argv)
        checklist.warn_of_precision(presets.experiment('laptop', values), launch)
    assert capsys.readouterr().out.count('neither AVX512_BF16 nor AMX') == warned
    assert device.precision('auto', device.HOST) == ('float32' if warned else 'bfloat16')
    assert device.precision('auto', '/device:GPU:0') == 'float32'
    assert device.precision('bfloat16', device.HOST) == 'bfloat16'
    monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', '0')
    assert device.precision('auto', device.HOST) == 'float32'


def test_auto_is_float32_where_the_processor_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(device, '_CPU_INFO', tmp_path / 'absent')
    assert device.precision('auto', device.HOST) == 'float32'


@pytest.mark.parametrize(('flags', 'chosen'), [('avx2', 'float32'), ('avx512_bf16', 'bfloat16')])
def test_auto_is_decided_for_the_learner_and_policies_keep_float32(
    flags, chosen, tmp_path, monkeypatch
):
    (tmp_path / 'cpuinfo').write_text(f'flags : {flags}\n')
    monkeypatch.setattr(device, '_CPU_INFO', tmp_path / 'cpuinfo')

    def values(build, precision):
        config = presets.experiment('laptop', {'precision': precision})
        frames = np.random.default_rng(0).integers(256, size=(2, 42, 42, 4), dtype=np.uint8)
        return build(config).model.outputs(frames).numpy()

    learner, policy = builders.build_learner, builders.build_policy
    np.testing.assert_array_equal(values(learner, 'auto'), values(learner, chosen))
    np.testing.assert_array_equal(values(policy, 'auto'), values(policy, 'float32'))
    assert (values(learner, 'bfloat16') != values(learner, 'float32')).any()
    config = presets.experiment('laptop', {})  # it has 'auto'
    assert learner(config).model.precision == chosen
    assert policy(config).model.precision == 'float32'


def test_auto_suits_a_network_of_the_user_and_bfloat16_is_refused_there():
    own = {'q_network': 'tests.support.own_network:dense'}

    def check(precision):
        config = presets.experiment('laptop', {**own, 'precision': precision})
        unused_flags.require_effect(config, {'precision': precision})

    check('auto')
    with pytest.raises(UsageError, match='--precision bfloat16: no effect without'):
        check('bfloat16')


_SETTINGS = """
import hashlib, os, sys
from pipelines.experiment import presets
from pipelines.workers import process
process.whole_cores = lambda: 6
threads = {'num_learners': int(sys.argv[1]), 'worker_threads': int(sys.argv[2])}
config = presets.experiment('laptop', threads)
process.prepare_process(config, learns=sys.argv[3] == 'learns')
import numpy as np
import tensorflow as tf
from infra.replay.trajectory import Transition
from pipelines.experiment import builders
random = np.random.default_rng(0)
frames = random.integers(256, size=(2, 32, 42, 42, 4), dtype=np.uint8)
numbers = random.random((3, 32), np.float32)
batch = Transition(frames[0], np.zeros(32, np.int32), numbers[0], numbers[1], frames[1])
gradient = builders.build_learner(config).gradient(batch, numbers[2])[0]
print(os.environ['TF_FORCE_GPU_ALLOW_GROWTH'], len(tf.config.get_visible_devices('GPU')))
print(tf.config.threading.get_inter_op_parallelism_threads())
print(hashlib.sha256(gradient.tobytes()).hexdigest(), np.count_nonzero(gradient) > 1000)
"""


def test_a_learner_computes_two_operations_at_a_time_on_spare_cores_with_the_same_gradient():
    # Six cores: five learners leave one, six none, nor do three of two threads each.
    cases = [(5, 1, 'learns', 2), (6, 1, 'learns', 1), (3, 2, 'learns', 1), (5, 1, 'acts', 1)]
    environment = {k: v for k, v in os.environ.items() if k != 'TF_FORCE_GPU_ALLOW_GROWTH'}
    gradients = set()
    for learners, threads, role, operations in cases:
        result = subprocess.run(
            [sys.executable, '-c', _SETTINGS, str(learners), str(threads), role],
            cwd=_ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.stdout.split()[:3] == ['true', '0', str(operations)], result.stderr
        if threads == 1:  # two sum in another order on some processors, 1e-6 apart
            gradients.add(tuple(result.stdout.split()[3:]))
    assert [computed for _, computed in gradients] == ['True']  # one gradient, not of zeros


@pytest.mark.parametrize('value', ['gpu', 'gpu:3'])
def test_an_accelerator_that_this_machine_lacks_is_refused_before_anything_starts(
    value, tmp_path, capsys
):
    argv = [f'--learner_device={value}', f'--run_dir={tmp_path / "run"}']
    assert run.main(argv) == 2
    assert f'--learner_device {value}: TensorFlow sees' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_device_that_has_no_such_name_is_refused(tmp_path, capsys):
    assert run.main(['--learner_device=tpu', f'--run_dir={tmp_path / "run"}']) == 2
    assert 'auto, cpu, gpu, or gpu:N' in capsys.readouterr().err
