"""Every setting, its default and its meaning: the only reader of environment, `.env` and YAML.

A value comes from the first of: command line, environment (`GEMMA_<SECTION>_<FIELD>`), `.env`, the YAML file
named by `--config` or `GEMMA_CONFIG`, the defaults in `sections.py` and `security.py`. README's table is
checked against these.
"""

from .sections import (
    CacheSettings,
    ChatSettings,
    LimitsSettings,
    LoadingSettings,
    ModelSettings,
    OtelSettings,
    QueueSettings,
    ServerSettings,
    StorageSettings,
    SupervisorSettings,
)
from .security import SecuritySettings
from .sources import (
    SettingsError,
    Source,
    all_variables,
    digest,
    fields,
    find_config,
    load_with_sources,
    masked,
    source_of,
    variable_name,
)
from .tree import Settings

DEMO_MODEL = "gemma-demo"
"""The model name that stands for the model shipped inside this package."""

__all__ = [
    "DEMO_MODEL",
    "CacheSettings",
    "ChatSettings",
    "LimitsSettings",
    "LoadingSettings",
    "ModelSettings",
    "OtelSettings",
    "QueueSettings",
    "SecuritySettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "Source",
    "StorageSettings",
    "SupervisorSettings",
    "all_variables",
    "digest",
    "fields",
    "find_config",
    "load_with_sources",
    "masked",
    "source_of",
    "variable_name",
]
