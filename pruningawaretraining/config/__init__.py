"""Configs: the native form, its reader, and dialects."""

from pruningawaretraining.config.load import load_config
from pruningawaretraining.config.schema import PruningConfig, Rule, json_schema
from pruningawaretraining.config.targets import ExampleInputs, Target

__all__ = ["ExampleInputs", "PruningConfig", "Rule", "Target", "json_schema", "load_config"]
