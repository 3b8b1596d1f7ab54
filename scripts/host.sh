#!/usr/bin/env bash
# From a fresh clone on a rented GPU host to a `dvc repro` that outlives the SSH session: docs/rented-host.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
STATE=.work/host             # of the run: log, started, ended
LOG=$STATE/log
SESSION=looper-$(basename "$ROOT" | tr -c 'A-Za-z0-9\n' -)-$(printf '%s' "$ROOT" | cksum | cut -d ' ' -f 1)

usage() {
    cat <<'END'
usage: scripts/host.sh COMMAND

  check [--vllm]              look at Python, driver, disk and memory; changes nothing
  setup [--vllm] [--anyway]   check, make .venv, see that torch finds the GPU, `python -m stages check`
  start [--push REMOTE [--poweroff]] [-- ARGUMENTS OF dvc repro]
                              `dvc repro` in tmux, to go on without you; also after a reboot
  up    [OPTIONS OF setup AND start]
                              setup, then start
  status                      does it run, what does it do, how did it end
  attach                      watch it (Ctrl-b, then d, to leave it running)
  stop  [--poweroff]          end it in order; start goes on where it was
  push  REMOTE                check the remote, `dvc push`, read back what was pushed; and what git still lacks

--vllm      with requirements-gpu.txt, the fast engine
--anyway    install although a check failed
--poweroff  halt the machine: nothing else ever does
PYTHON=...  the Python to take, where the one found is not wanted
END
}

die() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# ---- What is looked at ---------------------------------------------------------------------------------

problems=0
ok() { printf 'ok    %s\n' "$1"; }
note() { printf 'note  %s\n' "$1"; }
no() {
    problems=$((problems + 1))
    printf 'NO    %s\n' "$1"
}
more() { printf '      %s\n' "$1"; }

version_at_least() { # WANTED FOUND
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# What the profile says, without any package: the profile's name, and a key of its `model` section.
profile() { sed -n 's/^profile:[[:space:]]*\([A-Za-z0-9._-]*\).*/\1/p' params.yaml; }
model() { sed -n '/^model:/,/^[a-z]/s/^  '"$1"':[[:space:]]*\([^[:space:]#]*\).*/\1/p' "profiles/$(profile).yaml"; }
needs_gpu() { [ "$(model source)" != build ]; }

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

python=                      # set by check_python
check_python() {
    local name version old=
    if [ -x .venv/bin/python ]; then
        python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
        ok "Python $(python_version .venv/bin/python), in .venv"
        return
    fi
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        version=$(python_version "$name") || continue
        if ! version_at_least 3.11 "$version"; then
            old=$version
        elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            no "Python $version cannot make environments: sudo apt-get install -y python$version-venv"
            return
        else
            python=$name
            ok "Python $version ($name)"
            return
        fi
    done
    no "Python 3.11 or newer is needed, ${old:-none} is here. On Ubuntu 22.04, one of"
    more "sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt-get install -y python3.12 python3.12-venv"
    more "pip install --user uv && ~/.local/bin/uv python install 3.12    (without root; then say"
    more "PYTHON=\$(~/.local/bin/uv python find 3.12) scripts/host.sh ...)"
}

check_tools() {
    local name missing=()
    for name in git make tmux; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        no "missing: ${missing[*]}. sudo apt-get install -y ${missing[*]}"
    else
        ok "git, make, tmux"
    fi
}

# The CUDA a torch from PyPI is built for (its metadata names cuda-toolkit), the oldest NVIDIA driver that runs it
# (NVIDIA's table of minor version compatibility: one driver branch for each major CUDA), and the oldest GPUs it knows.
cuda_of_torch() {
    case $1 in
        2.13.*) echo 13.0 580 7.5 ;;
        *) return 1 ;;
    esac
}

gpus=0
check_gpu() {
    local torch cuda driver capability found name have_driver memory have_capability
    torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt)
    if ! read -r cuda driver capability < <(cuda_of_torch "$torch"); then
        no "scripts/host.sh does not know which CUDA torch $torch is built for; add it to cuda_of_torch"
        return
    fi
    if ! found=$(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap \
        --format=csv,noheader,nounits 2>&1) || [ -z "$found" ]; then
        if ! needs_gpu; then
            ok "no NVIDIA GPU; the profile $(profile) needs none"
        elif [[ $found == *"version mismatch"* ]]; then
            no "the NVIDIA driver was updated under the running kernel: sudo reboot"
        else
            no "no NVIDIA driver: nvidia-smi does not work. Take an image with driver $driver or newer"
        fi
        return
    fi
    gpus=$(wc -l <<<"$found")
    IFS=, read -r name have_driver memory have_capability <<<"${found//, /,}"
    if ! version_at_least "$driver" "$have_driver"; then
        ${1:-no} "NVIDIA driver $have_driver is too old for CUDA $cuda, which torch $torch is built for: $driver or newer"
        more "is needed. Take a newer image, or: sudo apt-get install -y nvidia-driver-$driver-server && sudo reboot"
    elif [[ $have_capability =~ ^[0-9.]+$ ]] && ! version_at_least "$capability" "$have_capability"; then
        ${1:-no} "$name has compute capability $have_capability; CUDA $cuda needs $capability (Turing) or newer"
    else
        ok "$gpus x $name, $((memory / 1024)) GiB; driver $have_driver runs CUDA $cuda (torch $torch)"
        if [[ $have_capability =~ ^[0-9.]+$ ]] && ! version_at_least 8.0 "$have_capability"; then
            note "$name computes in bfloat16 only slowly (compute capability below 8.0)"
        fi
    fi
}

# Sizes in MB (10^6 bytes): what the hub sends, and the weights in 16 bits.
sizes_of_profile() {
    case $1 in
        abel-7b) echo 28970 14490 ;;
        r1-distill-8b) echo 16070 16070 ;;
        *) return 1 ;;
    esac
}

size_there() { # PATH -> MB
    if [ -e "$1" ]; then
        du -sk "$1" 2>/dev/null | awk '{print int($1 * 1.024e-3)}'
    else
        echo 0
    fi
}

nearest() { # the deepest folder of a path that exists
    local path=$1
    while [ ! -d "$path" ]; do path=$(dirname "$path"); done
    printf '%s\n' "$path"
}

dvc_cache() { # KEY (dir, type) of DVC's [cache] section; .dvc/config.local goes first
    awk -v key="$1" '/^\[/ {inside = $0 ~ /^\[cache\]/} inside && $1 == key {gsub(/"/, "", $3); print $3; exit}' \
        .dvc/config.local .dvc/config 2>/dev/null || true
}

mount_of() { df -Pk "$(nearest "$1")" | awk 'NR == 2 {print $6}'; }
free_of() { df -Pk "$(nearest "$1")" | awk 'NR == 2 {print int($4 * 1.024e-3)}'; }
gb() { awk -v mb="$1" 'BEGIN {printf mb < 9950 ? "%.1f GB" : "%.0f GB", mb / 1000}'; }

# Does a file of the working tree and its copy in DVC's cache take room once?
cache_shares() { # CACHE
    local kinds trial shared
    kinds=$(dvc_cache type)
    case ${kinds:-reflink} in
        symlink*) return 0 ;;
        hardlink*) [ "$(mount_of "$1")" = "$(mount_of .)" ] ;;
        reflink*)
            [ "$(mount_of "$1")" = "$(mount_of .)" ] || return 1
            shared=1
            trial=$(mktemp -d ./.reflink.XXXXXX.tmp)
            printf x >"$trial/one"
            cp --reflink=always "$trial/one" "$trial/two" 2>/dev/null && shared=0
            rm -r "$trial"
            return $shared
            ;;
        *) return 1 ;;
    esac
}

base_mb=0
check_disk() { # VLLM (0 or 1)
    local download=0 environment=$((9000 + 6000 * $1)) rest=8000 hub cache copy=0 sizes name
    name=$(profile)
    hub=${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}
    cache=$(dvc_cache dir)
    cache=${cache:-.dvc/cache}
    case $(model source) in
        build) rest=500 ;;
        directory) base_mb=$(size_there "$(model path)") ;;
        *)
            if sizes=$(sizes_of_profile "$name"); then
                read -r download base_mb <<<"$sizes"
            else
                note "scripts/host.sh does not know how large the model of profile $name is; see for yourself"
                return
            fi
            ;;
    esac
    cache_shares "$cache" || copy=$base_mb

    # What is there already needs no room any more, so that a second look at a host in use says the same.
    local lines=() need free mount place there
    declare -A total=() room=()
    add() { # MB PLACE THERE WHAT
        need=$(($1 > $3 ? $1 - $3 : 0))
        mount=$(mount_of "$2")
        total[$mount]=$((${total[$mount]:-0} + need))
        room[$mount]=$(free_of "$2")
        if [ "$1" -gt 0 ]; then
            lines+=("$(printf '%7s  %s%s' "$(gb "$1")" "$4" "$([ "$3" -gt 0 ] && echo " (there: $(gb "$3"))")")")
        fi
    }
    add "$environment" .venv "$(size_there .venv)" "the environment, .venv, and what pip keeps"
    there=$(size_there "$hub/models--$(model id | sed 's|/|--|g')")
    add "$download" "$hub" "$there" "the download, in $hub"
    add "$base_mb" checkpoints "$(size_there checkpoints/base)" "the base model in 16 bits, checkpoints/base"
    add "$copy" "$cache" "$(size_there "$cache")" "its copy in DVC's cache, $cache"
    add "$rest" . "$(($(size_there data) + $(size_there .work)))" "adapters, training's checkpoints, completions"
    for mount in "${!total[@]}"; do
        need=${total[$mount]}
        free=${room[$mount]}
        if [ "$free" -lt "$need" ]; then
            no "disk $mount: $(gb "$free") free, $(gb "$need") needed"
        else
            ok "disk $mount: $(gb "$free") free, $(gb "$need") needed"
        fi
    done
    for place in "${lines[@]}"; do more "$place"; done
    if [ "$copy" -gt 0 ]; then
        more "(\`dvc config --local cache.type hardlink,copy\` saves the copy: docs/rented-host.md)"
    fi
}

check_memory() {
    local total need
    total=$(free -m | awk '/^Mem:/ {print int($2 * 1.048576)}')
    # Every process reads the weights into memory on their way to its GPU.
    need=$((base_mb * (gpus > 1 ? gpus : 1) + 3000))
    if [ "$total" -lt "$need" ]; then
        no "memory: $(gb "$total"), $(gb "$need") needed"
    else
        ok "memory: $(gb "$total"), $(gb "$need") needed"
    fi
}

check() { # VLLM (0 or 1)
    local name
    problems=0
    name=$(profile)
    [ -f "profiles/$name.yaml" ] || die "params.yaml: profile '$name' has no file profiles/$name.yaml"
    ok "profile $name"
    check_python
    check_tools
    if needs_gpu; then check_gpu no; else check_gpu note; fi
    check_disk "$1"
    check_memory
    if [ $problems -gt 0 ]; then
        printf '%s to put right first\n' "$problems"
        return 1
    fi
}

# ---- What is done --------------------------------------------------------------------------------------

setup() { # VLLM ANYWAY
    if ! check "$1" && { [ "$2" = 0 ] || [ -z "$python" ]; }; then exit 1; fi
    echo "installing into .venv (minutes the first time, seconds after that)"
    make --no-print-directory "PYTHON=$python" .venv/installed .venv/installed-remote
    if [ "$1" = 1 ]; then make --no-print-directory .venv/installed-gpu; fi
    if needs_gpu; then
        .venv/bin/python - <<'END' || die "torch sees no GPU although the driver is new enough; see docs/rented-host.md"
import sys
import torch

print(f"ok    torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees {torch.cuda.device_count()} GPU(s)")
sys.exit(not torch.cuda.is_available())
END
    fi
    mkdir -p $STATE
    if ! .venv/bin/python -m stages check >$STATE/check; then
        cat $STATE/check
        die "python -m stages check found something wrong, see above"
    fi
    ok "python -m stages check; what it says, memory and prompts, is in $STATE/check"
}

running() { tmux -L "$SESSION" has-session -t run 2>/dev/null; }
now() { date '+%Y-%m-%d %H:%M:%S'; }

need_dvc() { [ -x .venv/bin/dvc ] || die "there is no .venv yet: scripts/host.sh setup"; }

need_remote() { # the name only is looked at: an address may hold a password
    .venv/bin/dvc remote list | awk '{print $1}' | grep -Fqx -- "$1" ||
        die "no remote '$1'; name it first: dvc remote add --local $1 <your storage>"
    .venv/bin/python -m stages remote check "$1" --no-objects # allowed, private, working; nothing is sent before that
}

push_whole() { # REMOTE; what was pushed is read back and hashed
    .venv/bin/dvc push -r "$1" && .venv/bin/python -m stages remote check "$1"
}

start() { # REMOTE POWEROFF ARGUMENTS...
    need_dvc
    if running; then
        echo "it runs already; scripts/host.sh status"
        return
    fi
    if [ -n "$1" ]; then need_remote "$1"; fi
    mkdir -p $STATE
    rm -f $STATE/ended
    now >$STATE/started
    # A server of its own, so that it has this shell's environment and not an older one's.
    TMUX='' tmux -L "$SESSION" new-session -d -s run -x 160 -y 50 bash "$ROOT/scripts/host.sh" run-here "$@"
    echo "started. You may log out."
    echo "  scripts/host.sh status    scripts/host.sh attach    scripts/host.sh stop"
}

run_here() { # REMOTE POWEROFF ARGUMENTS...   what runs inside tmux
    local remote=$1 poweroff=$2 code=0
    shift 2
    trap : INT # Ctrl-C ends dvc and its stage; how they ended is still to be noted
    export PATH="$ROOT/.venv/bin:$PATH" PYTHONUNBUFFERED=1
    finish() {
        printf '%s %s\n' "$1" "$(now)" >$STATE/ended.tmp
        mv $STATE/ended.tmp $STATE/ended
    }
    # tee -i: not ended by Ctrl-C, or the last words would be lost.
    {
        printf '=== %s dvc repro %s\n' "$(now)" "$*"
        dvc repro "$@" || code=$?
        if [ $code = 0 ] && [ -n "$remote" ]; then
            printf '=== %s dvc push\n' "$(now)"
            push_whole "$remote" || code=$?
        fi
        printf '=== %s ended with status %s\n' "$(now)" $code
        finish $code
        if [ $code = 0 ] && [ "$poweroff" = 1 ]; then power_off; fi
    } 2>&1 | tee -i -a $LOG
}

power_off() {
    echo "halting in a minute; sudo shutdown -c prevents it"
    if [ "$(id -u)" = 0 ]; then shutdown -h +1; else sudo -n shutdown -h +1; fi
}

status() {
    local code when
    if running; then
        echo "running since $(cat $STATE/started)"
        grep -a '^Running stage' $LOG | tail -n 1 || true
    elif [ -f $STATE/ended ]; then
        read -r code when <$STATE/ended
        case $code in
            0) echo "finished well at $when" ;;
            stopped) echo "stopped at $when; scripts/host.sh start goes on where it was" ;;
            *) echo "ended with status $code at $when; scripts/host.sh start goes on where it was" ;;
        esac
    elif [ -f $STATE/started ]; then
        code=1
        echo "cut off (a reboot?), begun at $(cat $STATE/started); scripts/host.sh start goes on where it was"
    else
        echo "nothing was started here; scripts/host.sh start"
        return 1
    fi
    if [ -f $LOG ]; then
        echo "--- the end of $LOG"
        tail -n 5 $LOG
    fi
    nvidia-smi --query-gpu=index,utilization.gpu,memory.used,memory.total --format=csv,noheader 2>/dev/null |
        sed 's/^/--- GPU /' || true
    echo "--- $(gb "$(free_of .)") free"
    [ "${code:-0}" = 0 ]
}

stop() { # POWEROFF
    local waited=0
    if running; then
        tmux -L "$SESSION" send-keys -t run C-c
        while running && [ $waited -lt 90 ]; do
            sleep 1
            waited=$((waited + 1))
        done
        if running; then tmux -L "$SESSION" kill-server; fi
        printf 'stopped %s\n' "$(now)" >$STATE/ended
        echo "stopped; scripts/host.sh start goes on where it was"
    else
        echo "nothing runs"
    fi
    git_lacks
    if [ "$1" = 1 ]; then power_off; fi
}

push() { # REMOTE
    need_dvc
    need_remote "$1"
    push_whole "$1"
    git_lacks
}

git_lacks() {
    if [ -n "$(git status --porcelain)" ]; then
        echo "git has uncommitted changes; without dvc.lock what was pushed is not found again:"
        echo "  git add -A && git commit -m '<what this run was>' && git push"
    elif [ -n "$(git log --oneline '@{upstream}..' 2>/dev/null)" ]; then
        echo "git has commits that are nowhere else: git push"
    fi
}

# ---- The command line ----------------------------------------------------------------------------------

command=${1:-}
[ $# -gt 0 ] && shift
if [ "$command" = run-here ]; then
    run_here "$@"
    exit
fi
vllm=0 anyway=0 poweroff=0 remote=
allowed=
case $command in
    check) allowed="--vllm" ;;
    setup) allowed="--vllm --anyway" ;;
    start) allowed="--push --poweroff --" ;;
    up) allowed="--vllm --anyway --push --poweroff --" ;;
    stop) allowed="--poweroff" ;;
    push)
        [ $# = 1 ] || die "which remote? scripts/host.sh push REMOTE"
        remote=$1
        shift
        ;;
    status | attach) ;;
    '' | help | --help | -h)
        usage
        exit
        ;;
    *) die "no command '$command'; scripts/host.sh --help lists them" ;;
esac
while [ $# -gt 0 ]; do
    [[ " $allowed " == *" $1 "* ]] || die "$command takes no '$1'; scripts/host.sh --help"
    case $1 in
        --vllm) vllm=1 ;;
        --anyway) anyway=1 ;;
        --poweroff) poweroff=1 ;;
        --push)
            [ $# -gt 1 ] || die "--push: name the remote"
            remote=$2
            shift
            ;;
        --)
            shift
            break
            ;;
    esac
    shift
done
if [ "$command" != stop ] && [ $poweroff = 1 ] && [ -z "$remote" ]; then
    die "--poweroff goes with --push REMOTE, so that nothing is lost"
fi

case $command in
    check) check $vllm ;;
    setup) setup $vllm $anyway ;;
    start) start "$remote" $poweroff "$@" ;;
    up)
        setup $vllm $anyway
        start "$remote" $poweroff "$@"
        ;;
    status) status ;;
    attach)
        running || die "nothing runs; scripts/host.sh status"
        TMUX='' tmux -L "$SESSION" attach -t run
        ;;
    stop) stop $poweroff ;;
    push) push "$remote" ;;
esac
