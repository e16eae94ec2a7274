"""How to resume an ended run: its directory in, the command out."""

from infra.disk import read_json
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
    if _at_budget(directory):
        conditions.append('a larger --max_frames')
    return ' and '.join([f'resume with {command("run", run, *flags)}', *conditions])


def _at_budget(directory: RunDirectory) -> bool:
    """Whether the newest checkpoint has all frames of --max_frames."""
    counters = read_json(directory.latest_checkpoints()[0] / CHECKPOINT_RUN_FILE) or {}
    config = read_json(directory.config_file) or {}
    try:
        frames = counters['agent_steps'] * config['environment']['action_repeat']
        return bool(frames >= config['run']['max_frames'])
    except (KeyError, TypeError):  # of the first versions, or damaged: `--resume` says so
        return False
