"""Run a job on a Dask client of your own: ``python script.py job.yaml``. It ends with the exit code of ``featuremaps run``."""

from __future__ import annotations

import sys

from distributed import Client, LocalCluster

import pipeline
from pipeline import errors


def main(job_file: str) -> int:
    """Run the job on two worker processes; put your own cluster here."""
    try:
        job = pipeline.load_job(job_file)
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, resources={"read": 1, "extract": 1, "write": 1}, dashboard_address=":0"
            ) as cluster,
            Client(cluster) as client,
        ):
            summary = pipeline.run_job(job, client)
    except errors.FeaturemapsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        return errors.EXIT_RUN_AGAIN
    print(f"{summary.outcome}: {summary.n_done} images done, {summary.n_unchanged} unchanged, {summary.n_bad_total} bad")
    return summary.exit_code


if __name__ == "__main__":  # workers are new processes, which import this file
    sys.exit(main(sys.argv[1]))
