"""featuremaps: image collections in, feature maps in a Zarr store out.

`__all__` is what a program may rely on; everything else may change without notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline import errors as errors
    from pipeline.analysis.feature_store import open_store as open_store
    from pipeline.api import run_job as run_job
    from pipeline.checks.plan import plan_job as plan_job
    from pipeline.checks.status import store_status as store_status
    from pipeline.checks.verify import verify_store as verify_store
    from pipeline.config import Job as Job
    from pipeline.config import load_job as load_job
    from pipeline.report import figures as figures
    from pipeline.report.page import write_report as write_report
    from pipeline.store.vacuum import vacuum_store as vacuum_store

__version__ = "0.1.0"
__all__ = [
    "Job",
    "__version__",
    "errors",
    "figures",
    "load_job",
    "open_store",
    "plan_job",
    "run_job",
    "store_status",
    "vacuum_store",
    "verify_store",
    "write_report",
]


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``, which imports a name from its home in that package when it is first used.

    A worker that needs `decode` must not import the driver, and ``import pipeline`` stays fast. A home that bears the name
    itself is the module.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(f"{package}.{homes[name]}")
        except (ImportError, AttributeError) as error:
            explain = import_module("pipeline.checks.user_script").explain  # only where something is wrong

            raise explain(error) from error
        return module if homes[name].rpartition(".")[2] == name else getattr(module, name)

    return find


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)


__getattr__ = lazily(
    __name__,
    {
        "Job": "config",
        "errors": "errors",
        "figures": "report.figures",
        "load_job": "config",
        "open_store": "analysis.feature_store",
        "plan_job": "checks.plan",
        "run_job": "api",
        "store_status": "checks.status",
        "vacuum_store": "store.vacuum",
        "verify_store": "checks.verify",
        "write_report": "report.page",
    },
)
