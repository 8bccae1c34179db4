"""The one base of every error that a user can cause and mend, and the one of a full GPU."""

from __future__ import annotations

# Of libraries that ask the driver for memory by themselves, and of a compiler that met the error.
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED", "_HOST_ALLOCATION_FAILED", "_DEVICE_ALLOCATION_FAILED",  # cuDNN
    "CUDA error: out of memory", "CUDA out of memory",
)  # fmt: skip


class UserError(ValueError):
    """Something asked for cannot be done; the text says what, got, allowed and the remedy.

    Command-line tools print it as one line and exit with ``exit_code``; a traceback would only
    hide the sentence.
    """

    exit_code = 2


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error says that the GPU's memory is full.

    Torch's own is told by its name: commands that do not need torch do not load it.
    """
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error) for words in _NO_MEMORY
    )
