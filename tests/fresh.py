"""What a process keeps between runs: a test that starts one must not see what another test's run left."""

import sys


def forget_accelerate() -> None:
    """Let the next run start Accelerate anew: it keeps its first settings for the life of a process."""
    if "accelerate.state" not in sys.modules:
        return
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
