"""A scheduler that already runs, given by its address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from threading import Event
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from pipeline.cluster.spec import ClusterSpec, GroupSpec, TlsSpec
from pipeline.errors import FeaturemapsError

CONNECT_TIMEOUT_S = 20.0


class AddressSpec(ClusterSpec):
    """A scheduler that already runs; its workers offer the resources read, extract and write."""

    runs_already: ClassVar[bool] = True

    kind: Literal["address"]
    address: str
    """``tcp://HOST:PORT`` or ``tls://HOST:PORT``."""
    tls: TlsSpec | None = None
    """Certificates with which the client identifies itself to the scheduler."""

    @model_validator(mode="after")
    def _encrypted(self) -> AddressSpec:
        if self.tls and not self.address.startswith("tls://"):
            raise ValueError(f"with tls, address {self.address!r} has to begin with tls://, else nothing would be encrypted")
        return self

    def worker_groups(self) -> Mapping[str, GroupSpec]:
        """None: somebody else started the workers."""
        return {}

    def connect(
        self,
        name: str,  # noqa: ARG002 (as of `ClusterSpec`)
        stop: Event | None,  # noqa: ARG002 (as above)
        on_wait: Callable[[str], None],  # noqa: ARG002 (as above)
        n_images: int | None = None,  # noqa: ARG002 (as above)
    ) -> AbstractContextManager[Any]:
        """Connect; do not wait for workers."""
        return _connected(self)

    def show(self, job_name: str) -> str:  # noqa: ARG002 (as above)
        """The address."""
        return f"# a scheduler that runs already{', over TLS' if self.tls else ''}; nothing is launched\n{self.address}"

    def describe(self) -> str:
        """The address."""
        return self.address


@contextlib.contextmanager
def _connected(spec: AddressSpec) -> Iterator[Any]:
    from distributed import Client  # noqa: PLC0415 (cluster.yaml is read without Dask)

    client = Client.__new__(Client)  # in two steps, because a client that cannot connect must be closed
    try:
        client.__init__(spec.address, timeout=CONNECT_TIMEOUT_S, security=spec.tls and spec.tls.security())
    except (OSError, TimeoutError, ValueError, TypeError, AssertionError) as error:
        _close_unconnected(client)
        # TypeError if tls:// is used without certificates; AssertionError if Dask's own thread did not start within 10 s.
        raise FeaturemapsError(
            f"no Dask scheduler answers at {spec.address} ({error}): nothing was started; check the address, that `dask scheduler` runs, "
            "and where it uses TLS (tls://) the certificates under tls"
        ) from error
    with client:
        yield client


def _close_unconnected(client: Any) -> None:
    """Close a client that could not connect, and end its thread.

    Dask does neither. Otherwise the garbage collector closes it at some later time, perhaps in the thread that will run the next client's
    event loop. That thread would wait for a lock of the thread that starts it: for 10 s, until an AssertionError.
    """
    with contextlib.suppress(Exception):
        client.close()
    client._loop_runner.stop()
