"""Policies to evaluate: a run, a SavedModel or `random` in, a policy that can play out."""

import dataclasses
import io
import json
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tree

from agents.config import EnvironmentConfig
from agents.environments.factory import check_name
from infra.disk import scratch
from infra.parameter_server.checkpoint import Checkpoint
from pipelines.errors import UsageError, unwritable
from pipelines.evaluation.play import Act
from pipelines.evaluation.starts import ALL_ACTIONS, action_codes
from pipelines.experiment import config as config_lib
from pipelines.experiment import presets
from pipelines.experiment.config import ExperimentConfig
from pipelines.storage import saved_policies
from pipelines.storage.checkpoints import read_parameters
from pipelines.storage.reading import readable
from pipelines.storage.run_directory import RunDirectory

RANDOM = 'random'

Player = Callable[[], Act]
"""Begins a game: returns what chooses its actions."""

Values = Callable[[Any], np.ndarray]
"""Expected returns float32 [actions] of an observation [1, ...], one array or a nest."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy and the environment that it acts in, picklable.

    Attributes:
      path: where it is from, or 'random'.
      environment: its game, stack and action set.
      experiment: of the run, None for others.
      parameters: of the run's network, float32 [parameters], averaged if the run averages.
      saved_model: files of a SavedModel as a ZIP archive.
      checkpoint: name of the run's checkpoint.
      updates: global updates behind the policy, None if unknown.
    """

    path: str
    environment: EnvironmentConfig
    experiment: ExperimentConfig | None = None
    parameters: np.ndarray | None = None
    saved_model: bytes | None = None
    checkpoint: str | None = None
    updates: int | None = None

    @property
    def kind(self) -> str:
        """'run', 'saved_model' or 'random'."""
        if self.experiment is not None:
            return 'run'
        return RANDOM if self.saved_model is None else 'saved_model'

    def describe(self) -> dict[str, Any]:
        """Its JSON values for a result."""
        return {
            'kind': self.kind,
            'path': self.path,
            'checkpoint': self.checkpoint,
            'updates': self.updates,
        }

    def player(self) -> Player:
        """Opens the policy; use it in one thread at a time.

        Raises:
          ValueError: the parameters are of another network.
          UsageError: the SavedModel cannot be loaded or does not fit the game.
        """
        return self.opened()[0]

    def opened(self) -> tuple[Player, Values | None]:
        """As `player`, and what it expects; None if that is unknown, as of a SavedModel.

        Raises:
          ValueError, UsageError: as `player`.
        """
        if self.experiment is not None:
            return _opened_run(self.experiment, self.parameters)
        if self.saved_model is not None:
            return _saved_model_player(self), None
        return lambda: _unreachable, None  # its protocol has epsilon 1


def _unreachable(observation: Any) -> int:
    raise AssertionError('a random policy chooses no action')


def of_run(run_dir: str, checkpoint: str, notify: Callable[[str], None]) -> Policy:
    """The policy of a run, here or at gs://.

    Args:
      run_dir: its directory.
      checkpoint: 'newest', 'best' or a number.
      notify: receives a line for each damaged checkpoint that is skipped.

    Raises:
      UsageError: the run or the checkpoint is not readable.
    """
    with readable(run_dir, (), checkpoint) as path:
        directory = RunDirectory.existing(path)
        experiment = config_lib.load(directory.config_file)
        name, saved = read_parameters(directory, checkpoint, notify)
    return of_checkpoint(run_dir, experiment, name, saved)


def of_checkpoint(
    run_dir: str, experiment: ExperimentConfig, name: str, saved: Checkpoint
) -> Policy:
    """The policy of a checkpoint that has been read."""
    return Policy(
        run_dir,
        experiment.environment,
        experiment,
        saved.average,
        checkpoint=name,
        updates=saved.clock['updates'],
    )


def of_saved_model(path: str, game: str | None) -> Policy:
    """The policy of a TF-Agents SavedModel, such as `policy/` of a run.

    Args:
      path: its directory.
      game: to play; None: that of the policy, or of the run that holds it (earlier versions).

    Raises:
      UsageError: `path` is not a readable SavedModel of a policy for Atari, or is for another game.
    """
    directory = pathlib.Path(path)
    trained = saved_policies.checked(path) or _environment_of_run(directory.absolute().parent)
    if trained is not None and game is not None and check_name(trained.game) != check_name(game):
        raise other_game(path, trained.game, game)
    environment = trained
    if environment is None:
        if game is None:
            raise UsageError(
                f'--policy {path}: its game is unknown. Fix: name it by --games (of'
                ' record_starts.py, --game).'
            )
        environment = EnvironmentConfig(game=game)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', strict_timestamps=False) as packed:
        for file in sorted(directory.rglob('*')):
            packed.write(file, file.relative_to(directory))
    return _fitted(Policy(path, environment, saved_model=archive.getvalue()))


def of_chance(game: str, full_action_space: bool) -> Policy:
    """Uniformly random actions."""
    environment = EnvironmentConfig(game=game, full_action_space=full_action_space)
    if not environment.is_atari:
        environment = presets.experiment(presets.default(game), {'game': game}).environment
    return Policy(RANDOM, environment)


def other_game(path: str, trained: str, game: str) -> UsageError:
    """The error of a policy that is to play a game that it was not trained for."""
    wanted = check_name(game)
    return UsageError(
        f'{path}: a policy for {check_name(trained)}, not for {wanted}. Fix: omit the game, or name'
        f' a policy for {wanted}.'
    )


def _environment_of_run(run_dir: pathlib.Path) -> EnvironmentConfig | None:
    """The environment of the run in `run_dir`, None if there is no run."""
    try:
        return config_lib.load(run_dir / config_lib.CONFIG_FILE).environment
    except UsageError:
        return None


def _opened_run(
    experiment: ExperimentConfig, parameters: np.ndarray | None
) -> tuple[Player, Values | None]:
    from pipelines.experiment.builders import build_policy

    policy = build_policy(experiment)
    policy.set_parameters(parameters)
    head = policy.model.head

    def player() -> Act:
        return lambda observation: int(policy.act(observation)[0])

    def values(observation: Any) -> np.ndarray:
        assert head is not None
        return np.asarray(head.values(policy.evaluate(observation)[1]))[0]

    return player, None if head is None else values


def _fitted(policy: Policy) -> Policy:
    """The policy with the stack and the action set that its SavedModel has.

    Raises:
      UsageError: it is not a policy for Atari or its game.
    """
    loaded = _load(policy)
    updates = int(loaded.get_train_step())  # -1: unknown
    policy = dataclasses.replace(policy, updates=updates if updates >= 0 else None)
    if not policy.environment.is_atari:
        return _fitted_elsewhere(policy, loaded)
    observation, action = loaded.time_step_spec.observation, loaded.action_spec
    try:
        height, width, stack = observation.shape
        if (height, observation.dtype, action.shape) != (width, np.uint8, ()):
            raise ValueError('other types or shapes')
        environment = dataclasses.replace(policy.environment, frame_stack=stack, screen_size=height)
        num_actions = int(action.maximum) + 1
    except (AttributeError, TypeError, ValueError) as error:  # of a structure, or without bounds
        raise UsageError(
            f'--policy {policy.path}: not a policy for Atari (takes {_kind(observation)}, returns'
            f' {_kind(action)}). Fix: name one that takes square pictures, uint8 [size, size,'
            ' stack] of 36 to 210 pixels, and returns a bounded scalar.'
        ) from error
    minimal = len(action_codes(environment.game, full_action_space=False))
    if num_actions not in (minimal, ALL_ACTIONS):
        raise UsageError(
            f'--policy {policy.path}: a policy of another game ({num_actions} actions;'
            f' {environment.game} has {minimal}). Fix: name its game.'
        )
    environment = dataclasses.replace(environment, full_action_space=num_actions != minimal)
    return dataclasses.replace(policy, environment=environment)


def _fitted_elsewhere(policy: Policy, loaded: Any) -> Policy:
    """The policy, if its SavedModel takes what an environment outside Atari shows.

    Raises:
      UsageError: it does not.
    """
    from agents.py_environment import same_arrays
    from pipelines.experiment.builders import specs_of

    step, action = specs_of(policy.environment)
    takes, shown = loaded.time_step_spec.observation, step.observation
    chooses = getattr(loaded.action_spec, 'maximum', None)
    if not same_arrays(takes, shown) or chooses != action.maximum:
        raise UsageError(
            f'--policy {policy.path}: takes {_kind(takes)} and chooses among {chooses} + 1 actions;'
            f' {policy.environment.game} shows {_kind(shown)} and has {action.maximum + 1}. Fix:'
            ' name its own environment by --games.'
        )
    return policy


def _kind(spec: Any) -> str:
    """Types and shapes of a spec, or of each part of a nest."""
    return ', '.join(
        ' '.join([*map(str, path), part.dtype.name, str(list(part.shape))])
        for path, part in tree.flatten_with_path(spec)
    )


def _load(policy: Policy) -> Any:
    """Loads the SavedModel of a policy.

    Raises:
      UsageError: it is damaged.
    """
    from tf_agents.policies import py_tf_eager_policy

    assert policy.saved_model is not None
    try:
        with scratch() as directory:
            with zipfile.ZipFile(io.BytesIO(policy.saved_model)) as packed:
                packed.extractall(directory)
            return py_tf_eager_policy.SavedModelPyTFEagerPolicy(
                str(directory), load_specs_from_pbtxt=True
            )
    except Exception as error:  # of any kind: TensorFlow raises many for damaged files
        if isinstance(error, OSError) and error.errno is not None:  # not TensorFlow's
            raise unwritable(error.filename or tempfile.gettempdir(), error) from error
        raise UsageError(
            f'--policy {policy.path}: cannot be loaded as a policy of TF-Agents'
            f' ({type(error).__name__}). Fix: export it again with `pipelines/export.py`.'
        ) from error


def _saved_model_player(policy: Policy) -> Player:
    from tf_agents.trajectories import time_step as ts

    loaded = _load(policy)

    def begin() -> Act:
        state, step = loaded.get_initial_state(), ts.restart

        def act(observation: Any) -> int:
            nonlocal state, step
            frames = tree.map_structure(lambda array: np.array(array[0]), observation)
            chosen = loaded.action(step(frames), state)
            state, step = chosen.state, _transition
            return int(chosen.action)

        return act

    def _transition(frames: Any) -> Any:
        return ts.transition(frames, np.float32(0.0))

    return begin


def packed(policy: Policy) -> bytes:
    """Encodes a policy for a worker elsewhere (see `unpacked`)."""
    values = {
        **policy.describe(),
        'environment': dataclasses.asdict(policy.environment),
        'experiment': config_lib.to_json(policy.experiment) if policy.experiment else None,
    }
    content = io.BytesIO()
    parameters = np.zeros(0, np.float32) if policy.parameters is None else policy.parameters
    model = np.frombuffer(policy.saved_model or b'', np.uint8)
    np.savez(content, values=json.dumps(values), parameters=parameters, saved_model=model)
    return content.getvalue()


def unpacked(content: bytes) -> Policy:
    """Decodes what `packed` encoded."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        values = json.loads(str(arrays['values']))
        parameters, model = arrays['parameters'], arrays['saved_model'].tobytes()
    experiment = config_lib.from_json(values['experiment']) if values['experiment'] else None
    return Policy(
        values['path'],
        EnvironmentConfig(**values['environment']),
        experiment,
        parameters if experiment is not None else None,
        model if values['kind'] == 'saved_model' else None,
        values['checkpoint'],
        values['updates'],
    )
