# shellcheck shell=bash
# What compiling llama.cpp takes, sourced after messages.bash by the scripts that compile.

# Measured for one compile job; llama.cpp's largest sources need this much.
readonly kilobytes_a_job=1500000

need_compiler() {
    if ! command -v cc >/dev/null || ! command -v c++ >/dev/null; then
        fail "There is no C and C++ compiler." "On Debian or Ubuntu: apt-get install -y build-essential"
    fi
}

# compile_jobs: print how many jobs at a time the cores and the memory bear.
compile_jobs() {
    local jobs memory_jobs
    jobs=$(nproc)
    memory_jobs=$(awk -v job="$kilobytes_a_job" '/^MemAvailable/ {print int($2 / job)}' /proc/meminfo)
    ((memory_jobs >= jobs)) || jobs=$((memory_jobs > 0 ? memory_jobs : 1))
    echo "$jobs"
}

# wait_for_lock DESCRIPTOR: one process at a time compiles.
wait_for_lock() {
    if ! flock --nonblock "$1"; then
        say "Another compilation is under way; waiting for it."
        flock "$1"
    fi
}

# Reads a build's output, keeps it in the file $1, and shows how far it is.
show_progress() {
    local log=$1 started=$SECONDS shown=-1 line percent
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        if [[ $line =~ ^\ *\[\ *([0-9]+)/([0-9]+)\] ]]; then # ninja
            percent=$((100 * BASH_REMATCH[1] / BASH_REMATCH[2]))
        elif [[ $line =~ ^\ *\[\ *([0-9]+)%\] ]]; then # make
            percent=${BASH_REMATCH[1]}
        else
            continue
        fi
        if [[ -t 2 ]]; then
            printf '\r\033[K    [%3d %%] compiling … %s' "$percent" "$(elapsed $((SECONDS - started)))" >&2
        elif ((percent / 10 > shown / 10 || shown < 0)); then
            printf '    [%3d %%] compiling … %s\n' "$percent" "$(elapsed $((SECONDS - started)))" >&2
            shown=$percent
        fi
    done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
}
