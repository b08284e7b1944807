"""Processes that work on one sample together: joining them, agreeing, and messages with a deadline.

Any backend of torch.distributed: gloo on CPUs, nccl on NVIDIA GPUs.
"""

from .agreement import check_agreement, digest_of
from .channel import Channel, Pending
from .errors import CommunicationError
from .frames import FramePlan, exchange_frames, frame_plan, group_stats
from .launch import distributed_session, launch_environment
from .membership import Members


__all__ = [
    "Channel",
    "CommunicationError",
    "FramePlan",
    "Members",
    "Pending",
    "check_agreement",
    "digest_of",
    "distributed_session",
    "exchange_frames",
    "frame_plan",
    "group_stats",
    "launch_environment",
]
