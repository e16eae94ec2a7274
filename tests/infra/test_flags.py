"""Values of flags: whole numbers as people write them, in every command; refusals of one line."""

import argparse
import typing
from collections.abc import Callable

import pytest

from infra import deployment
from infra.flags import as_flag, integer
from infra.parameter_server import server as parameter_server
from infra.replay import server as replay_server
from pipelines import evaluate, plan, stop
from pipelines.errors import UsageError
from pipelines.experiment import command_line, presets
from pipelines.experiment import config as config_lib

# Each command other than run.py and servers.py, which share theirs: its parser's call, what it
# needs, and its flags that are whole numbers.
COMMANDS: dict[str, tuple[Callable, list[str], list[str]]] = {
    'plan.py': (plan.parse, ['--target_fps=1'], ['action_repeat', 'machine_cores']),
    'evaluate.py': (evaluate.parse, ['--run_dir=a'], ['episodes', 'seed']),
    'python -m infra.deployment hosts': (
        deployment.parse,
        ['hosts', '--parameter_hosts=a', '--replay_hosts=b'],
        ['parameter_shards', 'replay_shards', 'parameter_port', 'replay_port'],
    ),
    'python -m infra.replay.server': (replay_server.parse, ['--config=a'], ['shard', 'port']),
    'python -m infra.parameter_server.server': (
        parameter_server.parse,
        ['--config=a'],
        ['shard', 'port'],
    ),
}
INTEGER_FLAGS = [(command, flag) for command, (_, _, flags) in COMMANDS.items() for flag in flags]
INTEGER_SETTINGS = [
    field
    for _, group in config_lib.groups()
    for field, kind in typing.get_type_hints(group).items()
    if kind is int
]


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1e6', 1_000_000),
        ('1_000_000', 1_000_000),
        ('2.5e3', 2500),
        ('3.0', 3),
        ('-4', -4),
        # A float would round it to 2^63.
        ('9223372036854775807', 2**63 - 1),
    ],
)
def test_a_whole_number_is_one_however_it_is_written(text, value):
    assert integer(text) == value
    assert type(integer(text)) is int


@pytest.mark.parametrize(
    'text', ['1.5', '1e-3', '', 'many', '0x10', '²', 'inf', 'nan', 'snan', '9223372036854775808']
    + ['1e999999999', '-1e999999999', '9' * 5000]
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match='is not a 64-bit integer'):
        integer(text)


@pytest.mark.parametrize('setting', INTEGER_SETTINGS)
def test_every_whole_number_of_a_run_may_be_written_with_an_exponent(setting):
    _, _, values = command_line.parse([f'--{setting}=1e2'])
    assert values == {setting: 100}
    assert type(values[setting]) is int
    with pytest.raises(UsageError, match=f"--{setting}: '1.5' is not a 64-bit integer"):
        command_line.parse([f'--{setting}=1.5'])


@pytest.mark.parametrize(('command', 'flag'), INTEGER_FLAGS)
def test_so_may_those_of_every_other_command_and_a_refusal_is_one_line(command, flag, capsys):
    parse, needed, flags = COMMANDS[command]
    others = [f'--{other}=1' for other in flags if other != flag]
    assert getattr(parse([*needed, *others, f'--{flag}=1e2']), flag) == 100
    with pytest.raises(SystemExit) as refused:
        parse([*needed, *others, f'--{flag}=1.5'])
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{flag}: '1.5' is not a 64-bit integer" in line


@pytest.mark.parametrize('seconds', ['0', '-1', 'nan', 'inf', 'soon'])
def test_a_time_that_is_none_is_refused_before_a_run_is_stopped(seconds, capsys):
    with pytest.raises(SystemExit):
        stop.main(['--run_dir=somewhere', f'--timeout_seconds={seconds}'])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('stop.py: argument --timeout_seconds')


@pytest.mark.parametrize('preset', presets.PRESETS)
def test_help_beside_a_preset_shows_its_values(preset, capsys):
    with pytest.raises(SystemExit):
        command_line.parse([f'--preset={preset}', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert f'those of the preset `{preset}`' in text
    experiment = presets.experiment(preset, {})
    assert f'after which the run ends. Default: {experiment.run.max_frames}.' in text
    torso = f'a dense layer of 128 (Young and Tian 2019). Default: {experiment.network.torso}.'
    assert torso in text


def test_help_beside_a_preset_that_does_not_exist_names_those_that_do():
    with pytest.raises(
        UsageError, match="--preset 'desktop': unknown. Fix: choose one of laptop, nature"
    ):
        command_line.parse(['--preset=desktop', '--help'])


@pytest.mark.parametrize(
    ('parse', 'flag'),
    [
        *((parameter_server.parse, flag) for flag in ('--tls_certificate', '--checkpoint_root')),
        *((replay_server.parse, flag) for flag in ('--restore', '--state_dir', '--ready_file')),
    ],
)
def test_an_empty_path_of_a_server_never_means_that_the_flag_is_absent(parse, flag, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(['--config=a', '--shard=0', f'{flag}='])
    assert refused.value.code == 2
    assert f'{flag}: empty. Fix: name a path.' in capsys.readouterr().err


def test_a_setting_reads_as_a_command_gives_it():
    assert as_flag('n_step', 5) == '--n_step 5'
    assert as_flag('double_dqn', True) == '--double_dqn'
    assert as_flag('double_dqn', False) == '--no-double_dqn'
