# shellcheck shell=bash
# How the scripts here speak: sourced, never run.

if [[ -t 2 && ${TERM:-dumb} != dumb ]]; then
    _bold=$'\033[1m' _red=$'\033[31m' _yellow=$'\033[33m' _plain=$'\033[0m'
else
    _bold='' _red='' _yellow='' _plain=''
fi

# say TEXT: one step, on standard error so that standard output stays for results.
say() { printf '%s==>%s %s\n' "$_bold" "$_plain" "$1" >&2; }

# warn TEXT: something a person should know, that stops nothing.
warn() { printf '%sWarning:%s %s\n' "$_yellow" "$_plain" "$1" >&2; }

# fail TEXT [ADVICE...]: what happened, what to do, and exit 1.
fail() {
    printf '%sError:%s %s\n' "$_red" "$_plain" "$1" >&2
    shift
    (($# == 0)) || printf '  %s\n' "$@" >&2
    exit 1
}

# usage_error TEXT: a wrong option; exits 2.
usage_error() {
    printf '%sError:%s %s\n  See: %s --help\n' "$_red" "$_plain" "$1" "$0" >&2
    exit 2
}

# print_help: the comment at the head of the running script is its help.
print_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# elapsed SECONDS: as minutes and seconds, 1:45.
elapsed() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
