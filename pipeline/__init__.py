"""featuremaps: image collections in, feature maps in a Zarr store out.

`__all__` is what a program may rely on; everything else may change without notice.
"""

from __future__ import annotations

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

_HOMES = {
    "Job": "pipeline.config",
    "load_job": "pipeline.config",
    "open_store": "pipeline.analysis.feature_store",
    "plan_job": "pipeline.checks.plan",
    "run_job": "pipeline.api",
    "store_status": "pipeline.checks.status",
    "vacuum_store": "pipeline.store.vacuum",
    "verify_store": "pipeline.checks.verify",
    "write_report": "pipeline.report.page",
}
_MODULES = {"errors": "pipeline.errors", "figures": "pipeline.report.figures"}


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that ``import pipeline`` stays fast."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
