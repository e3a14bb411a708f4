#!/usr/bin/env bash
# Runs all the tests, one run after the other, and sums up; the Makefile calls it, after tools/setup.sh.
#
# 1. On this machine, as an ordinary user: everything but tests/kernel. Root becomes one for it (uid 65534, no capabilities),
#    because the promise is that the simulator needs no rights.
# 2. For each of the kernels below, as root in a virtual machine: tests/kernel and tests/both, and whatever the first run had
#    to skip: what an ordinary user cannot do on this machine, root can there. What is marked `any_kernel` is run on the newest
#    alone.
# 3. On this machine's own kernel too, if this user can open its ublk control device.
#
# A run that fails does not keep the others from running. With CI set, it is a failure as well when a kernel could not be
# booted, or a test was skipped in every run; otherwise both are only said.
#
# Environment: CI; VM_OPTIONS, more options for tests/kernel/vm.py; UBLK_TRIO_KERNEL_HEADERS, C headers to use instead of
# Debian's of the newest kernel.
set -u
cd "$(dirname "$0")/.." || exit 1
KERNELS=(6.12 7.3)
NEWEST=7.3
KERNEL_SECONDS_MAX=2500
ORDINARY_ID=65534
here=$(pwd -P)
python=$here/.venv/bin/python
pytest=("$python" -m pytest -rs --list-skipped)
[ -t 1 ] && pytest+=(--color=yes)
scratch=$(mktemp -d "${TMPDIR:-/tmp}/ublk_trio.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM HUP
PATH=$PATH:/usr/sbin:/sbin

# ---------------------------------------------------------------- one run

names=() results=()

# run NAME COMMAND...: shows the output, keeps it in $scratch/NAME, and notes how it ended.
run() {
    local name=$1 status began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee "$scratch/$name"
    status=${PIPESTATUS[0]}
    sed -n 's/^skipped\t\([^\t]*\)\t.*/\1/p' "$scratch/$name" | sort -u > "$scratch/$name.skipped"
    names+=("$name")
    if [ "$status" = 0 ]; then
        results+=("passed")
    else
        results+=("FAILED ($status)")
    fi
    # What pytest says last, without the frame and the colours; there is none when it never came to that.
    sed 's/\x1b\[[0-9;]*m//g' "$scratch/$name" | sed -nE 's/^=+ (.* in [0-9.]+s.*) =+$/\1/p' | tail -n 1 > "$scratch/$name.words"
    [ -s "$scratch/$name.words" ] || echo "pytest did not come to an end" > "$scratch/$name.words"
    echo "$((SECONDS - began)) s" > "$scratch/$name.time"
}

# not_run NAME WHY
not_run() {
    names+=("$1")
    results+=("NOT RUN")
    echo "$2" > "$scratch/$1.words"
    echo "-" > "$scratch/$1.time"
}

# ---------------------------------------------------------------- as an ordinary user

# Sets as_ordinary to what has to stand before a command, and ordinary to what to call the run.
find_ordinary() {
    local ids=(--reuid="$ORDINARY_ID" --regid="$ORDINARY_ID" --clear-groups --no-new-privs)
    ordinary="simulator"
    as_ordinary=()
    [ "$(id -u)" = 0 ] || return
    mkdir "$scratch/home"
    chown "$ORDINARY_ID:$ORDINARY_ID" "$scratch/home"
    chmod a+x "$scratch"
    local environment=(env -u XDG_CACHE_HOME -u XDG_RUNTIME_DIR USER=nobody LOGNAME=nobody
        HOME="$scratch/home" TMPDIR="$scratch/home" PYTHONDONTWRITEBYTECODE=1
        HYPOTHESIS_STORAGE_DIRECTORY="$scratch/home/hypothesis")
    ordinary="simulator, as uid $ORDINARY_ID"
    as_ordinary=(setpriv "${ids[@]}" --inh-caps=-all --bounding-set=-all "${environment[@]}")
    can_read_checkout && return
    # A checkout under /root or in a mktemp -d: may this user at least read everything? Write, still, nothing.
    local read=dac_read_search
    as_ordinary=(setpriv "${ids[@]}" "--inh-caps=-all,+$read" "--ambient-caps=+$read" "--bounding-set=-all,+$read"
        "${environment[@]}")
    can_read_checkout && return
    echo "== this root cannot become an ordinary user who can read $here: the first run is as root"
    ordinary="simulator, as root"
    as_ordinary=()
}

can_read_checkout() { "${as_ordinary[@]}" "$python" -c 'import pytest, ublk_trio' 2> /dev/null; }

# The newest kernel's C headers, for tests/test_uapi.py; without them it skips what it has to say about them.
give_headers() {
    local directory
    [ -z "${UBLK_TRIO_KERNEL_HEADERS:-}" ] || return
    directory=$("$python" -m tools.kernel_headers) || return
    # Out of root's cache, which the ordinary user may not be able to enter.
    cp -a "${directory%/usr/include}" "$scratch/headers"
    export UBLK_TRIO_KERNEL_HEADERS=$scratch/headers/usr/include
}

# ---------------------------------------------------------------- on real kernels

elsewhere=()

# What the first run had to skip.
read_elsewhere() {
    mapfile -t elsewhere < "$scratch/$ordinary.skipped"
}

in_machine() {
    local which=()
    [ "$1" = "$NEWEST" ] || which=(-m "not any_kernel")
    # What the first run skipped for want of root wants loop devices as well.
    # shellcheck disable=SC2086 # options are words
    # Four CPUs, however many there are here: the kernel gives a disk no more queues than it has CPUs.
    "$python" tests/kernel/vm.py run --kernel "$1" --cpus 4 --fail-on-kernel-warning --timeout "$KERNEL_SECONDS_MAX" \
        ${CI:+--env CI="$CI"} ${VM_OPTIONS:-} -- \
        sh -c 'modprobe loop; exec "$@"' sh "${pytest[@]}" "${which[@]}" tests/kernel tests/both "${elsewhere[@]}"
}

on_kernels() {
    local kernel why
    why=$("$python" tests/kernel/vm.py check | tail -n 1)
    for kernel in "${KERNELS[@]}"; do
        if [ -n "$why" ]; then
            not_run "kernel $kernel" "there is no virtual machine to boot it in; as root: ${why#mend: }"
        else
            run "kernel $kernel" in_machine "$kernel"
            ran_on+=("kernel $kernel")
        fi
    done
    if [ -r /dev/ublk-control ] && [ -w /dev/ublk-control ]; then
        run "kernel $(uname -r), this machine's" "${pytest[@]}" tests/kernel tests/both "${elsewhere[@]}"
        ran_on+=("kernel $(uname -r), this machine's")
    fi
}

# Tests that every run skipped that met them: those of the first run have been tried again in each of the others. Where
# there were no others, the summary says that anyway.
skipped_everywhere() {
    local name
    [ "${#ran_on[@]}" != 0 ] || return
    cp "$scratch/${ran_on[0]}.skipped" "$scratch/everywhere"
    for name in "${ran_on[@]}"; do
        comm -12 "$scratch/everywhere" "$scratch/$name.skipped" > "$scratch/both"
        mv "$scratch/both" "$scratch/everywhere"
    done
    cat "$scratch/everywhere"
}

# ---------------------------------------------------------------- all of it

ran_on=()
find_ordinary
give_headers
run "$ordinary" "${as_ordinary[@]}" "${pytest[@]}" ${as_ordinary:+-o cache_dir="$scratch/home/pytest"} tests --ignore=tests/kernel
read_elsewhere
on_kernels

printf '\n== summary\n'
failed=0 unrun=0
for index in "${!names[@]}"; do
    name=${names[index]}
    printf '%-12s %-26s %6s  %s\n' "${results[index]}" "$name" "$(cat "$scratch/$name.time")" "$(cat "$scratch/$name.words")"
    case ${results[index]} in
        FAILED*) failed=$((failed + 1)) ;;
        "NOT RUN") unrun=$((unrun + 1)) ;;
    esac
done
mapfile -t skipped < <(skipped_everywhere)
for test in "${skipped[@]}"; do
    printf '%-12s %s\n' "SKIPPED" "$test, in every run"
done

if [ "$failed" != 0 ]; then
    echo "make test: FAILED: $failed of ${#names[@]} runs"
    exit 1
elif [ -n "${CI:-}" ] && [ "$((unrun + ${#skipped[@]}))" != 0 ]; then
    echo "make test: FAILED: with CI set everything must run: $unrun of ${#names[@]} runs and ${#skipped[@]} tests did not"
    exit 1
elif [ "$unrun" != 0 ]; then
    echo "make test: passed, but the kernel tests were NOT run"
else
    echo "make test: all ${#names[@]} runs passed"
fi
