#!/usr/bin/env bash
# Brings a checkout to where it can run: the Debian packages that are missing, a .venv, and in it this package (editable)
# with what it depends on. The Makefile calls it before everything else. Where nothing is missing it says nothing.
#
#     tools/setup.sh          what `make start` needs
#     tools/setup.sh tests    and what `make test` needs besides: a virtual machine, tools that the kernel tests use, a browser, Ceph
#
# As root, or where sudo asks for no password, it installs packages with apt-get. Otherwise it says which are missing and
# goes on without, as long as there can be a .venv: only the real ring needs the native part, only the kernel tests QEMU,
# only a test of the timeline Chromium, only those of Ceph images a cluster.
#
# Looks for what is needed (a header, a program), not for package names: Python need not be Debian's.
#
# Environment: PYTHON, the interpreter that .venv is made with (python3); UBLK_TRIO_REQUIRE_NATIVE=1, fail without the native part.
set -u
cd "$(dirname "$0")/.." || exit 1
here=$(pwd -P)
PATH=$PATH:/usr/sbin:/sbin
python=${PYTHON:-python3}
stamp=.venv/ublk_trio-setup
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM HUP

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# Runs a command that is silent unless it fails; then everything it said is shown.
quietly() {
    "$@" > "$scratch/log" 2>&1 && return
    cat "$scratch/log" >&2
    return 1
}

# ---------------------------------------------------------------- packages

APT_INSTALL='apt-get install -y --no-install-recommends'

may_install() {
    [ -n "$(type -P apt-get)" ] || return 1
    if [ "$(id -u)" = 0 ]; then
        as_root=()
    elif sudo -n true 2> /dev/null; then
        as_root=(sudo -n)
    else
        return 1
    fi
}

apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 "$@" < /dev/null
}

# install PACKAGE...: a failure is shown but not final: what is then still missing is looked at again.
install_packages() {
    say "installing the Debian packages $*"
    apt install -y --no-install-recommends "$@" > /dev/null 2>&1 && return
    say "not with this machine's package lists, which may be old or missing: apt-get update, and once more"
    apt update > "$scratch/update" 2>&1 || cat "$scratch/update" >&2
    quietly apt install -y --no-install-recommends "$@"
}

# What is missing, one "PACKAGES<tab>WHAT" a line.

missing_venv() {
    "$python" -c 'import ensurepip, venv' 2> /dev/null || printf 'python3-venv\tPython cannot make a virtual environment\n'
}

preprocesses() { printf '#include <%s>\n' "$1" | gcc -I"$include" -E - > /dev/null 2>&1; }

missing_for_native() {
    if [ -z "$(type -P gcc)" ]; then
        printf 'gcc libc6-dev python3-dev liburing-dev\tthere is no C compiler\n'
        return
    fi
    include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    preprocesses stdlib.h || printf 'libc6-dev\tthe C library has no headers\n'
    [ -e "$include/Python.h" ] || printf 'python3-dev\tPython has no headers\n'
    # gcc answers with a path when it finds the library, otherwise with the bare name.
    [[ -e $(gcc -print-file-name=liburing.a) ]] && preprocesses liburing.h || printf 'liburing-dev\tthere is no liburing\n'
}

missing_for_tests() {
    local mend command package
    mend=$("$python" tests/kernel/vm.py check) ||
        sed -n 's/^mend: .*--no-install-recommends \(.*\)/\1\tthe virtual machine lacks a part/p' <<< "$mend"
    while read -r command package; do
        [ -n "$(type -P "$command")" ] || printf '%s\t%s is not installed\n' "$package" "$command"
    done <<-TOOLS
	fio fio
	mkfs.ext4 e2fsprogs
	blkdiscard util-linux
	sfdisk fdisk
	udevadm udev
	TOOLS
}

missing_browser() { [ -n "$(type -P chromium)" ] || printf 'chromium\tchromium is not installed\n'; }

missing_ceph() {
    local program
    for program in ceph-mon ceph-osd; do
        [ -n "$(type -P $program)" ] || printf '%s\t%s is not installed\n' $program $program
    done
    # Has the programs ceph and rbd.
    [ -n "$(type -P rbd)" ] || printf 'ceph-common\tceph-common is not installed\n'
}

packages_of() { cut -f1 <<< "$1" | tr ' ' '\n' | sort -u | tr '\n' ' '; }

# need WHOM COMMAND...: installs what COMMAND finds missing. Fails, after a line for each, when something stays missing.
need() {
    local whom=$1 packages missing
    shift
    missing=$("$@")
    [ -n "$missing" ] || return 0
    if may_install; then
        packages=$(packages_of "$missing")
        # shellcheck disable=SC2086 # a list of words
        install_packages ${packages% }
        missing=$("$@")
        [ -n "$missing" ] || return 0
    fi
    while IFS=$'\t' read -r packages what; do
        say "$what ($whom): as root, run: $APT_INSTALL $packages"
    done <<< "$missing"
    return 1
}

# ---------------------------------------------------------------- .venv

check_python() {
    local mend="name another: make PYTHON=/path/to/python3"
    "$python" -c '' 2> /dev/null || fail "there is no $python that runs: install Python 3.11 or newer, or $mend"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" -V 2>&1), and ublk_trio needs 3.11 or newer: $mend"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# A .venv holds absolute paths: one that came along when the checkout was copied would run the original's code.
is_usable_venv() {
    .venv/bin/python -c '' 2> /dev/null || return 1
    compgen -G '.venv/lib/python*/site-packages/pip' > /dev/null || return 1  # it was interrupted while it was made
    [ ! -e "$stamp" ] || grep -qxF "$here" "$stamp"
}

make_venv() {
    need 'nothing can be run without' missing_venv || {
        [ "$(type -P "$python")" = /usr/bin/python3 ] ||
            say "$python is $(type -P "$python"), and that package serves /usr/bin/python3: try make PYTHON=/usr/bin/python3"
        exit 1
    }
    say "making .venv with $("$python" -V)"
    quietly "$python" -m venv --clear .venv || fail "$python -m venv failed; its words are above"
}

# What the installed state depends on; where it is installed is a line of its own.
fingerprint() {
    echo "$here"
    cat pyproject.toml setup.py MANIFEST.in native/*.py native/*.[ch] | sha256sum
    echo "missing for the native part: $(packages_of "$1")"
}

has_native() {
    local suffix
    suffix=$(.venv/bin/python -c 'import importlib.machinery as m; print(m.EXTENSION_SUFFIXES[0])')
    [ -e "ublk_trio/real/_native$suffix" ]
}

install_ublk_trio() {
    say "installing ublk_trio and what it depends on into .venv"
    rm -f "$stamp"
    quietly .venv/bin/python -m pip install --disable-pip-version-check -e '.[test]' ||
        fail "pip could not install it; its words are above"
    fingerprint "$1" > "$stamp"
}

# ---------------------------------------------------------------- all of it

[ -w . ] || fail "$here cannot be written by $(id -un): make needs to put .venv there; use a checkout of your own"
# Two at once would install into the same .venv. The lock is on a file that is there anyway.
exec 9< Makefile
flock 9

if [ -n "${PYTHON:-}" ] && [ "$PYTHON" != python3 ] && is_usable_venv; then
    check_python
    [ "$(version_of "$python")" = "$(version_of .venv/bin/python)" ] ||
        fail "PYTHON is $("$python" -V), but .venv has $(.venv/bin/python -V): remove .venv to have it made anew"
fi
if is_usable_venv; then
    python=.venv/bin/python
else
    check_python
    make_venv
fi

requires_native() { [ "${UBLK_TRIO_REQUIRE_NATIVE:-}" = 1 ]; }

missing=$(missing_for_native .venv/bin/python)
if [ "$(fingerprint "$missing")" != "$(cat "$stamp" 2> /dev/null)" ] || { [ -n "$missing" ] && may_install; } ||
    { requires_native && ! has_native; }; then
    need 'only the real ring needs it' missing_for_native .venv/bin/python || ! requires_native ||
        fail "UBLK_TRIO_REQUIRE_NATIVE is 1, and the native part cannot be built"
    missing=$(missing_for_native .venv/bin/python)
    install_ublk_trio "$missing"
    if [ -n "$missing" ]; then
        say "installed without the native part: the simulator runs, the real ring does not"
    elif ! has_native; then
        say "the native part did not compile: UBLK_TRIO_REQUIRE_NATIVE=1 tools/setup.sh shows why; the simulator runs"
    fi
fi

if [ "${1:-}" = tests ]; then
    # Not final: tools/test.sh says what it cannot run.
    need 'only the kernel tests need it' missing_for_tests || true
    need 'only a test of the timeline needs it' missing_browser || true
    need 'only the tests of Ceph images need it' missing_ceph || true
fi
