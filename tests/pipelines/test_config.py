"""Configuration: presets as data, flags over presets, config.json there and back."""

import dataclasses
import json
import pathlib

import pytest

from infra.sealed import unseal
from pipelines.errors import UsageError
from pipelines.experiment import command_line, presets, protocols
from pipelines.experiment import config as config_lib
from tests.support.flips import flips_of


@pytest.mark.parametrize('name', presets.PRESETS)
def test_every_value_of_a_preset_is_a_setting_and_arrives(name):
    experiment = presets.experiment(name, {})
    known = config_lib.fields()
    for setting, value in presets.PRESETS[name].items():
        group, _ = known[setting]
        assert getattr(getattr(experiment, group), setting) == value


def test_settings_of_different_groups_have_different_names():
    names = [field.name for _, group in config_lib.groups() for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_every_setting_has_help():
    for name, (_, field) in config_lib.fields().items():
        assert len(field.metadata['help']) > 10, name


@pytest.mark.parametrize('name', presets.PRESETS)
def test_config_json_comes_back_as_it_was(name):
    experiment = presets.experiment(name, {'game': 'breakout', 'learning_rate': 0.125})
    assert config_lib.from_json(config_lib.to_json(experiment)) == experiment


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{}',
        '[]',
        '[' * 100_000,
        '{"preset": "laptop", "run": {"colour": 1}}',
        '{"preset": "laptop"}',
    ],
)
def test_damaged_config_json_is_refused(text):
    with pytest.raises(UsageError, match=r'config\.json'):
        config_lib.from_json(text)


@pytest.mark.parametrize(
    ('setting', 'value'),
    [('num_actors', 1.5), ('num_actors', True), ('torso', 3), ('double_dqn', 'yes')],
)
def test_a_value_of_another_type_in_config_json_is_named(setting, value):
    values = unseal(json.loads(config_lib.to_json(presets.experiment('laptop', {}))))
    group, _ = config_lib.fields()[setting]
    values[group][setting] = value
    with pytest.raises(UsageError, match=f'{setting} {value!r}: must be of type'):
        config_lib.from_json(json.dumps(values))


def test_a_whole_number_in_config_json_passes_for_a_float():
    text = config_lib.to_json(presets.experiment('laptop', {'discount': 1.0}))
    unsealed = json.dumps(unseal(json.loads(text)))  # as an earlier version, or a user, writes it
    edited = unsealed.replace('"discount": 1.0', '"discount": 1')
    assert edited != unsealed
    assert config_lib.from_json(edited).agent.discount == 1


def test_outside_atari_a_preset_has_no_torso_for_half_of_ataris_screen_unless_it_is_named():
    elsewhere = presets.experiment('laptop', {'game': 'CartPole-v1'})
    assert (elsewhere.network.torso, elsewhere.environment.screen_size) == ('narrow', 84)
    named = presets.experiment('laptop', {'game': 'CartPole-v1', 'torso': 'nature_half'})
    assert named.network.torso == 'nature_half'


def test_a_run_of_an_earlier_version_keeps_the_setting_that_has_another_name_now():
    values = unseal(json.loads(config_lib.to_json(presets.experiment('laptop', {}))))
    del values['parameter_server']['wire']
    values['parameter_server']['wire_dtype'] = 'bfloat16'
    assert config_lib.from_json(json.dumps(values)).parameter_server.wire == 'bfloat16'


def test_the_configuration_of_a_run_of_95d57f4_is_read_with_the_values_that_it_lacks():
    path = pathlib.Path(__file__).with_name('config_of_2026_11_24.json')
    written = json.loads(path.read_text())
    read = config_lib.load(path)
    renamed = {'wire_dtype': 'wire'}
    for name, group in written.items():
        for setting, value in group.items() if name != 'preset' else ():
            assert getattr(getattr(read, name), renamed.get(setting, setting)) == value
    lacked = {
        (name, setting): value
        for name, group in config_lib.groups()
        for setting, value in dataclasses.asdict(getattr(read, name)).items()
        if setting not in {renamed.get(each, each) for each in written[name]}
    }
    # Since then: what the code did before each had a flag.
    assert lacked == {
        ('run', 'evaluation_protocol'): 'noop',
        ('run', 'evaluator_cpu_share'): 0.03,
        ('run', 'evaluator_episodes'): 5,
        ('run', 'evaluation_period_updates'): 10_000,
        ('run', 'video'): False,
        ('environment', 'screen_size'): 84,
        ('environment', 'full_action_space'): False,
        ('environment', 'env_processes'): False,
        ('network', 'standardize_input'): False,
        ('network', 'centralize_gradient'): False,
        ('network', 'negative_slope'): 0.0,
        ('network', 'precision'): 'float32',
        ('network', 'dense_layers'): '256,256',
        ('network', 'q_network'): 'builtin',
        ('run', 'bundle_replay'): 'worker',
        ('agent', 'munchausen'): False,
        ('agent', 'munchausen_temperature'): 0.03,
        ('agent', 'munchausen_scale'): 0.9,
        ('agent', 'munchausen_lowest'): -1.0,
        ('agent', 'num_fractions'): 8,
        ('agent', 'num_acting_fractions'): 32,
        ('agent', 'num_cosines'): 64,
        ('learner', 'outlier_rule'): 'every',
        ('learner', 'pushes_in_flight'): 1,
        ('learner', 'batches_in_flight'): 1,
        ('parameter_server', 'learning_rate_end'): 0.0,
        ('parameter_server', 'learning_rate_updates'): 0,
        ('parameter_server', 'average_updates'): 0,
    }


def test_a_flipped_bit_of_config_json_is_refused_in_one_line(tmp_path):
    experiment = presets.experiment('laptop', {})
    file = tmp_path / 'config.json'
    file.write_text(config_lib.to_json(experiment))
    for _ in flips_of(file):
        try:
            assert config_lib.load(file) == experiment  # the same to a reader of JSON
        except UsageError as error:
            assert '\n' not in str(error)  # noqa: PT017
    assert config_lib.load(file) == experiment


def test_help_shows_the_default_presets_value(capsys):
    with pytest.raises(SystemExit):
        command_line.parse(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'Convolutions and dense layer' in text
    assert (
        'a dense layer of 128 (Young and Tian 2019). Default: narrow_half.' in text
    )  # the default of the field itself is nature


def test_paper_preset_has_the_papers_constants():
    paper = presets.experiment('paper', {})
    assert (paper.run.topology, paper.run.num_actors, paper.run.num_learners) == (
        'bundled',
        100,
        100,
    )
    assert paper.parameter_server.num_parameter_shards == 31
    assert paper.parameter_server.target_update_period == 60_000
    assert paper.parameter_server.optimizer == 'adagrad'
    assert (paper.actor.epsilon_end, paper.actor.epsilon_updates) == (0.1, 1_000_000)
    assert paper.replay.replay_capacity == 100 * 1_000_000


def test_nature_preset_is_that_of_one_process():
    nature = presets.experiment('nature', {})
    # The published program's 10,000 agent steps between two target networks, at 4 an update.
    assert nature.parameter_server.target_update_period == 10_000 / 4
    assert not nature.learner.overlap_push  # no gradient of parameters that are an update old


@pytest.mark.parametrize(
    ('preset', 'protocol', 'minutes', 'epsilon'),
    [
        ('nature', 'noop', 5, 0.05),
        ('paper', 'noop', 5, 0.05),
        ('apex', 'rainbow', 30, 0.0),
        ('rainbow_lite', 'rainbow', 30, 0.001),
        ('machado', 'machado', 30, 0.01),
    ],
)
def test_each_preset_is_evaluated_by_the_rules_of_its_paper(preset, protocol, minutes, epsilon):
    experiment = presets.experiment(preset, {})
    run, environment = experiment.run, experiment.environment
    assert run.evaluation_protocol == protocol
    assert run.evaluation_max_frames == minutes * 60 * 60  # 60 frames a second
    assert run.evaluation_epsilon == epsilon
    values = {'epsilon': epsilon, 'max_frames': run.evaluation_max_frames}
    assert protocols.deviations(protocols.protocol(protocol, values), environment) == {}


def test_machados_protocol_needs_all_actions_before_the_run_starts():
    with pytest.raises(UsageError, match='Fix: add --full_action_space'):
        presets.experiment('laptop', {'evaluation_protocol': 'machado'})


def test_machado_preset_trains_by_the_rules_of_its_protocol():
    environment = presets.experiment('machado', {}).environment
    rules = protocols.PROTOCOLS['machado'].environment(environment)
    assert rules == environment
    assert environment.full_action_space


@pytest.mark.parametrize(
    ('flag', 'setting', 'value'),
    [
        ('--n_step=5', 'n_step', 5),
        ('--learning_rate=1e-3', 'learning_rate', 1e-3),
        ('--optimizer=rmsprop', 'optimizer', 'rmsprop'),
        ('--no-double_dqn', 'double_dqn', False),
        ('--shared_memory', 'shared_memory', True),
    ],
)
def test_a_flag_overrides_the_preset(flag, setting, value):
    launch, preset, values = command_line.parse(['--preset=laptop', flag])
    assert values == {setting: value}
    group, _ = config_lib.fields()[setting]
    assert getattr(getattr(command_line.experiment(preset, values), group), setting) == value
    assert launch.runner == 'DirectRunner'


def test_beams_own_flags_pass_through():
    launch, _, values = command_line.parse(['--job_name=gorila', '--game=pong'])
    assert launch.beam_flags == ('--job_name=gorila',)
    assert values == {'game': 'pong'}


def test_an_id_of_gymnasium_names_the_game_and_one_line_says_what_is_not_taken_over(capsys):
    _, _, values = command_line.parse(['--game=ALE/Pong-v5'])
    assert values == {'game': 'pong'}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('--game ALE/Pong-v5: plays pong by the flags of this project')
    assert 'sticky actions 0.25' in line


def test_a_resumed_run_knows_its_game_in_every_spelling():
    before = presets.experiment('laptop', {'game': 'space_invaders'})
    _, preset, values = command_line.parse(['--game=SpaceInvaders'])
    assert command_line.resumed(before, preset, values) == before


def test_a_resumed_run_whose_game_cannot_be_played_here_is_refused():
    before = presets.experiment('laptop', {'game': 'warlords'})
    with pytest.raises(UsageError, match="--game: game 'warlords' cannot be played"):
        command_line.resumed(before, None, {})


def test_resuming_keeps_what_was_learned_with_and_extends_the_budget():
    before = presets.experiment('laptop', {})
    after = command_line.resumed(before, None, {'max_frames': 123_456})
    assert after.run.max_frames == 123_456
    assert dataclasses.replace(after, run=before.run) == before
    with pytest.raises(UsageError, match='--n_step 7'):
        command_line.resumed(before, None, {'n_step': 7})
    with pytest.raises(UsageError, match='--preset nature'):
        command_line.resumed(before, 'nature', {})


def test_budget_is_counted_in_agent_steps_rounded_up():
    # 10 frames at 4 a step need a third step.
    small = presets.experiment('laptop', {'max_frames': 10, 'min_replay_size': 1})
    assert small.max_agent_steps == 3
