#!/bin/sh
# Install the Debian packages of debian_packages.txt that are missing. What cannot be installed is named; that is no failure.
set -u
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

missing() { # the packages whose program or path is not there; Python's own, too
    while read -r place package name; do
        case $place in
        '#'* | '') ;;
        /*) [ -e "$place" ] || echo "$package" ;;
        *) command -v "$place" >/dev/null || echo "$package" ;;
        esac
    done <"$folder/debian_packages.txt"
    python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
}

stay() { # why nothing was installed
    echo "Debian packages are missing, and $1:" $packages
    echo "The tests that need them are left out. To run these as well: apt-get install" $packages
    exit 0
}

packages=$(missing)
[ -n "$packages" ] || exit 0
command -v apt-get >/dev/null || stay "this machine has no apt-get"
[ "$(id -u)" = 0 ] || stay "only root may install them"

# The tests start the services themselves. This policy keeps apt-get from starting them as well.
policy=${POLICY_RC_D:-/usr/sbin/policy-rc.d} # where the tests of this script put it
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
echo "Installing Debian packages:" $packages
apt-get update -qq || echo "apt-get cannot update its lists of packages; it goes on with the lists that it has."
for package in $packages; do # one by one, so that one that cannot be had does not keep the others away
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" </dev/null >/dev/null ||
        echo "apt-get cannot install $package."
done
packages=$(missing)
[ -z "$packages" ] || stay "apt-get could not install them"
