"""Information-bottleneck fine-tuning of code language models (arXiv 2510.16022)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["IBConfig", "IBModel", "IBOutput", "InputError", "ObjectiveCallback", "__version__"]

if TYPE_CHECKING:
    from ibft.callback import ObjectiveCallback
    from ibft.errors import InputError
    from ibft.model import IBModel, IBOutput
    from ibft.objective import IBConfig

_HOMES = {
    "IBConfig": "ibft.objective",
    "IBModel": "ibft.model",
    "IBOutput": "ibft.model",
    "InputError": "ibft.errors",
    "ObjectiveCallback": "ibft.callback",
}


def __getattr__(name: str) -> Any:
    # Importing transformers and peft takes seconds; `ibft --help` and a wrong flag should not.
    if name not in _HOMES:
        raise AttributeError(f"module 'ibft' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
