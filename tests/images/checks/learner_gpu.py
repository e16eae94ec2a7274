"""Run inside the image `learner-gpu`: TensorFlow and the CUDA it was built for; needs no GPU."""

import ctypes
import pathlib
import sysconfig

# Libraries that TensorFlow opens, dependencies first.
_LIBRARIES = (
    ('cuda_runtime', 'libcudart.so.12'),
    ('cublas', 'libcublasLt.so.12'),
    ('cublas', 'libcublas.so.12'),
    ('cuda_cupti', 'libcupti.so.12'),
    ('cudnn', 'libcudnn.so.8'),
    ('cufft', 'libcufft.so.11'),
    ('nvjitlink', 'libnvJitLink.so.12'),
    ('cusparse', 'libcusparse.so.12'),
    ('cusolver', 'libcusolver.so.11'),
    ('nccl', 'libnccl.so.2'),
)


def main() -> None:
    nvidia = pathlib.Path(sysconfig.get_path('purelib')) / 'nvidia'
    for package, library in _LIBRARIES:
        ctypes.CDLL(str(nvidia / package / 'lib' / library), mode=ctypes.RTLD_GLOBAL)
    # XLA compiles the replay's windows and the loss with both.
    for file in ('nvvm/libdevice/libdevice.10.bc', 'bin/ptxas'):
        assert (nvidia / 'cuda_nvcc' / file).is_file(), file

    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    assert build['is_cuda_build'], build
    assert (build['cuda_version'], build['cudnn_version']) == ('12.2', '8'), build
    print(f'GPUs here: {tf.config.list_physical_devices("GPU")}', flush=True)


if __name__ == '__main__':
    main()
