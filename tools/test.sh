#!/usr/bin/env bash
# Runs all the tests and sums up; the Makefile calls it, after tools/setup.sh.
#
# 1. On this machine, as an ordinary user: everything but tests/kernel. Root becomes one for it (uid 65534, no capabilities),
#    because the promise is that the simulator needs no rights.
# 2. For each of the kernels below, as root in a virtual machine: tests/kernel and tests/both, and whatever the first run had
#    to skip: what an ordinary user cannot do on this machine, root can there. What is marked `any_kernel` is run on the newest
#    alone.
# 3. On this machine's own kernel too, if this user can open its ublk control device.
#
# A run keeps little more than one processor busy, so there are two lanes of runs, beside each other: the first run and then
# the older kernel, and the newest kernel, in two runs, of which the second has what the first run skipped. Outputs do not
# mix: each run's is shown whole, in the order of the summary, and that of the first which has not ended as it comes. This
# machine's own kernel has its turn when the lanes are done: its tests look for what they left on the machine.
#
# A run that fails does not keep the others from running. With CI set, it is a failure as well when a kernel could not be
# booted, or a test was skipped in every run; otherwise both are only said.
#
# Environment: CI; VM_OPTIONS, more options for tests/kernel/vm.py; UBLK_TRIO_KERNEL_HEADERS, C headers to use instead of
# Debian's of the newest kernel.
set -u
cd "$(dirname "$0")/.." || exit 1
OLDEST=6.12
NEWEST=7.3
# The newest has two such runs in its lane; CI gives all of it 90 minutes.
KERNEL_SECONDS_MAX=2400
ORDINARY_ID=65534
here=$(pwd -P)
python=$here/.venv/bin/python
pytest=("$python" -m pytest -rs --list-skipped)
[ -t 1 ] && pytest+=(--color=yes)
scratch=$(mktemp -d "${TMPDIR:-/tmp}/ublk_trio.XXXXXX") || exit 1
lanes=()
trap 'rm -rf "$scratch"' EXIT
trap 'stop_lanes; exit 130' INT TERM HUP
PATH=$PATH:/usr/sbin:/sbin

# ---------------------------------------------------------------- one run

# Of the runs, in the order of the summary.
names=()

# run NAME COMMAND...: keeps the output in $scratch/NAME, and how it ended in files beside it, NAME.status last.
run() {
    local name=$1 status began=$SECONDS
    shift
    "$@" > "$scratch/$name" 2>&1 < /dev/null
    status=$?
    sed -n 's/^skipped\t\([^\t]*\)\t.*/\1/p' "$scratch/$name" | sort -u > "$scratch/$name.skipped"
    # What pytest says last, without the frame and the colours; there is none when it never came to that.
    sed 's/\x1b\[[0-9;]*m//g' "$scratch/$name" | sed -nE 's/^=+ (.* in [0-9.]+s.*) =+$/\1/p' | tail -n 1 > "$scratch/$name.words"
    [ -s "$scratch/$name.words" ] || echo "pytest did not come to an end" > "$scratch/$name.words"
    echo "$((SECONDS - began)) s" > "$scratch/$name.time"
    if [ "$status" = 0 ]; then
        finish "$name" "passed"
    else
        finish "$name" "FAILED ($status)"
    fi
}

# not_run NAME WHY
not_run() {
    : > "$scratch/$1.skipped"
    echo "$2" > "$scratch/$1.words"
    echo "-" > "$scratch/$1.time"
    finish "$1" "NOT RUN"
}

# finish NAME RESULT: who sees NAME.status sees all of it.
finish() {
    echo "$2" > "$scratch/$1.new"
    mv "$scratch/$1.new" "$scratch/$1.status"
}

has_ended() { [ -e "$scratch/$1.status" ]; }

wait_for() { until has_ended "$1"; do sleep 0.2; done; }

# show NAME: what the run has said, and what it says until it ends.
show() {
    local ended=
    until [ -e "$scratch/$1" ]; do
        ! has_ended "$1" || return
        sleep 0.2
    done
    printf '\n== %s\n' "$1"
    while [ -z "$ended" ]; do
        # Looked at before the rest is read: nothing comes after it.
        has_ended "$1" && ended=yes || sleep 0.2
        cat <&3
    done 3< "$scratch/$1"
}

# A lane and all that it started is one process group: job control is on where it starts.
stop_lanes() {
    local lane tries
    for lane in "${lanes[@]}"; do
        kill -TERM -- "-$lane" 2> /dev/null
    done
    for lane in "${lanes[@]}"; do
        for ((tries = 0; tries < 100; tries++)); do
            kill -0 -- "-$lane" 2> /dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$lane" 2> /dev/null
    done
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

# Sets elsewhere to what the first run had to skip.
read_elsewhere() {
    mapfile -t elsewhere < "$scratch/$ordinary.skipped"
}

# in_machine KERNEL TEST...
in_machine() {
    local kernel=$1 which=()
    shift
    [ "$kernel" = "$NEWEST" ] || which=(-m "not any_kernel")
    # What the first run skipped for want of root wants loop devices as well.
    # shellcheck disable=SC2086 # options are words
    # Four CPUs, however many there are here: the kernel gives a disk no more queues than it has CPUs.
    "$python" tests/kernel/vm.py run --kernel "$kernel" --cpus 4 --fail-on-kernel-warning --timeout "$KERNEL_SECONDS_MAX" \
        ${CI:+--env CI="$CI"} ${VM_OPTIONS:-} -- \
        sh -c 'modprobe loop; exec "$@"' sh "${pytest[@]}" "${which[@]}" "$@"
}

# run_in_machine NAME KERNEL TEST...
run_in_machine() {
    if [ -n "$no_machine" ]; then
        not_run "$1" "there is no virtual machine to boot it in; as root: ${no_machine#mend: }"
    else
        run "$1" in_machine "${@:2}"
    fi
}

# The lanes. What they say themselves is of no run.
older_lane() {
    local elsewhere
    run "$ordinary" "${as_ordinary[@]}" "${pytest[@]}" ${as_ordinary:+-o cache_dir="$scratch/home/pytest"} tests --ignore=tests/kernel
    read_elsewhere
    run_in_machine "$oldest" "$OLDEST" tests/kernel tests/both "${elsewhere[@]}"
}

newest_lane() {
    local elsewhere
    run_in_machine "$newest_programs" "$NEWEST" tests/kernel
    wait_for "$ordinary"
    read_elsewhere
    run_in_machine "$newest_rest" "$NEWEST" tests/both "${elsewhere[@]}"
}

here_too() {
    local elsewhere
    [ -r /dev/ublk-control ] && [ -w /dev/ublk-control ] || return
    read_elsewhere
    run "$own" "${pytest[@]}" tests/kernel tests/both "${elsewhere[@]}"
    names+=("$own")
    show "$own"
}

# Tests that every kernel skipped, as far as it was given them: each had what the first run skipped. Where there were no
# kernels, the summary says that anyway.
skipped_everywhere() {
    local files file
    files=()
    has_run "$oldest" && files+=("$scratch/$oldest.skipped")
    if has_run "$newest_programs" && has_run "$newest_rest"; then
        sort -u "$scratch/$newest_programs.skipped" "$scratch/$newest_rest.skipped" > "$scratch/newest.skipped"
        files+=("$scratch/newest.skipped")
    fi
    has_run "$own" && files+=("$scratch/$own.skipped")
    [ "${#files[@]}" != 0 ] || return
    cp "${files[0]}" "$scratch/everywhere"
    for file in "${files[@]}"; do
        comm -12 "$scratch/everywhere" "$file" > "$scratch/both"
        mv "$scratch/both" "$scratch/everywhere"
    done
    cat "$scratch/everywhere"
}

has_run() { has_ended "$1" && [ "$(cat "$scratch/$1.status")" != "NOT RUN" ]; }

# ---------------------------------------------------------------- all of it

find_ordinary
give_headers
no_machine=$("$python" tests/kernel/vm.py check | tail -n 1)
oldest="kernel $OLDEST"
newest_programs="kernel $NEWEST, programs"
newest_rest="kernel $NEWEST, the rest"
own="kernel $(uname -r), this machine's"
names=("$ordinary" "$oldest" "$newest_programs" "$newest_rest")

set -m
older_lane < /dev/null &
lanes+=($!)
# Where there is one processor, one after the other.
[ "$(nproc)" != 1 ] || wait
newest_lane < /dev/null &
lanes+=($!)
set +m
for name in "${names[@]}"; do
    show "$name"
done
wait
here_too

printf '\n== summary\n'
failed=0 unrun=0
for name in "${names[@]}"; do
    result=$(cat "$scratch/$name.status")
    printf '%-12s %-26s %6s  %s\n' "$result" "$name" "$(cat "$scratch/$name.time")" "$(cat "$scratch/$name.words")"
    case $result in
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
