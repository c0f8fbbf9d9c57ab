"""What a kind of place must offer to hold stores: one module per kind, `folder` and `bucket`, chosen in `objects`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Lock(Protocol):
    """The lock object of one store, as one run takes, renews and returns it."""

    def take(self, document: dict[str, Any], judge: Callable[[bytes, float], None]) -> None:
        """Create the lock, or replace one that ``judge`` lets go.

        ``judge`` is given the old content and the seconds since its last heartbeat, by the server's clock. It raises to refuse.

        Raises
        ------
        StoreBusyError
            When another run was faster.
        """

    def stamp(self) -> Any:
        """What each heartbeat changes; None where there is no lock."""

    def beat(self) -> None:
        """Renew the lock, if it is still ours."""

    def give_back(self) -> None:
        """Let the next run have the store at once, if the lock is still ours."""


class Storage(Protocol):
    """A kind of place. What it raises is an `OSError` as a file system's: FileNotFoundError where there is no object."""

    @property
    def IS_REMOTE(self) -> bool:  # noqa: N802 (a constant of a module)
        """Whether each request takes long and costs little, so that many should be under way at once."""

    def parse(self, text: str) -> Any:
        """The place that a user's text names; None where it names one of another kind."""

    def fetch(self, path: Any) -> tuple[bytes, Any]:
        """Content of an object, and the condition under which `put` replaces just this one; None where conditions are unknown."""

    def fetch_dated(self, path: Any) -> tuple[bytes, float]:
        """Content of an object, and when it was written, as `modified_s`."""

    def condition_of(self, path: Any) -> Any:
        """The condition of `fetch`, without the content; ``create`` where there is no object."""

    def put(self, path: Any, parts: Sequence[bytes], *, durable: bool, only: Any) -> None:
        """Write one object whole; see `objects.put`."""

    def size_bytes(self, path: Any) -> int:
        """Size of an object."""

    def modified_s(self, path: Any) -> float:
        """When an object was written, in seconds since 1970, by the clock of the server that holds it."""

    def children(self, path: Any) -> list[str]:
        """Names of the objects and folders in a folder, sorted."""

    def litter(self, path: Any) -> list[Any]:
        """Temporary objects in a store, of writes that are under way or were killed."""

    def make_folder(self, path: Any, *, durable: bool) -> None:
        """Make a folder with its parents, if it is not there."""

    def nearest_folder(self, path: Any) -> Any:
        """A folder, or the deepest that is there of those that it would be made in."""

    def delete(self, path: Any) -> None:
        """Delete an object, if there is one."""

    def remove_folder(self, path: Any) -> None:
        """Remove a folder with all that is in it, if it is there."""

    def free_bytes(self, path: Any) -> int | None:
        """Free space for a store; None where nothing says."""

    def object_store(self, path: Any) -> Any:
        """The obstore store through which zarr reads a folder; None where zarr reads its files."""

    def lock(self, path: Any, *, sole_writer: bool) -> Lock:
        """The lock object at a path."""
