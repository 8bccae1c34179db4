"""Which training a restart by torchrun goes on with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint import NATIVE_NAMES
from engine.distributed.processes import world
from utils.files import write_text

_NAME = ".torchrun"


@dataclass(frozen=True)
class Launch:
    """One start of the processes by torchrun, and the training in OUTPUT_DIR.

    A restart (``--max-restarts``) goes on from the last checkpoint by itself. It must not go on
    with a training that was in OUTPUT_DIR before and that the first start refused to overwrite. So
    the first start leaves a mark once it has accepted the folder, and only then a restart resumes.

    Attributes:
        mark: Where the mark is; None where torchrun has not started this process.
        resumes: Whether to go on from the last checkpoint although SOLVER.RESUME may not say so.
    """

    mark: Path | None
    resumes: bool

    @classmethod
    def begin(cls, folder: Path) -> Launch:
        """Look whether this is a restart; a first start takes away what an older one left."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is None:
            return cls(None, resumes=False)
        mark = folder / _NAME
        if not world().restarts:
            mark.unlink(missing_ok=True)
            return cls(mark, resumes=False)
        accepted = mark.is_file() and mark.read_text("utf-8") == run_id
        return cls(mark, resumes=accepted and (folder / NATIVE_NAMES["latest"]).is_file())

    def accepted(self) -> None:
        """Note that this launch trains in the folder."""
        if self.mark is not None:
            write_text(self.mark, os.environ["TORCHELASTIC_RUN_ID"])

    @staticmethod
    def done(folder: Path) -> None:
        """Take the mark away when all is written: a later launch is another run."""
        (folder / _NAME).unlink(missing_ok=True)
