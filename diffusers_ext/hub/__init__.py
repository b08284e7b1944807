"""The Hub room: model cards from one template, publishing of custom pipelines, and the origin of saved files.

Importing it imports neither torch nor diffusers, and `huggingface_hub` only when a function needs it.
"""

from .component_modules import write_component_modules
from .hub_model import HubModelMixin
from .model_card import hub_model_id, validate_model_card, write_model_card
from .origin import Origin, describe_base, origin_difference, read_origin, stamp_safetensors
from .publish import list_pipelines, pipeline_class_name, pipelines_folder, publish_pipeline


__all__ = [
    "HubModelMixin",
    "Origin",
    "describe_base",
    "hub_model_id",
    "list_pipelines",
    "origin_difference",
    "pipeline_class_name",
    "pipelines_folder",
    "publish_pipeline",
    "read_origin",
    "stamp_safetensors",
    "validate_model_card",
    "write_component_modules",
    "write_model_card",
]
