"""A pytest plugin: Triton's tuner takes its first choice, without trying the others.

On a GPU each choice is a compilation of its own, and the bits are the same: tests/kernels/triton/test_triton_device.py
sets the choices itself and compares them.
"""


def pytest_configure():
    from rlhf_kernels.kl import triton_kernels as kl
    from rlhf_kernels.logprob import triton_kernels as logprob

    for kernel in (logprob.fold, logprob.differentiate, kl.fold_kl, kl.differentiate_kl):
        del kernel.configs[1:]
