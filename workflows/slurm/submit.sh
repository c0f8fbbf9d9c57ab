#!/bin/sh
# Hands a whole run to Slurm, and says how to follow it: sh submit.sh [JOB.yaml], a file beside this one, with featuremaps on the PATH.
# For the first run, a resumed one and tonight's new images; a job in the queue for the same store is said, and nothing is submitted twice.
set -eu
cd "$(dirname "$0")"    # where cluster.yaml is looked up
job=${1:-job.yaml}

# Looks at the installation, Slurm, the cluster's entry and the store's place, and reads the headers of all images, as `plan` does. SKIP_CHECKS=1 leaves it out.
if [ -z "${SKIP_CHECKS:-}" ] && ! featuremaps doctor "$job"; then
    echo "submit.sh: what is marked FAIL has to be corrected first: nothing was submitted" >&2
    exit 1
fi
said=$(featuremaps submit "$job")
echo "$said"
id=$(echo "$said" | sed -n 's/^job \([0-9]*\) .*/\1/p')
cat <<END

how far it is, and its jobs:  featuremaps status $job
what the driver says:         tail -F featuremaps-logs/*-driver-$id.log
the queue:                    squeue --me --format='%.10i %.40j %.10T %r'
to take it back:              scancel $id        (nothing is lost; submit.sh goes on from there)
END
