"""Where workers come from: this machine, a batch system, ssh, Kubernetes, or a scheduler that is there already.

Each kind of cluster.yaml is started, shown and checked from here.
"""
