"""The interface of a kind of place for stores. `folder` and `bucket` implement it; `objects` chooses between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol


class Lock(Protocol):
    """The lock object of one store; a run takes, renews and returns it."""

    def take(self, document: dict[str, Any], judge: Callable[[bytes, float], None]) -> None:
        """Create the lock, or replace one that ``judge`` allows to replace.

        ``judge`` gets the old content and the seconds since its last heartbeat, by the server's clock. It raises to refuse.

        Raises
        ------
        StoreBusyError
            When another run was faster.
        """

    def stamp(self) -> Any:
        """A value that each heartbeat changes; None if there is no lock."""

    def beat(self) -> None:
        """Renew the lock, if it is still ours."""

    def give_back(self) -> None:
        """Let the next run have the store at once, if the lock is still ours."""


class Storage(Protocol):
    """A kind of place. It raises an `OSError` like a file system's, for instance FileNotFoundError if there is no object."""

    @property
    def IS_REMOTE(self) -> bool:  # noqa: N802 (a constant of a module)
        """Whether each request has a high latency and costs little, so that many should run at once."""

    def parse(self, text: str) -> Any:
        """The place that a user's text names; None if the text names another kind of place."""

    def fetch(self, path: Any) -> tuple[bytes, Any]:
        """Content of an object, and the condition under which `put` replaces exactly this version; None without conditions."""

    def fetch_dated(self, path: Any) -> tuple[bytes, float]:
        """Content of an object, and when it was written, as in `modified_s`."""

    def condition_of(self, path: Any) -> Any:
        """The condition of `fetch`, without the content; ``create`` if there is no object."""

    def put(self, path: Any, parts: Iterable[bytes], *, durable: bool, only: Any, check: Callable[[], None] | None) -> None:
        """Write one object whole; see `objects.put_parts`."""

    def size_bytes(self, path: Any) -> int:
        """Size of an object."""

    def modified_s(self, path: Any) -> float:
        """Time of an object's last write, in seconds since 1970, by the clock of the server that holds it."""

    def children(self, path: Any) -> list[str]:
        """Names of the objects and folders in a folder, sorted."""

    def litter(self, path: Any) -> list[Any]:
        """Temporary objects in a store, from writes that are in progress or were killed."""

    def make_folder(self, path: Any, *, durable: bool) -> None:
        """Make a folder and its parents, if missing."""

    def nearest_folder(self, path: Any) -> Any:
        """The folder, or its deepest existing parent."""

    def delete(self, path: Any) -> None:
        """Delete an object, if it exists."""

    def remove_folder(self, path: Any) -> None:
        """Remove a folder and its content, if it exists."""

    def free_bytes(self, path: Any) -> int | None:
        """Free space for a store; None if unknown."""

    def object_store(self, path: Any) -> Any:
        """The obstore store through which zarr reads a folder; None if zarr reads the files itself."""

    def lock(self, path: Any, *, sole_writer: bool) -> Lock:
        """The lock object at a path."""
