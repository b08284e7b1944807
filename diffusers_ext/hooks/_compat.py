"""Everything the collection imports from diffusers' private modules, in one place.

A new diffusers release is adapted to here and nowhere else. Rooms import these names from this file only.
"""

from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as TRANSFORMER_BLOCK_LISTS
from diffusers.hooks._common import _ATTENTION_CLASSES as ATTENTION_CLASSES
from diffusers.hooks._common import _FEEDFORWARD_CLASSES as FEEDFORWARD_CLASSES
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from diffusers.hooks.hooks import _set_cache_context as set_cache_context
from diffusers.utils.torch_utils import unwrap_module


# The attribute under which diffusers keeps a module's registry.
REGISTRY_ATTRIBUTE = "_diffusers_hook"
# The attribute under which accelerate keeps the forward that its own hook wraps, and calls it from there.
ACCELERATE_FORWARD_ATTRIBUTE = "_old_forward"

__all__ = [
    "ACCELERATE_FORWARD_ATTRIBUTE",
    "ATTENTION_CLASSES",
    "FEEDFORWARD_CLASSES",
    "REGISTRY_ATTRIBUTE",
    "TRANSFORMER_BLOCK_LISTS",
    "BaseState",
    "CacheContext",
    "HookRegistry",
    "ModelHook",
    "StateManager",
    "TransformerBlockMetadata",
    "TransformerBlockRegistry",
    "set_cache_context",
    "unwrap_module",
]
