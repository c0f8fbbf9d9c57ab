"""Where workers come from: this machine, a batch system, ssh, Kubernetes, or a scheduler that is there already.

`kinds` has one module for each kind of ``cluster.yaml``, behind the interface of `spec`. `session` connects to any of them.
"""
