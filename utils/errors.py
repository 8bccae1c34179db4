"""The one base of every error that a user can cause and mend, and how full memory is told."""

from __future__ import annotations

# Of libraries that ask the driver for memory by themselves, and of a compiler that met the error.
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED", "_HOST_ALLOCATION_FAILED", "_DEVICE_ALLOCATION_FAILED",  # cuDNN
    "CUDA error: out of memory", "CUDA out of memory", "DefaultCPUAllocator: can't allocate",
)  # fmt: skip


class UserError(ValueError):
    """Something asked for cannot be done; the text says what, got, allowed and the remedy.

    Command-line tools print it as one line and exit with ``exit_code``; a traceback would only
    hide the sentence.
    """

    exit_code = 2


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory is full, a GPU's or the machine's.

    Torch's own is told by its name: commands that do not need torch do not load it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def shortage(error: Exception) -> str:
    """Return the first sentence of an error of ``out_of_memory``, without where torch raised it."""
    text = str(error)
    start = max(text.find("DefaultCPUAllocator"), 0)
    return text[start:].split(". ")[0].partition("\n")[0] or type(error).__name__
