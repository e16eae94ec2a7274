"""Run inside the image `worker`: imports a worker's modules and runs Beam's SDK harness."""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tempfile

_MODULES = (
    'ale_py', 'apache_beam.runners.dataflow', 'apache_beam.runners.worker.worker_pool_main',
    'distributed', 'reverb', 'tensorflow', 'tf_agents.agents', 'agents.actor', 'agents.learner',
    'pipelines.job', 'pipelines.transforms.act', 'pipelines.transforms.bundle',
    'pipelines.transforms.learn',
)  # fmt: skip
_ENVIRONMENT = '/opt/venv'


def run_pipeline(directory: pathlib.Path) -> None:
    """Runs a pipeline whose two elements run in two processes of Beam's SDK harness."""
    import apache_beam as beam

    flags = ['--runner=FnApiRunner', '--direct_running_mode=multi_processing']
    options = beam.options.pipeline_options.PipelineOptions([*flags, '--direct_num_workers=2'])
    with beam.Pipeline(options=options) as pipeline:
        ready = pipeline | beam.Create([1, 2]) | beam.Reshuffle() | beam.Map(str)
        ready | beam.io.WriteToText(str(directory / 'out'))
    lines = [line for file in directory.glob('out*') for line in file.read_text().split()]
    assert sorted(lines) == ['1', '2'], lines


def main() -> None:
    for module in _MODULES:
        importlib.import_module(module)
    # boot and Beam's worker pool call `python` and `pip` by name.
    for program in ('python', 'pip', 'dask'):
        assert shutil.which(program) == f'{_ENVIRONMENT}/bin/{program}', shutil.which(program)
    subprocess.run([sys.executable, '-m', 'pip', 'check'], check=True)
    with tempfile.TemporaryDirectory() as directory:
        run_pipeline(pathlib.Path(directory))


if __name__ == '__main__':
    main()
