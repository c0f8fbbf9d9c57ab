"""What is left out by name: counted, said, and never in a store of before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checks.plan import plan_job
from pipeline.config import Job
from pipeline.errors import UsageError
from pipeline.source.exclusion import DEFAULT_EXCLUDE, Exclusion
from pipeline.source.listing import list_collection
from pipeline.store.create import check_job, create_store, list_job, prepare_folder
from pipeline.store.store import Store
from tests.conftest import make_images

KEPT = ["a/img00000.png", "img00000.png"]
LEFT_OUT = [f"{folder}/img00000.png" for folder in ("@eaDir", "a/.snapshot", "#recycle", "__MACOSX", ".hidden")]


@pytest.fixture
def source(tmp_path):
    """Images in folders of every kind that is left out, and in two that are not."""
    for path in [*KEPT, *LEFT_OUT]:
        make_images((tmp_path / "photos" / path).parent, 1, [(12, 14)])
    return tmp_path / "photos"


@pytest.fixture
def job(source, tmp_path):
    return Job(source=str(source), store=str(tmp_path / "features.zarr"))


def made(job, **change):
    """The store of a job, without any image."""
    spec, weights = check_job(job, list_job(job))
    path = Path(job.store)
    prepare_folder(path)
    create_store(path, replace(spec, **change), weights)
    return path


def test_a_new_store_leaves_out_what_file_servers_keep_beside_images_and_says_so(job):
    listing = list_job(job)
    assert listing.paths == KEPT
    assert listing.excluded == dict.fromkeys(["#recycle/", ".*/", "@eaDir/", "__MACOSX/", ".snapshot/"], 1)
    assert "Left out 5 folders or files by name (" in plan_job(job).describe()
    assert list_job(job.model_copy(update={"default_exclude": False})).paths == sorted([*KEPT, *LEFT_OUT])


def test_a_store_keeps_the_rule_that_it_was_made_with(job):
    path = made(job)
    assert Store(path).spec.excluded == DEFAULT_EXCLUDE
    assert list_job(job).paths == KEPT


def test_a_store_of_before_has_no_such_rule_so_that_no_row_is_removed(job):
    path = made(job, excluded=())
    assert "excluded" not in json.loads((path / "zarr.json").read_text())["attributes"]["featuremaps"]
    assert list_job(job).paths == sorted([*KEPT, *LEFT_OUT])


def test_a_job_leaves_out_files_folders_and_paths(source):
    make_images(source / "a" / "raw", 1, [(12, 14)])
    assert list_collection(str(source), ["a/raw", *DEFAULT_EXCLUDE]).paths == KEPT
    assert list_collection(str(source), ["raw/", *DEFAULT_EXCLUDE]).paths == KEPT
    with pytest.raises(UsageError, match=r"left out by name \(.*img\*.*; see --exclude"):
        list_collection(str(source), ["img*", *DEFAULT_EXCLUDE])


def test_a_pattern_may_name_a_hidden_folder_and_still_meets_no_thumbnails(source):
    assert list_collection(f"{source}/.hid*/*.png", DEFAULT_EXCLUDE).paths == [".hidden/img00000.png"]
    assert list_collection(f"{source}/**/*.png", DEFAULT_EXCLUDE).paths == KEPT


def test_objects_of_a_bucket_are_left_out_by_any_folder_of_their_key():
    exclusion = Exclusion(DEFAULT_EXCLUDE)
    assert [key for key in [*KEPT, *LEFT_OUT] if not exclusion.leaves_out_key(key)] == KEPT


def test_a_list_names_its_images_itself(tmp_path):
    job = Job(source=str(tmp_path / "photos.txt"), store=str(tmp_path / "f.zarr"), exclude=["a"])
    with pytest.raises(UsageError, match="is a list, which names its images itself"):
        list_job(job)
