#!/bin/sh
# One night: bring a store up to date with its source, and say in plain words what happened, for a mail or a journal.
#
#   nightly.sh JOB.yaml        with featuremaps in the PATH
#
# QUIET=1          says nothing when all is well (cron mails whatever is said); the log has the summary of each night
# NEW_BAD=1        with QUIET, speaks up also when tonight's run found bad images, however few
# VERIFY_ON=Sun    audits the store, too, after a complete run that began on this day (Mon, Tue, ...); this reads all maps
# VERIFY_SAMPLE=20 images that the audit computes anew; 0 leaves the images alone
# REPORT=FILE.html writes a page about the store there at the end, also of a night that failed; but not of one that was told to stop
# LOGS=FOLDER      where the log of each night goes, for 90 nights; `logs` beside the job file
#
# Exit codes are those of featuremaps: 0 complete, 1 failed, 2 refused, 3 too many bad images, 75 stopped early or another run has the store.
# It needs no flock: the store's lock refuses a second run, also one on another machine.
set -u
if [ $# != 1 ] || [ ! -f "$1" ]; then
    echo "nightly.sh: one JOB.yaml that exists is needed, and this was given: $*; nothing was started" >&2
    exit 2
fi
job=$1
day=$(LC_ALL=C date +%a)
logs=${LOGS:-$(dirname "$job")/logs}
mkdir -p "$logs" || exit 1
log=$logs/$(date +%Y-%m-%dT%H%M%S).$$
find "$logs" -name '*.log' -mtime +90 -delete

# Runs a command and passes signals on, so that the run drains; `wait` ends at the signal, and is called again for the rest.
attend() {
    "$@" >>"$log.txt" 2>>"$log.log" &
    child=$!
    signalled=1
    while [ $signalled = 1 ]; do
        signalled=0
        wait $child
        code=$?
    done
}
child=
was_stopped=
trap 'signalled=1; was_stopped=1; [ -z "$child" ] || kill -TERM $child 2>/dev/null' TERM INT HUP
attend featuremaps run "$job"

verdict() {
    case $1 in
    0) echo "complete" ;;
    1) echo "FAILED: what was committed stands, and the next night goes on from there; the reason is below" ;;
    2) echo "REFUSED, no image was changed: the source, the store or the job file is not as expected; what to do is below" ;;
    3) echo "complete, but TOO MANY BAD IMAGES (see max_quarantined in the job file): look at the reasons below" ;;
    75) echo "NOT FINISHED, and nothing is lost: another run has the store, or this one was told to stop; the next night goes on" ;;
    *) echo "ENDED with $1 (above 128: killed by signal $1 - 128): what was committed stands, and the next night goes on" ;;
    esac
}
report() {
    echo "featuremaps, $job on $(uname -n), $(date +%Y-%m-%d): $(verdict $code)"
    echo
    cat "$log.txt"
    if [ $code -ne 0 ] && [ $code -ne 3 ]; then
        if grep -q '^featuremaps: ' "$log.log"; then grep '^featuremaps: ' "$log.log"; else tail -n 20 "$log.log"; fi
    fi
    if [ $code -eq 3 ]; then
        echo
        echo "The store, and the first of its bad images:"
        featuremaps status "$job"
        echo "Images that were mended are tried again by: featuremaps run $job --retry-quarantined"
    fi
    echo
    echo "log: $log.log"
}

if [ $code -eq 0 ] && [ -z "$was_stopped" ] && [ "$day" = "${VERIFY_ON:-}" ]; then
    sample=${VERIFY_SAMPLE:-20}
    if [ "$sample" = 0 ]; then set -- --no-source; else set -- --sample "$sample"; fi
    printf '\nTonight the store was audited, too:\n' >>"$log.txt"
    attend featuremaps verify "$job" "$@"
    if [ $code -ne 0 ] && [ -n "$was_stopped" ]; then
        code=75
        echo "The audit was stopped; the images are complete." >>"$log.txt"
    elif [ $code -ne 0 ]; then
        echo "Have bad maps computed again with: featuremaps verify $job --repair, and another run" >>"$log.txt"
    fi
fi
if [ -n "${REPORT:-}" ] && [ -z "$was_stopped" ]; then featuremaps report "$job" -o "$REPORT" >/dev/null 2>>"$log.log" || echo "no page: see $log.log" >>"$log.txt"; fi
has_new_bad=
if [ -n "${NEW_BAD:-}" ] && grep -Eq '^complete: .* [1-9][0-9]* (quarantined|rejected),' "$log.txt"; then has_new_bad=1; fi
if [ $code -ne 0 ] || [ -z "${QUIET:-}" ] || [ -n "$has_new_bad" ]; then report; fi
cat "$log.txt" >>"$log.log"
rm -f "$log.txt"
exit $code
