"""Environments beside Atari on the command line and in evaluations."""

import json
import os

import pytest

from agents.config import EnvironmentConfig
from agents.environments.errors import EnvironmentFailedError
from pipelines import evaluate, export, run
from pipelines.errors import UsageError
from pipelines.evaluation import play
from pipelines.experiment import command_line, config, protocols
from pipelines.launch.interrupts import StartUp
from pipelines.preflight import checklist
from pipelines.storage.evaluations import rules
from tests.support import saved_run

OWN = 'tests.support.environments:counter'
STRUCTURED = 'tests.support.environments:structured'


def experiment(*argv):
    _, preset, values = command_line.parse(argv)
    return command_line.experiment(preset, values)


def test_an_environment_beside_atari_has_a_preset_of_its_own_and_none_of_ataris_rules():
    found = experiment('--environment=CartPole-v1')
    assert (found.preset, found.environment.game) == ('cart_pole', 'CartPole-v1')
    environment = found.environment
    assert (environment.action_repeat, environment.frame_stack, environment.max_noops) == (1, 1, 0)
    assert not environment.life_loss_ends_episode
    assert not found.actor.clip_reward
    assert found.run.evaluation_protocol == 'plain'
    assert experiment('--environment=Acrobot-v1').preset == 'classic'
    assert experiment('--environment=MinAtar/Breakout-v1').preset == 'minatar'
    assert experiment('--environment=ALE/Pong-v5') == experiment('--game=pong') == experiment()
    named = experiment('--environment=CartPole-v1', '--preset=laptop')
    assert (named.preset, named.environment.action_repeat) == ('laptop', 1)


def test_a_budget_of_steps_is_one_of_frames_at_the_environments_action_repeat():
    assert experiment('--max_steps=50000').run.max_frames == 200_000  # four frames a step
    cart = experiment('--environment=CartPole-v1', '--max_steps=50000')
    assert (cart.run.max_frames, cart.max_agent_steps) == (50_000, 50_000)
    assert command_line.resumed(cart, None, {'max_steps': 60_000}).run.max_frames == 60_000
    with pytest.raises(UsageError, match='--max_steps: contradicts --max_frames'):
        experiment('--max_steps=50000', '--max_frames=200000')
    # The preset's own budget ends before 60,000 steps.
    more = ('--min_replay_size=60000', '--max_steps=70000')
    assert experiment('--environment=CartPole-v1', *more).max_agent_steps == 70_000


def test_a_resumed_run_names_the_flag_of_a_value_that_it_must_keep():
    before = experiment('--environment=CartPole-v1')
    for flags, message in (
        (['--environment=Acrobot-v1'], '--environment Acrobot-v1: contradicts --resume, since'),
        (['--game=Acrobot-v1'], '--game Acrobot-v1: contradicts --resume, since'),
        (['--max_steps=300'], '--max_steps 300: the run ends before learning starts'),
    ):
        _, preset, values = command_line.parse(flags)
        with pytest.raises(UsageError, match=message):
            command_line.resumed(before, preset, values)
    _, preset, values = command_line.parse(['--environment=CartPole-v1'])
    assert command_line.resumed(before, preset, values) == before


def test_one_environment_may_have_both_flags():
    flags = ('--environment=ALE/Pong-v5', '--game=pong')
    assert experiment(*flags) == experiment()


def test_a_network_of_googles_may_be_named_where_it_has_an_effect():
    launch, _, _ = command_line.parse(['--runner=DataflowRunner', '--network=default'])
    assert launch.beam_flags == ('--network=default',)


def test_a_run_is_resumed_with_a_larger_budget_of_steps(tmp_path):
    before = experiment('--environment=CartPole-v1', '--max_steps=50000')
    (tmp_path / 'config.json').write_text(config.to_json(before))
    argv = [f'--run_dir={tmp_path}', '--resume', '--max_steps=60000']
    found, launch = run.prepare(argv, StartUp())
    assert (found.run.max_frames, launch.resume) == (60_000, True)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--environment=CartPole-v1', '--action_repeat=4'], '--action_repeat'),
        (['--environment=CartPole-v1', '--max_noops=3'], '--max_noops'),
        (['--env_processes'], '--env_processes'),
        (['--dense_layers=64'], '--dense_layers 64: no effect without an environment outside'),
        (['--q_network=mine:make', '--torso=nature'], '--torso nature: no effect without'),
        (['--q_network=mine:make', '--negative_slope=0'], '--negative_slope 0.0: no effect'),
        (['--q_network=mine:make', '--centralize_gradient'], '--centralize_gradient: no effect'),
        (['--environment=CartPole-v7'], 'did you mean CartPole-v1'),
        (['--environment=envs:'], '--environment: envs:: not module:function. Fix: name both.'),
        (['--environment=:make'], '--environment: :make: not module:function. Fix: name both.'),
        (['--environment=nomodule:make'], '--environment: nomodule:make: cannot import nomodule'),
        (
            ['--environment=CartPole-v1', '--dense_layers=8,,8'],
            "--dense_layers '8,,8': must be",
        ),
        (['--q_network=mine'], "--q_network 'mine': must be builtin or module:function"),
        (
            ['--network', 'mine:make'],
            '--network mine:make: no effect on DirectRunner (did you mean --q_network?). Fix: omit',
        ),
        (['--num_workers=3'], 'did you mean --num_actors and --num_learners?'),
        (['--environment=pung'], "--environment: unknown game 'pung'"),
        (['--game=CartPole-v7'], '--game: CartPole-v7: unknown'),
        (
            ['--environment=CartPole-v1', '--game=pong'],
            '--environment CartPole-v1: contradicts --game pong. Fix: omit one of them.',
        ),
        (['--max_steps=0'], '--max_steps 0: must be at least 1'),
        (['--environment=CartPole-v1', '--max_steps=-5'], '--max_steps -5: must be at least 1'),
        (['--max_steps=300'], '--max_steps 300: the run ends before learning starts (300 agent'),
        (
            ['--environment=CartPole-v1', '--evaluation_protocol=machado'],
            '--evaluation_protocol machado: not for CartPole-v1. Fix: choose plain, or omit it.',
        ),
        (
            ['--evaluation_protocol=plain'],
            '--evaluation_protocol plain: not for pong. Fix: choose noop or machado or rainbow, or',
        ),
    ],
)
def test_what_has_no_effect_or_names_nothing_is_refused_with_its_flag(argv, message):
    with pytest.raises(UsageError) as refusal:
        experiment(*argv)
    assert message in str(refusal.value)
    assert 'Fix: ' in str(refusal.value)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'Pendulum-v1',
            'Pendulum-v1: actions Box(-2.0, 2.0, (1,), float32) are not discrete. Fix: ',
        ),
        ('tests.support.environments:broken_text', 'observations Text(1, 4, '),
        (
            'tests.support.environments:broken_dtype',
            'environment 0, step 0: observation float64[3]',
        ),
        ('tests.support.environments:broken_reset', 'step 0: reset raised RuntimeError: no level'),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_before_a_file_is_written(
    name, message, tmp_path, capsys
):
    argv = ['--runner=DirectRunner', f'--environment={name}', f'--run_dir={tmp_path / "run"}']
    assert run.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


OWN_NETWORK = 'tests.support.own_network'
UNTRAINED = 'would keep their first values, since only gradients change variables here. Fix: use L'


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        ('missing', 'tests.support.own_network has no function missing. Fix: correct the name.'),
        ('without_seed', 'raised TypeError: without_seed() takes 1 positional argument but 2'),
        ('failing', 'raised RuntimeError: no licence. Fix: correct the function, which gets the'),
        ('leaving', 'raised SystemExit: 3. Fix: '),
        ('nothing', 'returned NoneType. Fix: return a Keras layer or model.'),
        ('three_axes', 'given float32 [2, 4], the network returned float32 [2, 2, 2]. Fix: let it'),
        ('one_row', 'the network returned float32 [1, 4]. Fix: '),
        ('two_results', 'the network returned float32 [2, 4], float32 [2, 4]. Fix: '),
        ('convolution', 'the network raised ValueError: '),
        ('eager_only', 'it cannot be run in a graph'),
        ('batch_normalization', UNTRAINED),
        ('frozen', UNTRAINED),
        ('hidden', UNTRAINED),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before_a_file_is_written(
    function, message, tmp_path, capsys
):
    name = f'{OWN_NETWORK}:{function}'
    argv = ['--environment=CartPole-v1', f'--q_network={name}', f'--run_dir={tmp_path / "run"}']
    assert run.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'run.py: --q_network {name}: ')
    assert message in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('agent', ['dqn', 'c51', 'qr_dqn', 'iqn'])
def test_a_network_of_trained_layers_passes_the_trial_under_every_head(agent):
    argv = ('--environment=CartPole-v1', f'--q_network={OWN_NETWORK}:dense', f'--agent={agent}')
    checklist.require_agent(experiment(*argv, '--no-double_dqn'), {})


def test_an_environment_that_hangs_is_refused_after_the_bound_and_named_before(capsys):
    name = 'tests.support.environments:hanging_reset'
    config = experiment(f'--environment={name}')
    with pytest.raises(UsageError) as refusal:
        checklist.require_environment(config, {}, hang_seconds=0.5)
    assert str(refusal.value) == (
        f'--environment {name}: reset() takes more than 0.5 s (--hang_seconds). Fix: correct it, or'
        ' raise --hang_seconds.'
    )
    assert f'trying {name}: reset() ...\n' in capsys.readouterr().out


MINATAR = ('--environment=MinAtar/Breakout-v1',)
PICTURES = ('--environment=tests.support.environments:pictures',)
CART_POLE = ('--environment=CartPole-v1',)
STRUCTURES = (f'--environment={STRUCTURED}',)


@pytest.mark.parametrize(
    ('argv', 'unused'),
    [
        ((*CART_POLE, '--dense_layers=8'), ''),
        ((*CART_POLE, '--torso=dqn2013'), '--torso dqn2013: no effect on the network for'),
        ((*CART_POLE, '--dense_layers=8', '--q_network=tests:make'), '--dense_layers 8: no effect'),
        ((*MINATAR, '--torso=dqn2013'), '--torso dqn2013: no effect'),  # 10 x 10 are too few
        ((*MINATAR, '--dense_layers=8'), '--dense_layers 8: no effect'),
        ((*CART_POLE, '--precision=bfloat16'), '--precision bfloat16: no effect'),
        ((*CART_POLE, '--precision=auto'), ''),
        ((*MINATAR, '--precision=bfloat16'), ''),
        ((*CART_POLE, '--standardize_input'), '--standardize_input: no effect'),
        ((*MINATAR, '--standardize_input'), ''),
        ((*CART_POLE, '--centralize_gradient'), '--centralize_gradient: no effect'),
        ((*MINATAR, '--centralize_gradient'), ''),
        ((*CART_POLE, '--no-center_input'), '--no-center_input: no effect'),
        ((*PICTURES, '--torso=dqn2013'), ''),
        ((*PICTURES, '--dense_layers=8'), '--dense_layers 8: no effect'),
        ((*STRUCTURES, '--dense_layers=8'), ''),
        ((*STRUCTURES, '--torso=dqn2013'), '--torso dqn2013: no effect'),  # its picture is small
        ((*CART_POLE, '--torso=dqn2013', '--agent=mine:make'), ''),  # has a message of its own
    ],
)
def test_flags_of_layers_that_a_networks_observations_do_not_use_are_refused(argv, unused):
    _, preset, values = command_line.parse(argv)
    refusal = ''
    try:
        config = command_line.experiment(preset, values)
        checklist.require_environment(config, values, hang_seconds=60)
    except UsageError as error:
        refusal = str(error)
    assert refusal.startswith(unused)
    assert refusal.endswith('Fix: omit it.' if unused else '')
    assert bool(refusal) == bool(unused)


@pytest.mark.parametrize('colour', [False, True])
def test_an_evaluation_closes_an_environment_that_does_not_begin(colour, tmp_path, monkeypatch):
    notes = tmp_path / 'notes'
    monkeypatch.setenv('NOTES_OF_ENVIRONMENTS', str(notes))
    environment = EnvironmentConfig(game='tests.support.environments:unready')
    game = play.Game(0, 0, 1, environment, protocols.PROTOCOLS['plain'])
    with pytest.raises(EnvironmentFailedError, match='reset raised RuntimeError: no level'):
        play.open_game(game, colour)
    assert notes.read_text().split() == [str(os.getpid())]  # written by its close()


@pytest.mark.parametrize('name', ['CartPole-v1', OWN])
def test_random_play_is_evaluated_by_the_environments_own_rules(name, tmp_path):
    output = tmp_path / 'result.json'
    argv = ['--policy=random', f'--games={name}', '--episodes=6', f'--output={output}']
    assert evaluate.main(argv) == 0
    result = json.loads(output.read_text())
    assert (result['protocol'], result['game'], result['failed']) == ('plain', name, 0)
    assert 'at most 108,000 steps;' in rules(result)
    frames = [game['frames'] for game in result['details']]
    if name == OWN:
        assert result['returns'] == [15.0] * 6  # 1 + 2 + 3 + 4 + 5
        assert frames == [5] * 6
    else:
        assert result['returns'] == frames  # a point for each step


def test_a_run_is_evaluated_and_filmed_where_its_environment_draws(tmp_path, capsys):
    run_dir = tmp_path / 'run'
    saved_run.write(run_dir, experiment('--environment=CartPole-v1', '--dense_layers=8'))
    film = tmp_path / 'game.mp4'
    argv = [f'--run_dir={run_dir}', '--episodes=2', f'--video={film}', '--video_overlay']
    assert evaluate.main([*argv, f'--output={tmp_path / "result.json"}']) == 0
    assert film.stat().st_size > 1_000
    capsys.readouterr()
    assert evaluate.main([f'--run_dir={run_dir}', '--protocol=noop']) == 2
    message = capsys.readouterr().err
    assert '--protocol noop: not for CartPole-v1. Fix: choose plain, or omit it.' in message


@pytest.mark.parametrize('kind', [STRUCTURED, 'tests.support.tf_environments:structured'])
def test_a_policy_of_structures_plays_as_a_run_and_as_a_saved_model(kind, tmp_path):
    run_dir = tmp_path / 'run'
    flags = ('--dense_layers=8', '--frame_stack=2')
    saved_run.write(run_dir, experiment(f'--environment={kind}', *flags))
    assert export.main([f'--run_dir={run_dir}']) == 0
    for source in (f'--run_dir={run_dir}', f'--policy={run_dir / "policy"}'):
        output = tmp_path / f'{len(source)}.json'
        assert evaluate.main([source, '--episodes=2', f'--output={output}']) == 0
        assert json.loads(output.read_text())['returns'] == [15.0] * 2


def test_a_policy_of_structures_does_not_play_where_others_are_shown(tmp_path, capsys):
    run_dir = tmp_path / 'run'
    saved_run.write(run_dir, experiment(f'--environment={STRUCTURED}', '--dense_layers=8'))
    assert export.main([f'--run_dir={run_dir}']) == 0
    (run_dir / 'policy' / 'policy.json').unlink()
    (run_dir / 'config.json').unlink()
    capsys.readouterr()
    assert evaluate.main([f'--policy={run_dir / "policy"}', '--games=CartPole-v1']) == 2
    message = capsys.readouterr().err
    assert 'takes counter float64 [3], pair 0 float32 [2], pair 1 int8 [2], phase uint8' in message
    assert 'CartPole-v1 shows float32 [' in message


def test_an_environment_that_draws_nothing_is_evaluated_but_not_filmed(tmp_path, capsys):
    run_dir, film = tmp_path / 'run', tmp_path / 'game.mp4'
    saved_run.write(run_dir, experiment(f'--environment={OWN}', '--dense_layers=8'))
    argv = [f'--run_dir={run_dir}', '--episodes=2', f'--output={tmp_path / "result.json"}']
    assert evaluate.main([*argv, f'--video={film}']) != 0
    assert f'{OWN}: draws no picture (NotImplementedError' in capsys.readouterr().err
    assert not film.exists()
