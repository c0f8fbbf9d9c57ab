"""Look at a store, a job or a machine without changing it: plan, status, verify, doctor."""
