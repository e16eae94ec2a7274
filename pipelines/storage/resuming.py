"""What an ended run lacks and how to resume it: its directory in, the command out."""

from collections.abc import Mapping
from typing import Any

from agents.config import EnvironmentConfig
from infra.disk import read_json
from pipelines.events import count
from pipelines.storage.evaluations import EVALUATION_FILE, read_result
from pipelines.storage.provenance import launches
from pipelines.storage.run_directory import (
    CHECKPOINT_RUN_FILE,
    MARK_FILE,
    RunDirectory,
    command,
)


def resuming(directory: RunDirectory) -> str:
    """Returns `resume with COMMAND`; empty if the run has no checkpoint.

    A remote run is named by its URL. An engine needs its other flags again, too.
    """
    if not directory.has_checkpoint():
        return ''
    run = (read_json(directory.path / MARK_FILE) or {}).get('url', directory.path)
    flags, conditions = ['--resume'], []
    engine = (launches(directory.launches_file) or [{}])[-1].get('engine', 'DirectRunner')
    if engine != 'DirectRunner':
        flags.append(f'--runner={engine}')
        conditions.append('the flags of the engine')
    if _at_budget(directory) and is_complete(directory):
        conditions.append(f'a larger {_budget_flag(directory)}')
    return ' and '.join([f'resume with {command("run", run, *flags)}', *conditions])


def is_complete(directory: RunDirectory) -> bool:
    """Whether summary, evaluation and policy of the newest checkpoint exist.

    `summary.json` holds an evaluation only if that was made at the same end of the run, and says
    whether the policy was exported there; that of the budget before may remain.

    Raises:
      UsageError: the directory is not readable.
    """
    summary = read_json(directory.summary_file) or {}
    evaluated = summary.get('evaluation') is not None
    whole = evaluated and (frames_of(summary) or 0) >= (_saved_frames(directory) or 0)
    evaluated = read_result(directory.path / EVALUATION_FILE) is not None
    exported = summary.get('exported') is not False and directory.policy.is_dir()
    return whole and evaluated and exported


def frames_of(summary: Mapping[str, Any]) -> int | None:
    """Frames made by the run of a summary, of any version; outside Atari agent steps."""
    return count(summary.get('frames', summary.get('agent_steps')))


def _at_budget(directory: RunDirectory) -> bool:
    """Whether the newest checkpoint has all frames of --max_frames."""
    frames, config = _saved_frames(directory), read_json(directory.config_file) or {}
    try:
        return frames is not None and bool(frames >= config['run']['max_frames'])
    except (KeyError, TypeError):  # of the first versions, or damaged: `--resume` says so
        return False


def _budget_flag(directory: RunDirectory) -> str:
    """The flag that ends the run; for runs of the first versions, all of Atari, of frames."""
    environment = (read_json(directory.config_file) or {}).get('environment', {})
    return EnvironmentConfig(game=environment.get('game', 'pong')).budget_flag


def _saved_frames(directory: RunDirectory) -> int | None:
    """Frames of the newest checkpoint, None if there is none or it does not say."""
    for checkpoint in directory.latest_checkpoints()[:1]:
        counters = read_json(checkpoint / CHECKPOINT_RUN_FILE) or {}
        config = read_json(directory.config_file) or {}
        try:
            return count(counters['agent_steps'] * config['environment']['action_repeat'])
        except (KeyError, TypeError):  # as in `_at_budget`
            return None
    return None
