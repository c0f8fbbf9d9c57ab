"""Examine a store, a job or a machine without changing it: plan, status, verify, doctor."""

from __future__ import annotations

from pipeline import lazily

__all__ = ["diagnose", "plan_job", "store_status", "verify_store"]
__getattr__ = lazily(__name__, {"diagnose": "doctor", "plan_job": "plan", "store_status": "status", "verify_store": "verify"})
