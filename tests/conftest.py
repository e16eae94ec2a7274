"""Settings of the tests and of the processes they start, made before TensorFlow is loaded."""

import os

# Byte-code halves the time each server and worker needs to import TensorFlow.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# The suite must pass on two cores, beside the servers it starts; and without an accelerator.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
os.environ.setdefault('TF_NUM_INTEROP_THREADS', '1')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')
os.environ.setdefault('MPLBACKEND', 'Agg')
