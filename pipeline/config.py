"""Typed models of ``job.yaml``; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import UsageError
from pipeline.patterns import escape, has_unknown_user, home, is_pattern
from pipeline.text import read_layer
from pipeline.validation import BYTES, SECONDS, WORDS, validate_model

Activation = Literal["sigmoid", "tanh", "relu", "none"]
Dtype = Literal["float32", "float16", "uint16", "uint8"]
ResizeFilter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
ImageFormat = Literal["AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
"""As Pillow names them."""
IMAGE_SUFFIXES: dict[ImageFormat, str] = {
    "AVIF": ".avif",
    "BMP": ".bmp .dib",
    "GIF": ".gif",
    "JPEG": ".jpg .jpeg .jpe .jfif",
    "PNG": ".png",
    "PPM": ".ppm .pgm .pbm .pnm",
    "TIFF": ".tif .tiff",
    "WEBP": ".webp",
}
"""Suffixes of the files that count as images in a folder; the content decides how a file is decoded."""

Positive = Annotated[int, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]

JOB_SUFFIXES = (".yaml", ".yml")
"""By which an argument of the command is taken for a job file."""
DEFAULT_PIXEL_LIMIT = 178_956_970
POOLED = "pooled"
"""The output that keeps the pooled values of every layer, and no maps."""


class StrictModel(BaseModel):
    """Refuses unknown keys, and does not change; a field's description is the help of its option on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class DecodeSpec(StrictModel):
    """How the bytes of a file become the pixels that the extractor sees."""

    color: Literal["rgb", "grey"] = Field("rgb", description="Channels that the extractor sees.")
    """``rgb``: three channels; ``grey``: one (ITU-R 601-2 luma, as Pillow's mode L)."""
    background: tuple[Byte, Byte, Byte] = Field(
        (255, 255, 255), description="Compose transparent pixels onto it (default: white)."
    )
    """What transparent pixels are composed onto, as RGB."""
    exif_orientation: bool = Field(True, description="Turn and mirror as the EXIF orientation says (default), or not.")
    """Turn and mirror as the EXIF orientation says."""
    pixel_limit: Positive = Field(DEFAULT_PIXEL_LIMIT, description="Reject images of more pixels than this.")
    """Images of more pixels (height x width, as stored) are rejected before they are decoded."""
    formats: Annotated[tuple[ImageFormat, ...], WORDS] = Field(
        get_args(ImageFormat), description="A file format to read; repeat for several (default: all)."
    )
    """The file formats that are read; the content counts, not the name."""
    resize: tuple[Positive, Positive] | None = Field(None, description="Resize every image to this input size.")
    """Input height and width that every image is resized to; None keeps each size."""
    resize_filter: ResizeFilter = Field("bilinear", description="How --resize interpolates (default: bilinear).")
    """Pillow's resampling filter for ``resize``."""

    @property
    def channels(self) -> int:
        """Number of channels of a decoded image."""
        return 3 if self.color == "rgb" else 1


class LayerSpec(StrictModel):
    """One layer: valid convolution, optional max-pool, bias, activation."""

    filters: Positive = 2
    """Number of filters, which is that of the layer's channels, or maps."""
    kernel: tuple[Positive, Positive] = (9, 9)
    """Height and width of the kernel in values of the layer below; one number is both."""
    pool: tuple[Positive, Positive] = (1, 1)
    """Height and width of the max-pool, which is also its stride; one number is both, and 1 is none."""
    activation: Activation = "sigmoid"
    """What is applied to the sum of convolution and bias."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """The command line's form stands for a layer in a job file, too."""
        try:
            return read_layer(value, get_args(Activation)) if isinstance(value, str) else value
        except UsageError as error:
            raise ValueError(str(error)) from None

    @field_validator("kernel", "pool", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """Read the command line's form ``FILTERSxHEIGHTxWIDTH[:ACTIVATION][:poolN]``.

        Raises
        ------
        UsageError
            When the text does not have that form: each word is used once, or refused.

        Examples
        --------
        >>> LayerSpec.parse("20x5x5:tanh:pool2")
        LayerSpec(filters=20, kernel=(5, 5), pool=(2, 2), activation='tanh')
        """
        return cls(**read_layer(text, get_args(Activation)))


class ExtractorSpec(StrictModel):
    """A stack of layers and where its weights come from."""

    layers: Annotated[tuple[LayerSpec, ...], WORDS] = Field(
        (LayerSpec(),), min_length=1, description="A layer of the extractor; repeat for a stack."
    )
    """The layers, each the input of the next; they are called conv1, conv2, ..."""
    seed: int = Field(23455, ge=0, lt=2**32, description="Seed of the weights (default 23455).")
    """Seed of ``numpy.random.RandomState``, used when there is no weights file."""
    weights: str | None = Field(None, description="Weights of the layers, instead of seeded ones.")
    """A safetensors file with ``convN.weight`` and ``convN.bias`` for N = 1, 2, ... in PyTorch's orientation."""
    outputs: Annotated[tuple[str, ...], WORDS] = Field(
        (), description="conv1, ... to keep maps (default: the last); pooled for none."
    )
    """What is stored: the names of layers, for their maps and pooled values, and ``pooled``, for the pooled values of every layer.

    Empty means the last layer; ``pooled`` alone keeps no maps at all.
    """
    tf32: bool = Field(False, description="On GPUs, multiply in TF32: faster, but less exact.")
    """On GPUs, multiply in TF32: faster, but weights and inputs are rounded to 11 bits (see docs/gpu.md)."""

    @model_validator(mode="after")
    def _known_outputs(self) -> ExtractorSpec:
        unknown = [name for name in self.outputs if name not in {*self._layer_names, POOLED}]
        if unknown:
            known = [*self._layer_names, POOLED]
            raise ValueError(f"outputs {unknown} are neither layers of this extractor nor {POOLED!r}; known are {known}")
        if len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"outputs {list(self.outputs)} name a layer twice")
        return self

    @property
    def _layer_names(self) -> list[str]:
        return [f"conv{i + 1}" for i in range(len(self.layers))]

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the layers whose maps are stored, first layer first."""
        stored = self.outputs or self._layer_names[-1:]
        return tuple(name for name in self._layer_names if name in stored)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the layers of which anything is stored, pooled values at least, first layer first."""
        return tuple(self._layer_names) if POOLED in self.outputs else self.map_names


class Job(StrictModel):
    """One run: what is read, how, and where the maps go."""

    source: str
    """A folder, a glob pattern, or a .txt, .csv or .parquet list of paths; also under s3://, gs:// or az://BUCKET."""
    store: str
    """Where the Zarr store is or will be: a folder, or s3://, gs:// or az://BUCKET/NAME."""
    dtype: Dtype = Field("float32", description="How maps are stored.")
    """How maps are stored; float32 is what is computed, the others have the bound of their error in the store."""
    decode: DecodeSpec = DecodeSpec()
    """How files become pixels."""
    extractor: ExtractorSpec = ExtractorSpec()
    """What is computed from the pixels."""
    limit: Positive | None = Field(None, description="Only the first N images of the listing.")
    """Only the first N images of the listing."""
    exclude: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Leave out files and folders of this name, or NAME/ for folders; repeat for several."
    )
    """Names that the listing of a folder, pattern or bucket leaves out, with wildcards; see `exclusion.Exclusion`."""
    default_exclude: bool = Field(
        True, description="Leave out @eaDir, .snapshot, #recycle, __MACOSX and hidden folders (default of new stores), or not."
    )
    """Leave out `exclusion.DEFAULT_EXCLUDE`, in stores that did so from their first run on."""
    workers: Positive | None = Field(None, description="Batches at work at once (default: one per core).")
    """Batches that the embedded cluster works on at once, in a process each, or with GPUs in threads; None is one per core."""
    memory_limit_bytes: Annotated[int, BYTES, Field(gt=0)] | None = Field(None, description="Memory of one worker.")
    """Memory of one worker, bytes or text such as ``4 GiB``; None shares the machine's among them."""
    gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs to use, 0 for none (default: all).")
    """GPUs that the embedded cluster uses; None is all that there are."""
    processes_per_gpu: Positive | None = Field(None, description="Worker processes that share a GPU (default: by its cores).")
    """Worker processes of the embedded cluster that share a GPU; None is one for every four of its cores, and at most eight."""
    cluster: str | None = Field(None, description="A cluster of cluster.yaml (default: all local cores).")
    """A name from cluster.yaml; None is the embedded local cluster."""
    check: Literal["fingerprint", "digest"] = Field(
        "fingerprint", description="Look for changes by size and time, or by content."
    )
    """How images that are done are known to be unchanged: by size and time, or by reading them all and comparing their SHA-256."""
    retry_quarantined: bool = Field(False, description="Try quarantined and rejected images again.")
    """Try quarantined and rejected images again, also those that have not changed."""
    max_quarantined: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Exit with 3 when more images than this are bad."
    )
    """More quarantined or rejected images than this end the run with exit code 3; None allows any number."""
    max_removed: float = Field(0.10, ge=0, le=1, description="Largest share that one run may mark removed (0.10).")
    """Largest share of the store's images that one run may mark as removed."""
    durability: Literal["process", "machine"] = Field("process", description="What may die without loss (process).")
    """What may die without a committed row being lost: any process, or, as each object is synced to the disk, the machine."""
    sole_writer: bool = Field(False, description="Vouch that nobody else writes to a bucket's store.")
    """Use a bucket whose server ignores conditional puts: nobody else ever writes to this store, and you vouch for it."""
    deadline_s: Annotated[float, SECONDS] = Field(
        600.0, gt=0, description="Replace a worker that is at one image, or one write, for longer (600)."
    )
    """A worker that is at one image, or at one write, for longer waits for a storage that hangs: it is replaced."""


def load_job(path: str | Path, overrides: dict[str, Any] | None = None) -> Job:
    """Read a job file; relative paths in it are relative to its folder.

    Parameters
    ----------
    path : str or Path
        A YAML file with the keys of `Job`.
    overrides : dict, optional
        Values that replace those of the file, with the same keys.

    Raises
    ------
    UsageError
        When the file cannot be read, is no mapping, or holds an unknown key or a bad value.
    """
    path = Path(path)
    try:
        data = read_yaml(path)
    except ValueError as error:
        remedy = "give a YAML file with at least source and store" if isinstance(error.__cause__, OSError) else "correct the file"
        raise UsageError(f"job file {path} cannot be read ({error}), so nothing was started; {remedy}") from error
    if not isinstance(data, dict):
        raise UsageError(f"job file {path} holds {type(data).__name__}, not keys and values; it needs at least source and store")
    for key in ("source", "store"):
        if isinstance(data.get(key), str):
            data[key] = _beside(path, data[key], is_source=key == "source")
    extractor = data.get("extractor")
    if isinstance(extractor, dict) and isinstance(extractor.get("weights"), str):
        extractor["weights"] = _beside(path, extractor["weights"])
    return make_job(_merge(data, overrides or {}), where=f"job file {path}")


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 has it, 8:00:00 and 0123 are texts, not 28,800 and 83."""


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _INTEGER]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    Raises
    ------
    ValueError
        When it cannot be read, or has keys that are no text or numbers above 64 bits.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)  # noqa: S506 (a safe one)
        _check_values(content, set())
    except yaml.MarkedYAMLError as error:
        raise ValueError(_explain_syntax(error, text)) from error
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
    ) as error:
        # The last four are what PyYAML raises over a tag that does not fit its value, such as "!!bool maybe".
        raise ValueError(" ".join(str(error).split())) from error
    return content


def _explain_syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """Say on one line what YAML draws over several: the line, and what is wrong there."""
    mark = error.problem_mark or error.context_mark
    n = mark.line if mark is not None else 0
    if "'\\t'" in str(error.problem):
        before = "".join(text.splitlines()[n : n + 1])[: mark.column if mark is not None else 0]
        return f"line {n + 1} {'has a tab outside quotes' if before.strip() else 'is indented with a tab'}: YAML wants spaces"
    if error.problem == "but found another document":
        return f"line {n + 1}: a second document begins here, and a file has one"
    found = str(error.problem).replace("'<stream end>'", "the end of the file")
    if error.context is None or error.context_mark is None:
        return f"line {n + 1}: {found}"
    return f"line {n + 1}: {found}, {error.context} that begins on line {error.context_mark.line + 1}"


def _check_values(content: Any, seen: set[int]) -> None:
    if id(content) in seen:  # an alias, of which a small file can hold billions
        return
    if isinstance(content, int) and content.bit_length() > 64:  # Python refuses to write it in an error
        raise ValueError(f"a number of {content.bit_length()} bits is larger than anything here can be")
    if isinstance(content, dict | list):
        seen.add(id(content))
    if isinstance(content, dict):
        for key in content:
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is no text; put it in quotes")  # noqa: TRY004 (of the file's content)
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            _check_values(value, seen)


def _beside(path: Path, value: str, *, is_source: bool = False) -> str:
    """A path in a job file, which is relative to the file's folder."""
    if "://" in value:
        return value
    if has_unknown_user(value):
        raise UsageError(f"job file {path} names {value!r}, whose home folder is not known: write the path out")
    folder = str(path.absolute().parent)
    return os.path.join(escape(folder) if is_source and is_pattern(value) else folder, home(value))  # noqa: PTH118 (it keeps ./~)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def make_job(values: dict[str, Any], where: str = "the command") -> Job:
    """Validate plain values into a `Job`.

    Raises
    ------
    UsageError
        Naming every unknown key, with the nearest known one, and every bad value.
    """
    return validate_model(Job, values, where)
