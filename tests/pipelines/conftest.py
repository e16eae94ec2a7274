"""What several test files share, made once."""

import pytest

from infra.disk import write_json
from tests.support.reported_runs import evaluation, make_run, make_video


@pytest.fixture(scope='session')
def whole_report(tmp_path_factory):
    """The report of two variants on two games, two seeds each, and a video of one game.

    One variant also has scores of Pong under another protocol.
    """
    from pipelines.reporting.report import write_report

    root = tmp_path_factory.mktemp('report')
    for game, score in (('pong', 17.0), ('breakout', 300.0)):
        for seed in (1, 2):
            make_run(root / f'{game}-{seed}', game, seed, score * (1 + 0.1 * seed))
            make_run(root / f'{game}-slow-{seed}', game, seed, score / 2, learning_rate=1e-4)
    for seed in (1, 2):
        result = evaluation(20.0 + seed / 10, protocol='rainbow')
        write_json(root / f'pong-{seed}' / 'evaluation-rainbow.json', result)
    make_video(root / 'pong-2' / 'video.mp4')
    return write_report([str(root)], root / 'report.html')
