"""Which gallery images count for which query: the Market-1501 rules, without any distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import Features
from utils.errors import UserError
from utils.memory import MIB, memory_budget_mib, require_memory

JUNK_PID = -1
# Measured: peak memory for one pair of images of the same identity while pairs are listed.
_PAIR_BYTES = 48

# Why a query is skipped, as results and error messages word it.
SKIP_REASONS = {
    "junk": "are junk (pid -1)",
    "not_in_gallery": "have no image of their identity in the gallery",
    "only_same_camera": "have images of their identity only from their own camera",
}

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Q lists of different lengths, stored in one array."""

    values: Indices  # the lists, concatenated
    offsets: Indices  # start of each list in ``values``, and the total length (Q + 1,)

    def __getitem__(self, index: int) -> Indices:
        """Return one list."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Indices:
        """Length of every list (Q,)."""
        return np.diff(self.offsets)

    def take(self, index: Indices) -> Ragged:
        """Return some of the lists, in the given order."""
        return Ragged(self.values[self.positions(index)], offsets_of(self.lengths[index]))

    def positions(self, index: Indices) -> Indices:
        """Return the positions in ``values`` of the entries of some lists, concatenated."""
        return spans(self.offsets[index], self.lengths[index])


@dataclass(frozen=True, eq=False)
class Matching:
    """The gallery images that each of the Q scored queries should retrieve."""

    queries: Indices  # positions of the scored queries in the query set, ascending (Q,)
    matches: Ragged  # gallery positions of the query's identity that count as matches
    # Gallery positions of the query's identity and camera, which are ignored. Junk is not listed
    # here.
    ignored: Ragged
    junk: Indices  # gallery positions that are ignored for every query
    num_gallery: int  # gallery images without junk
    skipped: dict[str, int]  # number of queries skipped for each of ``SKIP_REASONS``

    @classmethod
    def of(cls, query: Features, gallery: Features, *, cross_camera: bool = True) -> Matching:
        """Apply the junk and same-camera rules.

        Args:
            query: Query set; only pids and cameras are read.
            gallery: Gallery; only pids and cameras are read.
            cross_camera: Ignore gallery images of the query's identity and camera.

        Raises:
            UserError: No query remains (the message counts the reasons), or the pairs of images
                of one identity do not fit into memory.
        """
        query_pid, query_cam = _numpy(query.pids), _numpy(query.camids)
        gallery_pid, gallery_cam = _numpy(gallery.pids), _numpy(gallery.camids)
        order = np.argsort(gallery_pid, kind="stable")
        first = np.searchsorted(gallery_pid, query_pid, side="left", sorter=order)
        counts = np.searchsorted(gallery_pid, query_pid, side="right", sorter=order) - first
        counts[query_pid == JUNK_PID] = 0
        pairs = int(counts.sum())
        require_memory(
            f"Listing {pairs:,} pairs of images of one identity",
            pairs * _PAIR_BYTES / MIB,
            memory_budget_mib(torch.device("cpu")),
            "score fewer images of each identity or free memory",
        )
        same_pid = order[spans(first, counts)]
        owner = np.repeat(np.arange(len(query_pid)), counts)
        hidden = gallery_cam[same_pid] == query_cam[owner]
        hidden &= cross_camera
        matches = _ragged(same_pid[~hidden], owner[~hidden], len(query_pid))
        ignored = _ragged(same_pid[hidden], owner[hidden], len(query_pid))

        unmatched = matches.lengths == 0
        junk_query = query_pid == JUNK_PID
        skipped = {
            "junk": int(junk_query.sum()),
            "not_in_gallery": int((unmatched & ~junk_query & (counts == 0)).sum()),
            "only_same_camera": int((unmatched & (counts > 0)).sum()),
        }
        queries = np.flatnonzero(~unmatched)
        if not len(queries):
            raise UserError(_no_query(len(query_pid), len(gallery_pid), skipped))
        junk = np.flatnonzero(gallery_pid == JUNK_PID)
        return cls(
            queries,
            matches.take(queries),
            ignored.take(queries),
            junk,
            len(gallery_pid) - len(junk),
            skipped,
        )

    @property
    def num_candidates(self) -> Indices:
        """Number of gallery images that each query is ranked against (Q,)."""
        return self.num_gallery - self.ignored.lengths


def offsets_of(lengths: Indices) -> Indices:
    """Return the start of each list in a concatenation, and the total length.

    Example:
        >>> offsets_of(np.array([2, 0, 3])).tolist()
        [0, 2, 2, 5]
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def spans(starts: Indices, lengths: Indices) -> Indices:
    """Return the concatenated indices start, start + 1, ... of every span.

    Example:
        >>> spans(np.array([7, 0]), np.array([2, 3])).tolist()
        [7, 8, 0, 1, 2]
    """
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def _no_query(num_queries: int, num_gallery: int, skipped: dict[str, int]) -> str:
    if not num_queries or not num_gallery:
        return (
            f"there are {num_queries} queries and {num_gallery} gallery images; expected at least "
            "one of each: see `python3 tools/data.py check`"
        )
    reasons = [f"{count} {SKIP_REASONS[why]}" for why, count in skipped.items() if count]
    remedy = "check that query and gallery belong to one split of one data set"
    if skipped["only_same_camera"]:
        remedy = "set TEST.CROSS_CAMERA False if the set has one camera, or add gallery images"
    return f"none of the {num_queries} queries can be scored: {', '.join(reasons)}; {remedy}"


def _numpy(values: Tensor) -> Indices:
    return values.cpu().numpy().astype(np.int64)


def _ragged(values: Indices, owner: Indices, count: int) -> Ragged:
    return Ragged(values, offsets_of(np.bincount(owner, minlength=count)))
