"""What diffusers' hooks lack: sets of hooks that come and go without a trace, and copies that are not silent."""

from .attachment import attach, attached_hooks, detach, find_hook, is_linked
from .guarded_hook import GuardedHook


__all__ = ["GuardedHook", "attach", "attached_hooks", "detach", "find_hook", "is_linked"]
