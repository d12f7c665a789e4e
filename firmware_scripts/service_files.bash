# shellcheck shell=bash disable=SC2034 # the places are for the scripts that source this
# Where `install` puts things and `uninstall` finds them: sourced, never run.

readonly final_opt=/opt/appliance final_releases=/opt/appliance/releases final_data=/var/lib/appliance
readonly sysusers_name=appliance.conf

# name_places ROOT: every place, under ROOT or, if that is empty, on this machine.
name_places() {
    case $1 in
        '') root='' ;;
        *) root=$(realpath --canonicalize-missing -- "$1") ;;
    esac
    [[ $root != / ]] || root=''
    opt=$root$final_opt
    releases=$root$final_releases
    etc=$root/etc/appliance
    settings=$etc/appliance.toml
    data=$root$final_data
    database_copy=$data/before-upgrade
    units=$root/etc/systemd/system
    sysusers_file=$root/etc/sysusers.d/$sysusers_name
}

# Whether systemd manages the machine that is installed on; never for an image.
manager_runs() { [[ -z $root && -d /run/systemd/system ]]; }

has_gpu() { compgen -G '/dev/nvidia*' >/dev/null || compgen -G '/dev/nvhost*' >/dev/null || [[ -e /dev/nvmap ]]; }

systemd_version() { systemctl --version 2>/dev/null | awk 'NR == 1 {print int($2)}'; }

# install_service_files FOLDER: the unit, and the additions that fit this machine.
install_service_files() {
    local additions=$units/appliance.service.d version
    install -D -m 644 "$1/appliance.service" "$units/appliance.service"
    install -d -m 755 "$additions"
    rm -f "$additions/gpu.conf" "$additions/backoff.conf"
    if has_gpu; then
        install -m 644 "$1/appliance-gpu.conf" "$additions/gpu.conf"
    fi
    version=$(systemd_version)
    if ((${version:-0} >= 254)); then
        install -m 644 "$1/appliance-backoff.conf" "$additions/backoff.conf"
    fi
}

# Works on an image and without a running systemd, too.
enable_service() {
    local wants=$units/multi-user.target.wants
    if manager_runs; then
        systemctl --quiet enable appliance.service
    else
        install -d -m 755 "$wants"
        ln -sfn /etc/systemd/system/appliance.service "$wants/appliance.service"
    fi
}

remove_service() {
    if manager_runs && [[ -e $units/appliance.service ]]; then
        systemctl --quiet disable --now appliance.service
    fi
    rm -f "$units/appliance.service" "$units/multi-user.target.wants/appliance.service" "$sysusers_file"
    rm -f "$units/appliance.service.d/gpu.conf" "$units/appliance.service.d/backoff.conf"
    rmdir --ignore-fail-on-non-empty "$units/appliance.service.d" 2>/dev/null || true
    if manager_runs; then
        systemctl daemon-reload
    fi
}
