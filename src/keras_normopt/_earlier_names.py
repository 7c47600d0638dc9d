"""Keeps old names of modules, so that old pickles load."""

import sys
import types
from typing import Any

from keras_normopt._optimizer import clipped, factory, normalized
from keras_normopt._transforms import thresholds
from keras_normopt.norms import _registry

_MODULES: dict[str, dict[str, Any]] = {
    "clipping": {"Clipping": clipped.ClippedMixin},
    "factory": {
        "_made": factory._optimizer_class,
        "clipped": factory.clipped,
        "normalized": factory.normalized,
    },
    "normalization": {"Normalization": normalized.NormalizedMixin},
    "registry": {"register_norm": _registry.register_norm},
    "thresholds": {"RunningNorm": thresholds.RunningNorm},
}

for _name, _members in _MODULES.items():
    _module = types.ModuleType(f"keras_normopt.{_name}")
    vars(_module).update(_members)
    sys.modules[_module.__name__] = _module
