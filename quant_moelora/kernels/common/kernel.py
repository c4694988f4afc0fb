"""What several kernels share."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Wait for the kernel before, if this one may have been launched while it ran, and let the next one be launched.

    Every program of every kernel of a chain calls it first (CUDA C++ programming guide, "Programmatic dependent launch
    and synchronization"): a kernel that ends has then seen all before it end.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def swept(pid, nm, nn, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles sweep over the columns together."""
    first = pid // (GROUP * nn) * GROUP
    height = tl.minimum(nm - first, GROUP)
    within = pid % (GROUP * nn)
    return first + within % height, within // height
