"""Read ``cluster.yaml``: named clusters, each of a kind of `pipeline.cluster.kinds`."""

from __future__ import annotations

import os
import re
import ssl
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from pipeline.cluster.kinds import spec_types
from pipeline.cluster.kinds.local import LocalSpec
from pipeline.cluster.spec import ClusterSpec, TlsSpec
from pipeline.config import StrictModel, read_yaml
from pipeline.errors import UsageError
from pipeline.validation import UNITS_NEEDED, validate_model

if TYPE_CHECKING:
    AnySpec = ClusterSpec
else:
    AnySpec = Union[spec_types()]  # noqa: UP007 (of a table)

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class Clusters(StrictModel):
    """``cluster.yaml``: clusters by name."""

    clusters: dict[str, Annotated[AnySpec, Field(discriminator="kind")]]


def load_cluster(name: str | None, path: Path = Path("cluster.yaml")) -> ClusterSpec:
    """Find a cluster by name; None is the local one. Errors in other entries of the file do not matter.

    Raises
    ------
    UsageError
        When the file or the name is missing, or the entry holds something unknown.
    """
    if name is None or (name == "local" and not path.exists()):
        return LocalSpec()
    try:
        values = read_yaml(path)
    except ValueError as error:
        remedy = "run from the folder that holds cluster.yaml" if isinstance(error.__cause__, OSError) else "correct the file"
        raise UsageError(
            f"cluster {name!r} is looked up in {path}, which cannot be read ({error}): nothing was started; {remedy}, or leave out "
            "--cluster to use this machine"
        ) from error
    entries = values.get("clusters") if isinstance(values, dict) else None
    if isinstance(entries, dict):
        if name not in entries:
            raise UsageError(
                f"{path} has no cluster {name!r}: nothing was started; it has {', '.join(sorted(entries)) or 'none'}"
            )
        values = values | {"clusters": {name: _expand(entries[name], f"cluster {name!r} of {path}")}}
    spec = validate_model(Clusters, values, str(path), UNITS_NEEDED).clusters[name]
    return _resolve(spec, f"cluster {name!r} of {path}", path.absolute().parent)


def _expand(value: Any, where: str) -> Any:
    """Replace ``${NAME}`` in every text by the value of the environment variable."""
    if isinstance(value, dict):
        return {key: _expand(inner, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, where) for inner in value]
    return _VARIABLE.sub(partial(_variable, where), value) if isinstance(value, str) else value


def _variable(where: str, match: re.Match[str]) -> str:
    try:
        return os.environ[match[1]]
    except KeyError:
        raise UsageError(
            f"{where} uses {match[0]}, and the environment has no {match[1]!r}: nothing was started; export it, or write the value"
        ) from None


def _resolve(spec: ClusterSpec, where: str, folder: Path) -> ClusterSpec:
    """Make paths absolute; relative paths start at the folder of the file."""

    def beside(file: str) -> str:
        return str(folder / Path(file).expanduser())

    changed = spec.located(beside)
    tls: TlsSpec | None = getattr(spec, "tls", None)
    if tls is not None:
        files = {key: beside(file) for key, file in tls.model_dump().items()}
        _check_certificates(where, files)
        changed["tls"] = TlsSpec(**files)
    return spec.model_copy(update=changed) if changed else spec


def _check_certificates(where: str, files: dict[str, str]) -> None:
    """Refuse certificates that Dask would reject only at the first connection, or for which it would ask a password."""
    for key, file in files.items():
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{where} names the {key} {file}, which cannot be read ({error.strerror}): nothing was started; correct the path (a "
                "relative one is beside the file that names it) or its permissions"
            ) from error
    try:
        context = ssl.create_default_context(cafile=files["ca_file"])
        context.load_cert_chain(files["cert"], files["key"], password="")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"{where} names certificates that cannot be used ({error}): nothing was started; ca_file, cert and key have to be PEM files, "
            "the key that of the certificate and without a password"
        ) from error
