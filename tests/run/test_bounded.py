from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from pipeline.run.bounded import bounded_process

SLEEP = "import time; time.sleep(1000)"


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_a_process_has_its_bounds_and_says_nothing_on_this_terminal():
    code = "import os, resource; print(resource.getrlimit(resource.RLIMIT_AS), os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid())"
    limits = {resource.RLIMIT_AS: 2**30, resource.RLIMIT_CORE: 0}
    with bounded_process(python(code), n_threads=3, limits=limits, stdout=subprocess.PIPE) as process:
        assert process.communicate()[0].decode().split() == ["(1073741824,", "1073741824)", "3", "True"]


def test_what_has_not_ended_is_killed_with_what_it_started():
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}]).pid, flush=True); {SLEEP}"
    with bounded_process(python(code), n_threads=1, limits={}, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        os.kill(child, 0)
    process.wait()
    assert process.returncode == -9
    assert process.stdout.read() == b"", "which ends once nobody has the other end any more"
    process.stdout.close()


def test_a_lower_limit_stays():
    code = """
import resource, sys
from pipeline.run.bounded import bounded_process
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
show = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
with bounded_process([sys.executable, "-c", show], n_threads=1, limits={resource.RLIMIT_CORE: 10}, stdout=None) as process:
    process.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(0, 0)\n"


def test_an_error_in_the_block_ends_the_process_too():
    with pytest.raises(RuntimeError, match="no"), bounded_process(python(SLEEP), n_threads=1, limits={}) as process:
        raise RuntimeError("no")
    assert process.wait() == -9
