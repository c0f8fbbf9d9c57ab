"""Where workers come from: this machine, a batch system, ssh, Kubernetes, or a scheduler that already runs.

`kinds` has one module for each kind of ``cluster.yaml``, behind the interface of `spec`. `session` connects to any of them.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["connect", "connector", "load_cluster"]
__getattr__ = lazily(__name__, {"connect": "session", "connector": "connection", "load_cluster": "config"})
