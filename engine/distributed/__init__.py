"""Runs of several processes that torchrun starts.

``group``: ``joined``, ``leave``, ``device_of_rank``, ``refuse_sharing``.
``processes``: ``world``, ``is_main``, ``share`` and the collectives of values.
``parallel``: the training step over several processes.
"""
