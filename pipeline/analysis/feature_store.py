"""Read-only, lazy views of a store for notebooks: pandas for the images, Xarray and Dask for the maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import xarray as xr

from pipeline.analysis import map_images, selection, tables
from pipeline.analysis.datasets import source_pixels
from pipeline.analysis.images import Images
from pipeline.analysis.neighbours import Neighbours
from pipeline.config import ExtractorSpec
from pipeline.extract.layers import Array
from pipeline.store.named import named_store
from pipeline.store.objects import Place
from pipeline.store.schema import STATISTICS, StoreSpec
from pipeline.store.settings import extractor_spec
from pipeline.store.store import Store


def open_store(path: str | Place) -> FeatureStore:
    """Open a store for analysis; nothing is read until it is asked for.

    Parameters
    ----------
    path : str or Path
        The store's folder, its file:// address, s3://, gs:// or az://BUCKET/NAME, or a job file.

    Raises
    ------
    UsageError
        When there is no store, or one of another format.

    Examples
    --------
    >>> store = pipeline.open_store("features.zarr")  # doctest: +SKIP
    >>> store.image("photos/cat.jpg")["conv1"].plot.imshow(col="conv1_channel")  # doctest: +SKIP
    """
    return FeatureStore(named_store(path))


class FeatureStore:
    """A store as it was when it was opened; rows that a run appends later are not seen. It can be pickled.

    `select` and `join` give another one that sees fewer images, or more columns, of the same store. Made by `open_store`.
    """

    def __init__(self, path: Place, *, _images: Images | None = None) -> None:
        path = path.absolute()  # a notebook may change its folder, and chunks that are not found read as fill
        self._images = _images or Images(Store(path))
        self._store = self._images.store
        self._neighbours = Neighbours(self._images)
        self.path = path

    def __repr__(self) -> str:
        return f"<FeatureStore {self._images.describe()}>"

    # -- what the store is ---------------------------------------------------------------------------------------------------------

    @property
    def source_root(self) -> str:
        """Folder that the paths are relative to."""
        return self._store.spec.source_root

    @property
    def spec(self) -> StoreSpec:
        """What the store was made with, that is source, dtype, extractor, decode rules and versions."""
        return self._store.spec

    @cached_property
    def extractor(self) -> ExtractorSpec:
        """The extractor's layers, in order, and which of them are stored."""
        return extractor_spec(self._store.spec)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the stored layers, of all of which there are pooled values."""
        return tuple(layer.name for layer in self._store.spec.layers)

    @property
    def map_layers(self) -> tuple[str, ...]:
        """Names of the stored layers of which there are maps, too."""
        return tuple(layer.name for layer in self._store.spec.layers if layer.has_maps)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the shape classes, ``heightxwidth`` in input pixels."""
        return tuple(c.name for c in self._store.classes.values())

    @cached_property
    def weights(self) -> dict[str, Array]:
        """The weights as used, ``conv1_weight`` (filter, channel, y, x), ``conv1_bias`` (filter,), ...; float32.

        They are for a cross-correlation over ``pixel / 256``.

        Raises
        ------
        FeaturemapsError
            When they are damaged.
        """
        return self._store.weights()

    @property
    def receipts(self) -> list[dict[str, Any]]:
        """What each run left of itself in ``runs/``, oldest first."""
        return self._store.receipts()[::-1]

    # -- the images ----------------------------------------------------------------------------------------------------------------

    @property
    def images(self) -> pd.DataFrame:
        """Table of the live rows and rejected images, one line per image; the index numbers the lines of the whole store.

        Columns: path, class, row, source_height, source_width, input_height, input_width (pixels; 0 where rejected), size_bytes, digest
        (SHA-256 of the file, "" if not read), status (pending, done, quarantined or rejected), error, and those that were joined.
        """
        return self._images.table.copy(deep=False)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images per status, which is pending, done, quarantined or rejected."""
        return dict(self._images.counts)

    @property
    def joined(self) -> dict[str, int]:
        """Columns that `join` brought in, and how many images had a line in the user's table."""
        return dict(self._images.joined)

    def join(self, table: pd.DataFrame, on: str = "path") -> FeatureStore:
        """The same images with the columns of a table of yours: labels, dates, what else is known of them.

        Parameters
        ----------
        table : pandas.DataFrame
            A line per image, or per value of another column of `images`; lines that match no image do no harm.
        on : str
            The column (or level of the table's index) that has what `images` has under the same name.

        Returns
        -------
        FeatureStore
            Its `images`, selections, datasets and Parquet files have the new columns. `joined` says how many images have a line
            there; what the others have is missing: NaN, or NA of pandas' nullable types (``Int64``, ``boolean``), which integers and
            booleans become then. Datasets have such integers as float64 with NaN, where that holds them exactly.

        Raises
        ------
        UsageError
            When there is no such column, a key is there twice, a name is taken, or not one image matches.

        Examples
        --------
        >>> labels = pandas.DataFrame({"path": ["a.png", "b.png"], "label": ["cat", "dog"]})  # doctest: +SKIP
        >>> store.join(labels).select(label="cat").images  # doctest: +SKIP
        """
        return FeatureStore(self.path, _images=self._images.join(table, on))

    def select(self, where: Any = None, /, **columns: Any) -> FeatureStore:
        """Some of the images, in the order of `images`.

        Parameters
        ----------
        where : boolean Series, DataFrame or list of str, optional
            Made from `images` (or `pooled`) of this very store, or of one that it was selected from, and matched by the index; some
            lines of `images`; or paths.
        **columns
            What a column must be, a value or several: ``status="done"``, ``label=["cat", "dog"]``.

        Returns
        -------
        FeatureStore
            Its datasets, pooled values, neighbours and Parquet files are of these images only. Lines of its `images` keep the
            numbers that they have in the whole store, as their index.

        Raises
        ------
        UsageError
            When there is no such column, image, status or class, or the condition is not over this store's images.

        Examples
        --------
        >>> large = store.select(store.images["input_width"] > 500, status="done")  # doctest: +SKIP
        """
        return FeatureStore(self.path, _images=self._images.select(where, columns))

    # -- values --------------------------------------------------------------------------------------------------------------------

    def dataset(self, name: str, layers: str | Sequence[str] | None = None) -> xr.Dataset:
        """One shape class, lazy: all its rows, or those of a selection.

        Parameters
        ----------
        name : str
            A class, for instance ``516x639``; see `classes`.
        layers : str or sequence of str, optional
            Stored layers; all of them by default.

        Returns
        -------
        xarray.Dataset
            Per layer its maps, if it has any, (image, channel, y, x) float32, decoded, in Dask chunks of whole shards, NaN where a row
            is padded or not done; the pooled values (image, channel) float32; the ledger's columns (image,). Coordinates are ``path``,
            joined columns, and y and x: the centre of each value's receptive field in input pixels.

        Raises
        ------
        UsageError
            When there is no such class, or no such layer.
        """
        return self._images.dataset(name, selection.choose_layers(self.spec, layers, str(self.path)))

    def tree(self, layers: str | Sequence[str] | None = None) -> xr.DataTree:
        """All shape classes, or those of a selection, lazy: a node per class, each what `dataset` gives.

        Examples
        --------
        >>> {name: node["conv1"].mean().compute() for name, node in store.tree("conv1").children.items()}  # doctest: +SKIP
        """
        names = self._images.table["class"].unique() if self._images.is_selection else self.classes
        return xr.DataTree.from_dict({name: self.dataset(name, layers) for name in map(str, names) if name})

    def image(self, path: str, layers: str | Sequence[str] | None = None) -> xr.Dataset:
        """One image's maps, cropped to its valid extent and decoded to float32.

        Parameters
        ----------
        path : str
            As in `images`: relative to the source root.
        layers : str or sequence of str, optional
            Stored layers; all of them by default.

        Returns
        -------
        xarray.Dataset
            Per layer (channel, y, x) float32 and the pooled values (channel,) float32, in memory; y and x are coordinates in input
            pixels; path and joined columns are coordinates, too.

        Raises
        ------
        UsageError
            When the path is unknown, or its maps are not there: with the reason; or when there is no such layer.
        FeaturemapsError
            When its maps are damaged.
        """
        return self._images.image(path, selection.choose_layers(self.spec, layers, str(self.path)))

    def pixels(self, path: str) -> Array | None:
        """The source image as the extractor saw it, whatever its status.

        Returns
        -------
        (y, x, channel) uint8 or None
            Three channels or one; None where the source is out of reach, or cannot be decoded.

        Raises
        ------
        UsageError
            When the path is unknown, or the image has changed since its maps were computed.
        """
        name, group, row = self._images.find(path)
        return source_pixels(self._store, name, group, row, is_done=self._images.status(group, row) == "done")

    def map_images(self, function: map_images.Function, layer: str | None = None) -> pd.DataFrame | pd.Series:
        """Call a function with the maps of every image that is done, and make a table of what it gives.

        A Dask task reads at most 64 MiB of float32 maps (or one image) and calls the function for one image after the other. Tasks
        run on the current ``distributed`` client if there is one, else in as many threads as there are cores; each thread holds that
        much, as it is stored and decoded, and what the function takes. The function is called in several threads at once.

        Parameters
        ----------
        function : callable
            Takes (channel, y, x) float32, cropped to the image's valid extent; gives a number, a 1-D array of numbers, or a dict
            of values: the same kind for every image.
        layer : str, optional
            A layer with maps; may be left out where there is one only.

        Returns
        -------
        pandas.Series or pandas.DataFrame
            Indexed by path in the order of `images`: a Series of numbers, or a DataFrame with a column per item of the array or
            key of the dict.

        Raises
        ------
        UsageError
            When there is no such layer, it has no maps, or the function gives something else, or not the same for all.
        FeaturemapsError
            When maps cannot be read.
        Exception
            What the function raised, with a note that names the image.

        Examples
        --------
        >>> contrast = store.map_images(lambda maps: maps.max((1, 2)) - maps.min((1, 2)))  # doctest: +SKIP
        """
        chosen = selection.choose_map_layer(self.spec, layer, str(self.path))
        return map_images.map_images(self._store, self._images.done, chosen, function)

    def pooled(self, layer: str | Sequence[str] | None = None, statistics: str | Sequence[str] = STATISTICS) -> pd.DataFrame:
        """Mean, standard deviation, minimum and maximum of every map, as the run computed them; no maps are read.

        Parameters
        ----------
        layer : str or sequence of str, optional
            Stored layers; all of them by default.
        statistics : str or sequence of str
            Of mean, std, min and max.

        Returns
        -------
        pandas.DataFrame
            Indexed by path, a line per image that is done, in the order of `images`; float32 columns ``conv1_mean_0``,
            ``conv1_mean_1``, ..., ``conv1_std_0``, ...

        Raises
        ------
        UsageError
            When there is no such layer or statistic.
        """
        layers = selection.choose_layers(self.spec, layer, str(self.path))
        return tables.pooled(self._store, self._images.done, layers, selection.choose_statistics(statistics))

    def nearest(
        self, path: str, n: int = 5, *, layer: str | Sequence[str] | None = None, statistics: str | Sequence[str] = STATISTICS
    ) -> pd.DataFrame:
        """The images whose pooled values are most like those of one.

        Each column of `pooled` is standardised over the images that are done (mean 0, standard deviation 1; columns without spread
        are dropped); the distance is the Euclidean one between these vectors. 0 means equal pooled values, as of copies; images
        that differ by one standard deviation in each of k columns are sqrt(k) apart. It says how alike the maps are as a whole,
        not where in the picture things are. Distances of different selections or layers do not compare.

        Parameters
        ----------
        path : str
            An image that is done.
        n : int
            Number of neighbours; fewer where there are fewer.
        layer, statistics
            Same as for `pooled`.

        Returns
        -------
        pandas.DataFrame
            Columns path and distance (float64), nearest first, without the image itself.

        Raises
        ------
        UsageError
            When the path is unknown or not done, or there is no such layer or statistic.
        """
        return self._neighbours.nearest(path, n, layer, statistics)

    def most_alike(
        self, n: int = 1, *, layer: str | Sequence[str] | None = None, statistics: str | Sequence[str] = STATISTICS
    ) -> pd.DataFrame:
        """The pairs of images whose pooled values are most alike; distances as of `nearest`.

        With more than 16 columns of `pooled` all pairs are looked at: 10,000 images of 280 columns take some seconds, ten times as many
        images a hundred times as long; fewer layers, statistics or images take less.

        Parameters
        ----------
        n : int
            Number of pairs; fewer where there are fewer.
        layer, statistics
            Same as for `pooled`.

        Returns
        -------
        pandas.DataFrame
            Columns path, other and distance (float64), closest first.

        Raises
        ------
        UsageError
            When scipy (the extra ``analysis``) is missing, which few columns need, or there is no such layer or statistic.
        """
        return self._neighbours.most_alike(n, layer, statistics)

    def to_parquet(self, file: str | os.PathLike[str]) -> None:
        """Write `images`, with joined columns and the `pooled` values of all layers, as one Parquet file.

        One line per image in the order of `images`; pooled values are NaN where an image is not done. The file, on this machine,
        appears whole, and replaces one of that name.

        Raises
        ------
        UsageError
            When pyarrow (the extra ``parquet``) is missing, or the file cannot be written.
        """
        done, images = self._images.done, self._images.table
        pooled = tables.pooled(self._store, done, self.spec.layers, STATISTICS).set_index(done.index).reindex(images.index)
        tables.write_parquet(pd.concat([images, pooled], axis=1), file)
