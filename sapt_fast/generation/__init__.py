"""Answers in points that are written in parallel: Skeleton-of-Thought."""

from sapt_fast.generation.events import (
    Done,
    Event,
    PlainToken,
    PointDone,
    PointFailed,
    PointRestarted,
    PointToken,
    SkeletonAnswer,
    SkeletonDone,
    SkeletonToken,
)
from sapt_fast.generation.local import ContextTooShortError
from sapt_fast.generation.server import ServerError, ServerModel
from sapt_fast.generation.settings import SkeletonPrompts, SkeletonSettings
from sapt_fast.generation.skeleton import skeleton_of_thought, stream_skeleton_of_thought

__all__ = [
    "ContextTooShortError",
    "Done",
    "Event",
    "PlainToken",
    "PointDone",
    "PointFailed",
    "PointRestarted",
    "PointToken",
    "ServerError",
    "ServerModel",
    "SkeletonAnswer",
    "SkeletonDone",
    "SkeletonPrompts",
    "SkeletonSettings",
    "SkeletonToken",
    "skeleton_of_thought",
    "stream_skeleton_of_thought",
]
